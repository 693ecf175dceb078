"""The captured derivative: right at every input, functional, and nothing is touched by capturing.

The law for every program: what was captured at one input gives, at another one, the Jacobian of
torch.autograd; or the program is refused. Never a third thing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

import torchjac
from captured import CASES, Case, D, Straight, captured, captured_of, evaluated, expected, values
from torchjac import CaptureRefused
from torchjac._torch.trace.op_traits import OpOverload
from torchjac._torch.trace.trace import is_random
from torchjac.call import Call
from torchjac.capture.eager import capture_function, capture_graph
from torchjac.capture.linear_program import LinearProgram
from torchjac.capture.trace import trace_function, trace_graph

X = values(4)

# Refused today; where one of them is captured it must be right, and is to be taken off this list.
REFUSED = {
    "writes_to_a_tensor_and_reads_its_view": "share memory",
    "writes_to_a_view_and_reads_the_tensor": "share memory",
}


def elsewhere(args: Any) -> Any:
    """Other values in the places of floating-point tensors."""

    def other(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return values(*leaf.shape, seed=17).to(leaf.dtype)
        return leaf

    return pytree.tree_map(other, args)


def in_order(case: Case, args: tuple[Any, ...]) -> list[Tensor]:
    """Placeholders: what is differentiated, then the other floating-point tensors."""
    argnums = (case.argnums,) if isinstance(case.argnums, int) else case.argnums
    first = pytree.tree_leaves([args[i] for i in argnums])
    constants = [a for i, a in enumerate(args) if i not in argnums]
    rest = pytree.tree_leaves((constants, case.kwargs))
    return first + [t for t in rest if isinstance(t, Tensor) and t.is_floating_point()]


def state(holder: Any) -> Any:
    """What a user could find changed."""
    if isinstance(holder, Tensor):
        return (holder.tolist(), holder._version, holder.requires_grad, holder.grad_fn, holder.grad)
    if isinstance(holder, torch.nn.Module):
        names = [k for k in vars(holder) if not k.startswith("_")]
        buffers = {k: id(b) for k, b in holder.named_buffers()}
        return repr([vars(holder)[k] for k in names]), buffers, id(vars(holder)["_parameters"])
    if isinstance(holder, tuple):  # the cells of a closure
        return [repr(cell.cell_contents) for cell in holder]
    return repr(holder)


ACCEPTED = [n for n in CASES if n not in REFUSED]


@pytest.mark.parametrize("name", ACCEPTED)
class TestEveryProgram:
    def test_is_right_at_other_inputs(self, name: str) -> None:
        case, fresh = CASES[name](), CASES[name]()
        derivative = captured(case)
        assert derivative.scope == "global"
        args = elsewhere(case.args)
        got = evaluated(derivative, [t.clone() for t in in_order(case, args)])
        assert torch.allclose(got, expected(fresh, args))

    def test_is_functional(self, name: str) -> None:
        graph = captured(CASES[name]()).module.graph
        operations = [n.target for n in graph.nodes if isinstance(n.target, OpOverload)]
        assert [str(o) for o in operations if o._schema.is_mutable] == []

    def test_touches_nothing(self, name: str) -> None:
        case = CASES[name]()
        before = [state(holder) for holder in case.keeps]
        copies = [t.clone() for t in in_order(case, case.args)]
        captured(case)
        assert [state(holder) for holder in case.keeps] == before
        assert all(map(torch.equal, copies, in_order(case, case.args)))

    def test_twice_is_the_same(self, name: str) -> None:
        case = CASES[name]()
        first, second = captured(case), captured(case)
        tensors = in_order(case, case.args)
        assert torch.equal(
            evaluated(first, [t.clone() for t in tensors]),
            evaluated(second, [t.clone() for t in tensors]),
        )


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_and_untouched(name: str) -> None:
    case = CASES[name]()
    before = [state(holder) for holder in case.keeps]
    with pytest.raises(CaptureRefused, match=REFUSED[name]):
        captured(case)
    assert [state(holder) for holder in case.keeps] == before


W = values(4, seed=3)


class TestArguments:
    def test_floats_are_variables_and_integers_constants(self) -> None:
        f = lambda x, y, i, n: (x * y)[i] * n  # noqa: E731
        derivative = captured_of(f, X, W, torch.tensor([1, 3]), torch.tensor(2))
        holders = [n for n in derivative.module.graph.nodes if n.op == "placeholder"]
        assert len(holders) == 3  # with the cotangent

    def test_nested_other_arguments(self) -> None:
        case = Case(
            lambda x, p, *, q: x * p["a"][0] + q[1],
            (X, {"a": [W, 3], "b": None}),
            kwargs={"q": (1, W * 2)},
        )
        derivative = captured(case)
        got = evaluated(derivative, [X, W + 1, W * 2])
        assert torch.allclose(got, torch.diag(W + 1))

    def test_the_same_tensor_twice(self) -> None:
        derivative = captured_of(lambda x, y: x * y, X, X)
        assert torch.allclose(evaluated(derivative, [X, X]), torch.diag(X))

    def test_an_argument_that_is_also_read_elsewhere(self) -> None:
        derivative = captured_of(lambda x: x * W, W)
        assert torch.allclose(evaluated(derivative, [X]), torch.diag(W))

    def test_strides_are_those_of_the_arguments(self) -> None:
        def f(x: Tensor) -> Tensor:
            if x.stride() != (1, 3):
                raise KeyError(x.stride())
            return x * 2

        assert captured_of(f, values(2, 3).T).column_shapes == ((3, 2),)

    def test_arguments_that_require_gradients(self) -> None:
        x = X.clone().requires_grad_()
        derivative = captured_of(lambda x: x.sin(), x * 1)
        assert torch.allclose(evaluated(derivative, [X]), torch.diag(X.cos()))
        assert x.grad is None

    def test_has_aux(self) -> None:
        derivative = trace_function(Call(lambda x: (x * 2, x.shape), 0, True, (X,), {}), ())
        assert derivative.row_shapes == (X.shape,)

    @pytest.mark.parametrize(
        "f",
        [
            lambda x: (x * 2, x.argmax()),
            lambda x: (x * 2, torch.tensor(3)),
            lambda x: (x * 2, 3),
            lambda x: (x * 2, None),
            lambda x: x * 1j,
            lambda x: [],
            lambda x: x > 0,
        ],
        ids=["argmax", "constant", "number", "none", "complex", "empty", "bool"],
    )
    def test_outputs_without_a_jacobian_are_refused_as_ever(self, f: Callable[..., Any]) -> None:
        with pytest.raises(torchjac.TorchjacError) as plain:
            torchjac.jacobian(f)(X)
        with pytest.raises(type(plain.value)) as traced:
            captured_of(f)
        assert str(traced.value) == str(plain.value)

    @pytest.mark.parametrize("x", [torch.tensor([1, 2]), 3.0, None, X * 1j], ids=str)
    def test_inputs_without_a_jacobian_are_refused_as_ever(self, x: Any) -> None:
        with pytest.raises(torchjac.TorchjacError) as plain:
            torchjac.jacobian(lambda x: x)(x)
        with pytest.raises(type(plain.value)) as traced:
            captured_of(lambda x: x, x)
        assert str(traced.value) == str(plain.value)

    def test_errors_of_the_user_are_not_hidden(self) -> None:
        def fails(x: Tensor) -> Tensor:
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            captured_of(fails)

    def test_leaves_without_gradient_are_none(self) -> None:
        derivative = captured(
            Case(lambda x, y: (x * 2, torch.ones(2, dtype=D)), (X, W), argnums=(0, 1))
        )
        assert [c is None for c in derivative.cotangents] == [False, True]
        assert [g is None for g in derivative.gradients] == [False, True]
        assert (derivative.m, derivative.n) == (6, 8)


class TestModesOfTheCaller:
    def test_no_grad(self) -> None:
        with torch.no_grad():
            derivative = captured_of(lambda x: x.sin())
        assert torch.allclose(evaluated(derivative, [X]), torch.diag(X.cos()))

    def test_inference_mode(self) -> None:
        with torch.inference_mode():
            derivative = captured_of(lambda x: x.sin(), X)
        assert torch.allclose(evaluated(derivative, [X]), torch.diag(X.cos()))

    def test_tensors_of_inference_mode(self) -> None:
        with torch.inference_mode():
            x = values(4)
            derivative = captured_of(lambda x: x.sin(), x)
        assert torch.allclose(evaluated(derivative, [X]), torch.diag(X.cos()))

    def test_autocast_is_part_of_the_function(self) -> None:
        x, w = values(4).float(), values(4, 4).float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            derivative = captured_of(lambda x: w @ x, x)
            plain = torchjac.jacobian(lambda x: w @ x)(x)
        assert torch.equal(evaluated(derivative, [x]).float(), plain)

    def test_autocast_inside(self) -> None:
        x, w = values(4).float(), values(4, 4).float()

        def f(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return w @ x

        plain = torchjac.jacobian(f)(x)
        assert torch.equal(evaluated(captured_of(f, x), [x]).float(), plain.float())

    def test_modes_are_left_as_they_were(self) -> None:
        def leaves(x: Tensor) -> Tensor:
            if x.sum() > 0:
                return x
            return x * 2

        with torch.no_grad(), pytest.raises(CaptureRefused):
            captured_of(leaves)
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert torch.sin(X)._version == 0
        assert type(torch.sin(X)) is Tensor


class TestRandom:
    @pytest.mark.parametrize(
        "f",
        [
            lambda x: x * torch.rand(4, dtype=D),
            lambda x: x + torch.randn_like(x),
            lambda x: F.dropout(x, 0.5),
            lambda x: x * torch.bernoulli(x.detach().sigmoid()),
            lambda x: x[torch.randperm(4)],
        ],
        ids=["rand", "randn_like", "dropout", "bernoulli", "randperm"],
    )
    def test_numbers_are_drawn_anew_and_none_by_capturing(self, f: Callable[..., Any]) -> None:
        before = torch.get_rng_state()
        derivative = captured_of(f)
        assert torch.equal(before, torch.get_rng_state())
        nodes = list(derivative.module.graph.nodes)
        assert any(is_random(n.target) for n in nodes) or "randn_like" in str(nodes) or _is_sum(f)

    def test_generators_are_not_advanced(self) -> None:
        generator = torch.Generator().manual_seed(1)
        before = generator.get_state()
        captured_of(lambda x: x * torch.rand(4, generator=generator, dtype=D))
        assert torch.equal(before, generator.get_state())


def _is_sum(f: Callable[..., Any]) -> bool:
    """Noise that is only added is no part of the derivative."""
    return "randn_like" in f.__code__.co_names


class TestGraphsThatExist:
    def local(self, outputs: Any, inputs: Any) -> LinearProgram:
        program = capture_graph(
            outputs, inputs, batched=False, retain_graph=True, create_graph=False
        )
        return trace_graph(program, ())

    def test_is_the_jacobian_of_this_evaluation(self) -> None:
        x = X.clone().requires_grad_()
        y = x.sin() * x.detach()
        derivative = self.local(y, x)
        assert derivative.scope == "local"
        assert torch.allclose(evaluated_local(derivative), torch.diag(X.cos() * X))
        assert torch.allclose(torch.autograd.grad(y.sum(), x)[0], X.cos() * X), "still there"

    def test_inputs_that_are_no_leaves(self) -> None:
        q = X.clone().requires_grad_()
        x = q * 2
        derivative = self.local((x.sin(), x * q), (x, q))
        cos, diag = torch.diag((2 * X).cos()), torch.diag(X)
        # x * q with x = 2 q: 2 q directly, and q by way of x, which counts 2.
        expected = torch.cat([torch.cat([cos, 2 * cos], 1), torch.cat([diag, 4 * diag], 1)])
        assert torch.allclose(evaluated_local(derivative), expected)

    def test_branches_of_the_graph_are_fine(self) -> None:
        x = X.clone().requires_grad_()
        y = x * 2 if x.sum() > 0 else x
        assert torch.allclose(evaluated_local(self.local(y, x)), 2 * torch.eye(4, dtype=D))

    def test_custom_functions(self) -> None:
        x = X.clone().requires_grad_()
        y = Straight.apply(x)
        assert torch.allclose(evaluated_local(self.local(y, x)), 2 * torch.eye(4, dtype=D))

    def test_output_is_the_input(self) -> None:
        x = X.clone().requires_grad_()
        assert torch.equal(evaluated_local(self.local(x, x)), torch.eye(4, dtype=D))

    def test_gradients_are_not_accumulated_and_hooks_stay(self) -> None:
        x = X.clone().requires_grad_()
        calls = []
        x.register_hook(lambda g: calls.append(1))
        y = x.sin()
        self.local(y, x)
        assert x.grad is None
        before = len(calls)
        y.sum().backward()
        assert len(calls) == before + 1

    def test_from_a_captured_function(self) -> None:
        call = Call(lambda x: x[x > 0.5] * 2, 0, False, (X,), {})
        program, _ = capture_function(call, batched=False, create_graph=False, replayable=False)
        jacobian = evaluated_local(trace_graph(program, ()))
        assert torch.equal(jacobian, 2 * torch.eye(4, dtype=D)[X > 0.5])


def evaluated_local(derivative: LinearProgram) -> Tensor:
    """A local derivative takes cotangents as its arguments."""
    shapes = derivative.row_shapes
    rows = []
    for seed in torch.eye(derivative.m, dtype=D):
        parts = seed.split([s.numel() for s in shapes])
        seeds = [p.view(s) for p, s in zip(parts, shapes, strict=True)]
        gradients = derivative.module(*seeds)[len(shapes) :]
        rows.append(torch.cat([g.reshape(-1) for g in gradients]))
    return torch.stack(rows)


def test_lines_point_into_the_user_code() -> None:
    def f(x: Tensor) -> Tensor:
        y = x.sin()
        return y.cumsum(0)

    lines = set(captured_of(f).lines.values())
    first = f.__code__.co_firstlineno
    assert lines == {f"{__file__}:{first + 1}", f"{__file__}:{first + 2}"}
