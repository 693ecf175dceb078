"""What capturing relies on in torch beyond its documentation, pinned.

A failure here after an upgrade of torch says which corner of `torchjac._torch.trace.trace` or
`torchjac._torch.state` to look at.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from torchjac._torch import autograd, state
from torchjac._torch.trace import proxies
from torchjac._torch.trace import trace as tracing

D = torch.float64
X = torch.tensor([0.3, 0.7], dtype=D)


class TestMakeFx:
    def test_the_backward_pass_is_part_of_the_trace(self) -> None:
        def f(x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            return torch.autograd.grad(x.sin().sum(), x)[0]

        module = make_fx(f, tracing_mode="fake")(X)
        targets = [n.target for n in module.graph.nodes]
        assert torch.ops.aten.cos.default in targets
        assert torch.allclose(module(X + 1), (X + 1).cos())

    def test_closures_over_real_tensors_are_constants(self) -> None:
        w = torch.ones(2, dtype=D)
        module = make_fx(lambda x: x * w, tracing_mode="fake", _allow_non_fake_inputs=True)(X)
        (constant,) = [n for n in module.graph.nodes if n.op == "get_attr"]
        assert getattr(module, constant.target) is w

    def test_an_alias_of_a_real_tensor_has_no_value_to_write_to(self) -> None:
        w = torch.zeros(2, dtype=D)

        def f(x: Tensor) -> Tensor:
            return x * w.detach().add_(1)

        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            make_fx(f, _allow_non_fake_inputs=True)(mode.from_tensor(X))
        assert w.tolist() == [0, 0]

    def test_values_have_metadata(self) -> None:
        module = make_fx(lambda x: x.sin(), tracing_mode="fake")(X)
        for node in module.graph.nodes:
            if node.op != "output":
                assert node.meta["val"].shape == X.shape

    @pytest.mark.parametrize(
        "f",
        [
            lambda x: x if x.sum() > 0 else -x,
            lambda x: x * float(x[0]),
            lambda x: x * x[0].item(),
            lambda x: x[x > 0.5],
            lambda x: x.nonzero(),
        ],
        ids=["bool", "float", "item", "mask", "nonzero"],
    )
    def test_values_that_decide_raise_or_are_seen(self, f: Callable[[Tensor], Tensor]) -> None:
        try:
            proxies.traced(lambda _, x: [f(x)], [X], True, ())
        except tracing.DATA_DEPENDENT + tracing.UNSUPPORTED:
            return
        raise AssertionError("frozen")

    def test_sequence_numbers_join_backward_to_forward(self) -> None:
        numbers = []

        def f(observer: tracing.Observer, x: Tensor) -> list[Tensor]:
            x = x.detach().requires_grad_()
            y = x.sin()
            numbers.append(autograd.sequence_number(y.grad_fn))
            with tracing.numbered([y.grad_fn], observer):
                return list(torch.autograd.grad(y.sum(), x))

        module, _ = proxies.traced(f, [X], True, ())
        (cos,) = [n for n in module.graph.nodes if n.target is torch.ops.aten.cos.default]
        assert [tracing.sequence_of(cos)] == numbers

    def test_random_operations_are_tagged(self) -> None:
        aten = torch.ops.aten
        for op in (aten.rand.default, aten.bernoulli.default, aten.native_dropout.default):
            assert tracing.is_random(op)
        assert not tracing.is_random(aten.sin.default)

    def test_names_of_exceptions(self) -> None:
        names = {kind.__name__ for kind in tracing.DATA_DEPENDENT + tracing.UNSUPPORTED}
        assert names >= {
            "DataDependentOutputException",
            "DynamicOutputShapeException",
            "UnsupportedOperatorException",
        }

    def test_only_backwards_are_decomposed_without_exceptions(self) -> None:
        aten = torch.ops.aten
        some = proxies.decompositions(frozenset())
        assert aten.threshold_backward.default in some
        assert aten.addmm.default not in some
        reduced = proxies.decompositions(frozenset({aten.threshold_backward.default}))
        assert aten.threshold_backward.default not in reduced


class TestState:
    def test_ambient_is_cheap_to_compare_and_sees_modes(self) -> None:
        before = dict(zip(state.AMBIENT, state.ambient(), strict=True))
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
            after = dict(zip(state.AMBIENT, state.ambient(), strict=True))
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {"grad mode", "autocast", "torch function modes"}
        assert dict(zip(state.AMBIENT, state.ambient(), strict=True)) == before

    def test_versions_count_writes_also_through_views(self) -> None:
        w = torch.zeros(3)
        start = w._version
        w[1:].add_(1)
        assert w._version == start + 1

    def test_data_is_replaced_without_a_new_version(self) -> None:
        w = torch.zeros(3)
        version, place = w._version, w.data_ptr()
        w.data = torch.ones(3)
        assert (w._version, w.data_ptr() != place) == (version, True)

    def test_tensors_of_inference_mode_have_no_version(self) -> None:
        with torch.inference_mode():
            w = torch.zeros(3)
        with pytest.raises(RuntimeError, match="version"):
            _ = w._version

    def test_a_module_keeps_its_state_in_known_places(self) -> None:
        names = set(vars(nn.Linear(2, 2)))
        assert {"training", "_parameters", "_buffers", "_modules", "_forward_hooks"} <= names
        assert names >= state.SAVING_HOOKS

    def test_global_hooks_are_the_dictionaries_that_modules_use(self) -> None:
        handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: None)
        try:
            assert any(state.GLOBAL_HOOKS)
        finally:
            handle.remove()
        assert not any(state.GLOBAL_HOOKS)

    def test_tensors_of_transforms_are_seen(self) -> None:
        seen = []
        torch.func.grad(lambda x: seen.append(state.is_wrapped(x)) or x.sum())(X)
        torch.vmap(lambda x: seen.append(state.is_wrapped(x)) or x)(X)
        assert seen == [True, True]
        assert not state.is_wrapped(X)
