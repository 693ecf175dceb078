"""What torchjac relies on in torch beyond its documentation, pinned.

A failure here after an upgrade of torch says which corner of `torchjac._torch` to look at.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch import predispatch
from torch.autograd import Variable

from laws import value
from torchjac._torch import autograd, modes, pytree, vmap
from torchjac._torch.autograd import is_right_twice
from torchjac._torch.storage import copied_when_written
from torchjac._torch.tensor_guards import look
from versions import TORCH


def graph() -> tuple[Tensor, Tensor]:
    q = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    return q, torch.cat([2 * q, 4 * q * q], -1)


class TestAutograd:
    def test_engine_takes_what_autograd_grad_passes(self) -> None:
        q, x = graph()
        seed = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
        (got,) = autograd.backward([x], [seed], [q])
        (expected,) = torch.autograd.grad(x, q, seed)
        assert torch.equal(got, expected)

    def test_unused_input_gives_none(self) -> None:
        _, x = graph()
        other = torch.ones(3, requires_grad=True)
        assert autograd.backward([x], [torch.ones_like(x)], [other]) == (None,)

    def test_nothing_is_accumulated(self) -> None:
        q, x = graph()
        autograd.backward([x], [torch.ones_like(x)], [q])
        assert q.grad is None

    def test_retain_graph_false_frees(self) -> None:
        q, x = graph()
        autograd.backward([x], [torch.ones_like(x)], [q], retain_graph=False)
        with pytest.raises(RuntimeError, match="second time"):
            autograd.backward([x], [torch.ones_like(x)], [q])

    def test_create_graph_records(self) -> None:
        q, x = graph()
        (plain,) = autograd.backward([x], [torch.ones_like(x)], [q])
        (recorded,) = autograd.backward([x], [torch.ones_like(x)], [q], create_graph=True)
        assert not plain.requires_grad
        assert recorded.requires_grad

    def test_nodes_tell_shapes_and_order(self) -> None:
        _, x = graph()
        (metadata,) = autograd.node_outputs(x.grad_fn)
        assert tuple(metadata.shape) == (4,)
        assert metadata.dtype.itemsize == 8
        child = x.grad_fn.next_functions[0][0]
        assert autograd.sequence_number(x.grad_fn) > autograd.sequence_number(child)

    def test_a_leaf_has_a_node(self) -> None:
        q, x = graph()
        assert autograd.gradient_node(x) is x.grad_fn
        assert type(autograd.gradient_node(q)).__name__ == "AccumulateGrad"

    def test_the_private_name_exists(self) -> None:
        assert callable(Variable._execution_engine.run_backward)

    def test_memory_that_ran_out_is_told_by_the_error(self) -> None:
        with pytest.raises(RuntimeError) as caught:
            torch.empty(2**58, dtype=torch.uint8)
        assert autograd.out_of_memory(caught.value)
        assert autograd.out_of_memory(torch.OutOfMemoryError("of a device"))
        assert not autograd.out_of_memory(RuntimeError("sizes do not match"))


class TestVmap:
    def test_batched_backward_is_a_stack_of_backwards(self) -> None:
        q, x = graph()
        (got,) = vmap.batched_backward([x], [torch.eye(4, dtype=torch.float64)], [q])
        expected = [[2, 0], [0, 2], [8, 0], [0, 16]]
        assert torch.equal(got, torch.tensor(expected, dtype=torch.float64))

    def test_rules_are_loaded_once(self) -> None:
        """torch's flag says so: where it is gone, torch is asked every time."""
        q, x = graph()
        vmap.batched_backward([x], [torch.eye(4, dtype=torch.float64)], [q])
        assert predispatch.DECOMPOSITIONS_LOADED

    def test_gradient_that_ignores_the_cotangent_is_expanded(self) -> None:
        class One(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx, g: Tensor) -> Tensor:
                return torch.ones(2, dtype=torch.float64)

        q, _ = graph()
        (got,) = vmap.batched_backward([One.apply(q)], [torch.eye(2, dtype=torch.float64)], [q])
        assert torch.equal(got, torch.ones(2, 2, dtype=torch.float64))

    def test_missing_rule_is_an_error_that_names_the_operation(self) -> None:
        x = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
        y = torch.pdist(x)
        with pytest.raises(RuntimeError) as caught:
            vmap.strict_batched_backward([y], [torch.eye(6, dtype=torch.float64)], [x])
        assert vmap.missing_rule(caught.value) == "aten::_pdist_backward"
        assert _functorch._is_vmap_fallback_enabled(), "the switch is put back"

    def test_other_errors_name_no_operation(self) -> None:
        assert vmap.missing_rule(RuntimeError("vmap: .item() on a Tensor")) is None

    def test_levels_are_balanced_after_an_error(self) -> None:
        x = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
        with pytest.raises(RuntimeError):
            vmap.strict_batched_backward([torch.pdist(x)], [torch.eye(6, dtype=torch.float64)], [x])
        assert not vmap.inside_transform()

    def test_inside_transform(self) -> None:
        seen = []
        torch.vmap(lambda x: seen.append(vmap.inside_transform()) or x)(torch.ones(2))
        assert seen == [True]
        assert not vmap.inside_transform()

    def test_cdist_is_why_batched_passes_are_checked(self) -> None:
        """If this fails, torch has mended the rule; others may still be wrong."""
        x = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
        y = torch.cdist(x, x.sin())
        seeds = torch.eye(9, dtype=torch.float64).view(9, 3, 3)
        (batched,) = vmap.batched_backward([y], [seeds], [x])
        (legacy,) = vmap.legacy_batched_backward([y], [seeds], [x])
        plain = torch.stack([torch.autograd.grad(y, x, s, retain_graph=True)[0] for s in seeds])
        assert torch.allclose(legacy, plain)
        assert not torch.allclose(batched, plain)


class TestModes:
    def test_autocast_is_seen(self) -> None:
        assert not modes.needs_passes_context()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert modes.needs_passes_context()

    def test_inference_mode_is_seen_and_left(self) -> None:
        with torch.inference_mode():
            assert modes.needs_passes_context()
            tensor = torch.ones(2)
            with modes.recording():
                x = modes.usable_in_graph(tensor).requires_grad_()
                assert (x * x).requires_grad

    def test_passes_run_outside_autocast(self) -> None:
        a = torch.ones(2, 2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (a @ a).dtype == torch.bfloat16
            with modes.passes([a]):
                assert (a @ a).dtype == torch.float32


class TestPytree:
    def test_names_are_python(self) -> None:
        tree = {"w": [torch.ones(1), torch.ones(2)], "b": (torch.ones(3),)}
        assert set(pytree.leaf_names("inputs", tree)) == {
            "inputs['w'][0]",
            "inputs['w'][1]",
            "inputs['b'][0]",
        }

    def test_round_trip(self) -> None:
        tree = {"w": [1, 2], "b": (3, None)}
        leaves, spec = pytree.flatten(tree)
        assert pytree.unflatten(leaves, spec) == tree

    def test_a_tensor_is_its_own_leaf(self) -> None:
        t = torch.ones(2)
        leaves, spec = pytree.flatten(t)
        assert leaves[0] is t
        assert pytree.unflatten(leaves, spec) is t
        assert spec == pytree.flatten(3)[1]


def test_autograd_grad_still_has_the_arguments_jac_mirrors() -> None:
    names = set(inspect.signature(torch.autograd.grad).parameters)
    assert {"retain_graph", "create_graph", "allow_unused", "is_grads_batched"} <= names


class TestLazyCopies:
    """`torch._lazy_clone`: memory is shared until one of the two is written to."""

    def test_shared_until_written(self) -> None:
        original = torch.arange(5)
        one, two = copied_when_written(original), copied_when_written(original)
        assert torch._C._data_address(one) == torch._C._data_address(two)
        one[0] = 7
        original[1] = 8
        assert one.tolist() == [7, 1, 2, 3, 4]
        assert two.tolist() == [0, 1, 2, 3, 4]
        assert original.tolist() == [0, 8, 2, 3, 4]

    def test_foreign_memory_is_copied(self) -> None:
        array = np.arange(3)
        copy = copied_when_written(torch.from_numpy(array))
        array[0] = 9
        assert copy.tolist() == [0, 1, 2]

    def test_inside_a_sparse_tensor(self) -> None:
        """By way of its parts, NumPy and SciPy."""
        starts, columns = torch.tensor([0, 1, 2]), torch.tensor([0, 1])
        tensors = [
            torch.sparse_csr_tensor(
                copied_when_written(starts),
                copied_when_written(columns),
                torch.ones(2),
                (2, 2),
                check_invariants=False,
            )
            for _ in range(3)
        ]
        tensors[0].col_indices().numpy()[:] = 0
        tensors[1].col_indices().fill_(1)
        assert tensors[2].col_indices().tolist() == columns.tolist() == [0, 1]
        assert (tensors[2] @ torch.ones(2, 1)).flatten().tolist() == [1, 1]


def test_use_count_of_memory() -> None:
    """Every tensor and array on the same memory counts."""
    memory = torch.zeros(4)

    def uses() -> int:
        return int(torch._C._storage_Use_Count(memory.untyped_storage()._cdata))

    alone = uses()
    view = memory[1:]
    assert uses() == alone + 1
    array = memory.numpy()
    assert uses() == alone + 2
    del view, array
    assert uses() == alone


class TestTensorGuard:
    """Whether a tensor is like another one, in one call."""

    @pytest.mark.parametrize(
        "change",
        [
            lambda t: t.t(),
            lambda t: t.reshape(2, 8),
            lambda t: t.clone().requires_grad_(),
            lambda t: t.float(),
            lambda t: t.view(torch.int64),
            lambda t: torch._neg_view(t),
            lambda t: t.to("meta"),
            lambda t: torch.nn.Parameter(t),
            lambda t: t.to_sparse(),
            lambda t: t.tolist(),
        ],
    )
    def test_sees_what_is_not(self, change: Any) -> None:
        tensor = torch.randn(4, 4, dtype=torch.float64)
        like = look(tensor)
        assert like is not None
        assert like(torch.zeros(4, 4, dtype=torch.float64))
        try:
            assert not like(change(tensor))
        except (TypeError, RuntimeError):  # what is no tensor is an error
            assert not isinstance(change(tensor), Tensor)

    def test_sees_what_was_done_to_it(self) -> None:
        tensor = torch.randn(4, 4)
        like = look(tensor)
        assert like is not None
        tensor.data = tensor.data.t()
        assert not like(tensor)

    def test_keeps_nothing_alive(self) -> None:
        tensor = torch.randn(4, 4)
        like, gone = look(tensor), weakref.ref(tensor)
        del tensor
        assert like is not None
        assert gone() is None


@pytest.mark.parametrize("norm", [torch.nn.LayerNorm(4), torch.nn.BatchNorm1d(4)], ids=str)
def test_backward_passes_of_norms(norm: torch.nn.Module) -> None:
    """Right where they are differentiated twice, wrong where they are three times.

    Of batch norm torch gives no third derivative since 2.14, where it gave a wrong one before.
    """
    norm = norm.double()
    x = value(3, 4).requires_grad_()
    weight = value(3, 4, seed=1)

    def gradient(u: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(norm(x), x, u, create_graph=True)[0]

    u = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    (pushed,) = torch.autograd.grad(gradient(u), u, weight, create_graph=True)
    columns = [torch.autograd.grad(y, x, create_graph=True)[0] for y in norm(x).flatten()]
    rows = torch.stack([(g * weight).sum() for g in columns]).view(3, 4)
    torch.testing.assert_close(pushed, rows)
    thrice = torch.autograd.grad(rows.sin().sum(), x, allow_unused=True)[0]
    if isinstance(norm, torch.nn.BatchNorm1d) and TORCH >= (2, 14):
        with pytest.raises(RuntimeError, match=r"does not support 3rd\+ order derivatives"):
            torch.autograd.grad(pushed.sin().sum(), x)
    else:
        wrong = torch.autograd.grad(pushed.sin().sum(), x)[0]
        assert not torch.allclose(wrong, thrice), "is_right_twice of torchjac._torch is not needed"
    assert not is_right_twice(type(norm(x).grad_fn), True)
    assert is_right_twice(type(norm(x).grad_fn), False)
    assert not is_right_twice(type(gradient(u).grad_fn), False)
