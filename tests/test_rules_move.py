"""Movement and indexing: sound, exact, with constants that are what they say."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from patterns import check, interpreted, known, pattern_of

F = torch.nn.functional
aten = torch.ops.aten


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(4))


def written(make: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """A function that writes parts of its argument into a tensor."""

    def f(x: Tensor) -> Tensor:
        y = x.clone()
        result = make(y, x)
        return y if result is None else result

    return f


def assigned(*index: Any) -> Callable[[Tensor], Tensor]:
    def f(x: Tensor) -> Tensor:
        y = x.clone()
        y[index] = x.flip(0)[index]
        return y

    return f


# Every entry of these is known before the function runs.
MOVES: dict[str, tuple[Callable[[Tensor], Any], tuple[int, ...]]] = {
    "t": (lambda x: x.t(), (3, 4)),
    "permute": (lambda x: x.permute(2, 0, 1), (2, 3, 4)),
    "movedim": (lambda x: x.movedim(0, -1), (2, 3, 4)),
    "reshape": (lambda x: x.t().reshape(2, 6), (3, 4)),
    "flatten-empty": (lambda x: x.reshape(-1), (3, 0)),
    "unsqueeze": (lambda x: x.unsqueeze(1), (3, 4)),
    "squeeze": (lambda x: x.squeeze(), (3, 1, 4, 1)),
    "squeeze-dim": (lambda x: x.squeeze(1), (3, 1, 4)),
    "expand": (lambda x: x.expand(5, 3, 4), (3, 1)),
    "slice": (lambda x: x[1:, ::2], (3, 5)),
    "slice-negative": (lambda x: x[-2:], (5,)),
    "slice-to-nothing": (lambda x: x[3:], (3, 2)),
    "select": (lambda x: x[:, 2], (3, 4)),
    "diagonal": (lambda x: x.diagonal(1), (3, 5)),
    "diag": (lambda x: torch.diag(x, -1), (4,)),
    "diag_embed": (lambda x: torch.diag_embed(x, 1), (2, 3)),
    "trace": (lambda x: torch.trace(x), (3, 4)),
    "tril": (lambda x: x.tril(-1), (4, 5)),
    "triu": (lambda x: x.triu(1), (2, 4, 3)),
    "flip": (lambda x: x.flip(0, 1), (3, 4)),
    "roll": (lambda x: x.roll((1, -2), (0, 1)), (3, 5)),
    "roll-flat": (lambda x: x.roll(2), (3, 5)),
    "rot90": (lambda x: x.rot90(), (3, 4)),
    "repeat": (lambda x: x.repeat(2, 3), (3, 2)),
    "tile": (lambda x: x.tile(2, 1, 2), (3, 2)),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 0), (3, 2)),
    "repeat_interleave-each": (
        lambda x: x.repeat_interleave(torch.tensor([2, 0, 1]), 0, output_size=3),
        (3, 2),
    ),
    "unfold": (lambda x: x.unfold(0, 3, 2), (8, 2)),
    "unfold-overlap": (lambda x: x.unfold(1, 3, 1), (2, 5)),
    "unfold-once": (lambda x: x.unfold(0, 5, 1), (5,)),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), (1, 8, 2, 3)),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), (1, 2, 4, 6)),
    "channel_shuffle": (lambda x: F.channel_shuffle(x, 2), (1, 4, 2, 3)),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 1)), (3, 2)),
    "pad-cuts": (lambda x: F.pad(x, (-1, 2)), (3, 4)),
    "pad-ones": (lambda x: F.pad(x, (1, 1), value=1.0), (3,)),
    "reflect1": (lambda x: F.pad(x, (2, 1), "reflect"), (2, 4)),
    "reflect2": (lambda x: F.pad(x, (2, 1, 0, 2), "reflect"), (1, 2, 4, 5)),
    "reflect3": (lambda x: F.pad(x, (1, 0, 1, 1, 0, 1), "reflect"), (1, 1, 2, 3, 2)),
    "replicate1": (lambda x: F.pad(x, (2, 1), "replicate"), (2, 1, 3)),
    "replicate2": (lambda x: F.pad(x, (2, 1, 0, 3), "replicate"), (1, 2, 3, 4)),
    "replicate2-cuts": (lambda x: F.pad(x, (-1, 1, 2, -1), "replicate"), (1, 2, 3, 4)),
    "replicate3": (lambda x: F.pad(x, (1, 1, 2, 0, 0, 1), "replicate"), (1, 1, 2, 3, 2)),
    "circular": (lambda x: F.pad(x, (2, 1), "circular"), (1, 2, 5)),
    "im2col": (lambda x: F.unfold(x, (2, 3), 1, (1, 0), (1, 2)), (2, 2, 4, 5)),
    "im2col-single": (lambda x: F.unfold(x, 2), (1, 3, 3)),
    "col2im": (lambda x: F.fold(x, (4, 5), (2, 3), 1, 1, (2, 1)), (2, 12, 15)),
    "split": (lambda x: x.split(2), (5, 2)),
    "split-one-used": (lambda x: x.split([1, 3], 1)[1], (2, 4)),
    "unbind": (lambda x: [x.unbind(1)[2], x.unbind(0)[0]], (2, 3)),
    "chunk": (lambda x: x.chunk(3, 1), (2, 4)),
    "tensor_split": (lambda x: x.tensor_split(3), (5,)),
    "meshgrid": (lambda x: torch.meshgrid(x, x.flip(0), indexing="ij"), (3,)),
    "cat": (lambda x: torch.cat([x, x.flip(0), 2 * x[:1]]), (3, 2)),
    "stack": (lambda x: torch.stack([x, x.roll(1)], -1), (3,)),
    "hstack-constant": (lambda x: torch.hstack([x, torch.ones(2, dtype=x.dtype)]), (3,)),
    "block_diag": (lambda x: torch.block_diag(x, x.t()), (2, 3)),
    "as_strided": (lambda x: x.as_strided((3, 3), (1, 2)), (8,)),
    "as_strided-overlap": (lambda x: x.as_strided((4, 3), (1, 1)), (6,)),
    "as_strided-layout": (lambda x: x.t().contiguous().as_strided((4,), (3,), 1), (3, 4)),
    "as_strided_scatter": (
        lambda x: torch.as_strided_scatter(x, x.flatten()[:4].reshape(2, 2), (2, 2), (5, 2), 1),
        (2, 5),
    ),
    "select_scatter": (lambda x: torch.select_scatter(x, 3 * x[:, 0], 1, 2), (2, 4)),
    "slice_scatter": (lambda x: torch.slice_scatter(x, x[:, :2].flip(1), 1, 1, 3), (2, 4)),
    "diagonal_scatter": (lambda x: torch.diagonal_scatter(x, x[0], 0), (3, 3)),
    "view_copy": (lambda x: torch.view_copy(torch.permute_copy(x, (1, 0)), (2, 6)), (3, 4)),
    "slice_copy": (lambda x: torch.slice_copy(torch.select_copy(x, 0, 1), 0, 1, 3), (2, 4)),
    "unfold_copy": (lambda x: torch.unfold_copy(x, 0, 2, 1), (4, 2)),
    "unbind_copy": (lambda x: torch.unbind_copy(x, 1), (2, 3)),
    "write-slice": (written(lambda y, x: y[1:].mul_(2)), (4, 2)),
    "write-views": (written(lambda y, x: y.t()[0].copy_(x[:, 1])), (3, 4)),
    "write-swap": (written(lambda y, x: y[:2].copy_(x[2:])), (4, 2)),
    "write-scalar": (written(lambda y, x: y[:, 1].fill_(3.0)), (3, 2)),
    "scalar": (lambda x: x.expand(3).reshape(1, 3), ()),
}

ROWS = torch.tensor([2, 0, 2])
MASK = torch.tensor([True, False, True, True])
# Made outside of the functions: random numbers drawn within one depend on nothing that is known.
AT_0 = integers(3, 2, 2)
AT_1 = integers(4, 3, 2)
AT_2 = integers(4, 2, 2)
AT_3 = integers(3, 2, 1, 2)
AT_4 = integers(3, 1, 2)
AT_5 = integers(3, 3, 2)
AT_6 = integers(4, 2, 3)
INDEX: dict[str, tuple[Callable[[Tensor], Any], tuple[int, ...]]] = {
    "index": (lambda x: x[ROWS], (4, 3)),
    "index-negative": (lambda x: x[torch.tensor([-1, 0])], (4, 3)),
    "index-second": (lambda x: x[:, ROWS], (2, 3)),
    "index-both": (lambda x: x[ROWS, ROWS], (3, 4)),
    "index-outer": (lambda x: x[ROWS[:, None], torch.arange(2)], (3, 4)),
    "index-apart": (lambda x: x[ROWS, :, ROWS], (3, 2, 4)),
    "index-middle": (lambda x: x[:, ROWS, torch.tensor([1, 0, 1])], (2, 3, 4)),
    "index-2d": (lambda x: x[AT_0], (3, 2)),
    "index-none": (lambda x: x[torch.zeros(0, dtype=torch.int64)], (3, 2)),
    "index_select": (lambda x: x.index_select(1, ROWS), (2, 3)),
    "index_select-scalar": (lambda x: x.index_select(0, torch.tensor([0])), ()),
    "take": (lambda x: x.take(torch.tensor([[5, 0], [1, 5]])), (2, 3)),
    "gather": (lambda x: x.gather(1, AT_1), (3, 4)),
    "gather-few": (lambda x: x.gather(0, AT_2), (4, 3)),
    "gather-lanes": (lambda x: x.gather(1, ROWS.expand(3, 3)), (3, 4)),
    "gather-inner": (lambda x: x.gather(0, AT_3.expand(2, 4, 2)), (3, 4, 2)),
    "take_along_dim": (lambda x: x.take_along_dim(AT_4, 0), (3, 2)),
    "scatter-value": (lambda x: x.scatter(0, torch.tensor([[1, 1, 0]]), 5.0), (2, 3)),
    "scatter_add": (lambda x: x.scatter_add(0, AT_5, x.flip(0)), (3, 2)),
    "scatter_add-lanes": (
        lambda x: x.new_zeros(4, 2).scatter_add(0, ROWS[:, None].expand(3, 2), x),
        (3, 2),
    ),
    "scatter_reduce": (lambda x: x.scatter_reduce(0, AT_5, x, "sum"), (3, 2)),
    "index_add": (lambda x: x.index_add(0, ROWS, x[:3].flip(0), alpha=3), (4, 2)),
    "index_copy": (lambda x: x.index_copy(1, torch.tensor([2, 0]), 2 * x[:, :2]), (2, 3)),
    "index_fill": (lambda x: x.index_fill(0, torch.tensor([1, 1]), 2.0), (3, 2)),
    "index_fill-tensor": (lambda x: x[1:].index_fill(0, torch.tensor([1]), x[0]), (4,)),
    "index_put": (assigned(torch.tensor([2, 0])), (4, 3)),
    "index_put-second": (assigned(slice(None), torch.tensor([2, 0])), (2, 4)),
    "index_put-apart": (
        assigned(torch.tensor([1, 0]), slice(None), torch.tensor([0, 1])),
        (2, 3, 4),
    ),
    "index_put-outer": (assigned(torch.tensor([[2], [0]]), torch.tensor([1, 3])), (3, 4)),
    "index_put-constant": (
        written(lambda y, x: y.index_put_((ROWS,), torch.ones(()).double())),
        (4, 2),
    ),
    "index_put-accumulate": (lambda x: x.index_put((ROWS,), x[:3], accumulate=True), (4, 2)),
    "index_put-spread": (lambda x: x.index_put((ROWS,), x[0, 0], accumulate=True), (4, 2)),
    "put": (lambda x: x.put(torch.tensor([[1, 4]]), x[:1, :2]), (2, 3)),
    "put-accumulate": (lambda x: x.put(torch.tensor([1, 1]), x[0, :2], accumulate=True), (2, 3)),
    "masked_scatter": (lambda x: x.masked_scatter(MASK[:, None], x.flip(0)), (4, 2)),
    "embedding": (lambda x: F.embedding(AT_6, x), (4, 2)),
    "embedding-padding": (lambda x: F.embedding(torch.tensor([1, 1, 3]), x, padding_idx=1), (4, 2)),
    "embedding-frequency": (
        lambda x: F.embedding(torch.tensor([1, 1, 3]), x, scale_grad_by_freq=True),
        (4, 2),
    ),
}


def test_every_entry_of_a_movement_is_known() -> None:
    """Nothing about a movement waits for the numbers."""
    for table in (MOVES, INDEX):
        for name, (f, shape) in table.items():
            assert known(pattern_of(f, floats(*shape))), name


@pytest.mark.parametrize("name", MOVES)
def test_moves(name: str) -> None:
    f, shape = MOVES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # view copies speak of being experimental
        check(f, floats(*shape))


@pytest.mark.parametrize("name", INDEX)
def test_indices_that_are_known(name: str) -> None:
    f, shape = INDEX[name]
    check(f, floats(*shape))


# Its second derivative asks for the unique indices of a diagonal, a shape that depends on values.
REFUSED = {"trace"}


@pytest.mark.parametrize("name", [n for n in (*MOVES, *INDEX) if n not in REFUSED])
def test_second_derivatives(name: str) -> None:
    """The forward operations stand in the linear part, too: gradients of x'Ax-like sums."""
    f, shape = (MOVES | INDEX)[name]

    def gradient(x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        y = f(x)
        outs = list(y) if isinstance(y, (list, tuple)) else [y]
        cubes = sum((o**3).sum() for o in outs)
        (g,) = torch.autograd.grad(cubes, x, create_graph=True)
        return g

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(gradient, floats(*shape) + 3, exact=True)


def sorted_by_data(x: Tensor) -> Tensor:
    return x.sort(1).values


# Indices that depend on the input: all-to-all along their axis, lanes elsewhere.
BY_DATA: dict[str, tuple[Callable[[Tensor], Any], tuple[int, ...]]] = {
    "sort": (sorted_by_data, (2, 3)),
    "topk": (lambda x: x.topk(2, 0).values, (3, 2)),
    "max": (lambda x: x.max(1).values, (2, 3)),
    "min": (lambda x: x.min(0).values, (3, 2)),
    "median": (lambda x: x.median(1).values, (2, 3)),
    "kthvalue": (lambda x: x.kthvalue(2, 0).values, (3, 2)),
    "mode": (lambda x: x.mode(1).values, (2, 3)),
    "gather": (lambda x: x.gather(1, x.argsort(1)), (2, 3)),
    "gather-few": (lambda x: x.gather(0, x[:2, :1].argsort(0) + 1), (3, 2)),
    "take_along_dim": (lambda x: x.take_along_dim(x.argmax(1, keepdim=True), 1), (2, 3)),
    "index": (lambda x: x[x[:, 0].argsort()], (3, 2)),
    "index-mixed": (lambda x: x[torch.arange(2), x.argmax(1)], (2, 3)),
    "index-mixed-outer": (lambda x: x[torch.arange(2)[:, None], x.argsort(1)[:, :2]], (2, 3)),
    "index_select": (lambda x: x.index_select(1, x[0].argsort()), (2, 3)),
    "scatter": (lambda x: torch.zeros_like(x).scatter(1, x.argsort(1), x), (2, 3)),
    "scatter_add": (lambda x: torch.zeros_like(x).scatter_add(1, x.argsort(1), x), (2, 3)),
    "index_add": (lambda x: torch.zeros_like(x).index_add(0, x[:, 0].argsort(), x), (3, 2)),
    "index_copy": (lambda x: torch.zeros_like(x).index_copy(0, x[:, 0].argsort(), x), (3, 2)),
    "index_put": (lambda x: torch.zeros_like(x).index_put((x[:, 0].argsort(),), x), (3, 2)),
    "index_put-mixed": (
        lambda x: torch.zeros_like(x).index_put((torch.arange(2), x.argmax(1)), x[:, 0]),
        (2, 3),
    ),
    "masked_scatter": (lambda x: torch.zeros_like(x).masked_scatter(x > 0, x), (4,)),
}


@pytest.mark.parametrize("name", BY_DATA)
def test_indices_that_depend_on_the_input(name: str) -> None:
    """Sound at many points; lanes stay apart; the pattern of an evaluation is exact."""
    f, shape = BY_DATA[name]
    x = floats(*shape)
    check(f, x, exact=False, points=5)
    _, interpretation = interpreted(f, x)
    assert not interpretation.assumed
    local = pattern_of(f, x, scope="local")
    numbers = torch.autograd.functional.jacobian(f, x).reshape(local.shape).numpy()
    assert ((local != 0) == (numbers != 0)).all()


@pytest.mark.parametrize(
    ("f", "lanes"),
    [
        (sorted_by_data, lambda i, j: i // 3 == j // 3),
        (lambda x: x.max(1).values, lambda i, j: i == j // 3),
        (lambda x: x[torch.arange(2), x.argmax(1)], lambda i, j: i == j // 3),
        (lambda x: x[x[:, 0].argsort()], lambda i, j: i % 3 == j % 3),
        (BY_DATA["scatter"][0], lambda i, j: i // 3 == j // 3),
        (BY_DATA["index_put-mixed"][0], lambda i, j: (i // 3 == j // 3) & (j % 3 == 0)),
        (lambda x: F.embedding(x[:, 0].argsort(), x), lambda i, j: i % 3 == j % 3),
    ],
)
def test_lanes_next_to_indices_of_data(
    f: Callable[[Tensor], Tensor], lanes: Callable[[Any, Any], Any]
) -> None:
    """All-to-all along the axis, and nothing else."""
    pattern = pattern_of(f, floats(2, 3))
    expected = np.fromfunction(lanes, pattern.shape)
    assert ((pattern != 0) == expected).all()


# Run as the backward of a function of the user: forward operations on the cotangent.
ON_COTANGENT: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "scatter": (lambda u: torch.scatter(2 * u, 1, torch.tensor([[1, 0], [2, 1]]), u), (2, 3)),
    "scatter-few": (lambda u: torch.scatter(u, 0, torch.tensor([[2, 0]]), u.flip(0)), (3, 4)),
    "scatter-scalar": (lambda u: torch.scatter(u, 0, torch.tensor(0), 3 * u), ()),
    "scatter_add-few": (lambda u: u.scatter_add(1, AT_6, u.flip(0)), (3, 4)),
    "scatter_add-inner": (lambda u: u.scatter_add(1, AT_3.expand(2, 2, 2), u), (2, 3, 2)),
    "scatter_reduce": (lambda u: u.scatter_reduce(0, AT_5, u.flip(0), "sum"), (3, 2)),
    "index_put-mask": (lambda u: u.index_put((MASK,), u[0]), (4, 2)),
    "index_put-masks": (lambda u: u.index_put((MASK[:, None].expand(4, 2),), u[0, 0]), (4, 2)),
    "index_put-none": (lambda u: aten.index_put(u, [None, ROWS[:2]], u[:, :1]), (2, 3)),
    "unfold_backward": (lambda u: aten.unfold_backward(u, [2, 7], 1, 3, 2), (2, 3, 3)),
    "diagonal_backward": (lambda u: aten.diagonal_backward(u, [3, 4], 1, 0, 1), (3,)),
    "select_backward": (lambda u: aten.select_backward(u, [2, 3], 1, -1), (2,)),
    "slice_backward": (lambda u: aten.slice_backward(u, [6, 2], 0, 1, 6, 2), (3, 2)),
    "masked_scatter_backward": (
        lambda u: aten.masked_scatter_backward(u, MASK[:, None].expand(4, 2), [2, 4]),
        (4, 2),
    ),
    "put-accumulate": (lambda u: u.put(torch.tensor([1, 1]), u[0, :2], True), (2, 3)),
    "index_fill-twice": (lambda u: u[1:].index_fill(0, torch.tensor([1, 1]), u[0]), (4,)),
    "embedding_dense_backward": (
        lambda u: aten.embedding_dense_backward(u, torch.tensor([[3, 0], [3, 1]]), 5, 1, True),
        (2, 2, 3),
    ),
    "masked_index": (
        lambda u: aten._unsafe_masked_index(u, MASK[:3, None], [torch.tensor([2, 9, 1])], 0),
        (3, 2),
    ),
    "masked_index_put": (
        lambda u: aten._unsafe_masked_index_put_accumulate(
            0 * u, MASK[:3], [torch.tensor([2, 9, 2])], u
        ),
        (3,),
    ),
    "lerp": (lambda u: torch.lerp(u, u.flip(0), 0.25), (4,)),
    "add-alpha": (lambda u: torch.sub(u[:1], u, alpha=3), (3, 2)),
    "rsub": (lambda u: torch.rsub(u, u.flip(0), alpha=2), (3,)),
    "copy": (lambda u: aten.copy(u, u[:1]), (3, 2)),
    "as_strided_scatter": (
        lambda u: torch.as_strided_scatter(u.t(), u[:, 0], (2,), (4,), 1),
        (2, 4),
    ),
}


def backwards(g: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Any:
    """A function whose backward pass is `g`, and an argument for it."""

    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.new_zeros(shape)

        @staticmethod
        def backward(ctx: Any, u: Tensor) -> Tensor:
            return g(u)

    return Custom.apply, torch.zeros_like(g(floats(*shape)))


@pytest.mark.parametrize("name", ON_COTANGENT)
def test_operations_on_the_cotangent(name: str) -> None:
    g, shape = ON_COTANGENT[name]
    f, x = backwards(g, shape)
    assert known(check(f, x))


@pytest.mark.parametrize("name", [*MOVES, *INDEX])
def test_movements_of_the_cotangent(name: str) -> None:
    """The forward operations, on the cotangent; constants that are written make it affine."""
    g, shape = (MOVES | INDEX)[name]
    if name in ("pad-ones", "write-scalar", "hstack-constant", "index_put-constant") or (
        "value" in name or name == "index_fill"
    ):
        f, x = backwards(lambda u: first(g(u)), shape)
        _, interpretation = interpreted(f, x)
        assert "cotangent" in interpretation.assumed[0]
        return
    f, x = backwards(lambda u: first(g(u)), shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert known(check(f, x))


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, (list, tuple)) else result


@pytest.mark.parametrize(
    "g",
    [
        lambda u: u.new_zeros(3).index_put((torch.tensor([1, 1, 0]),), u),
        lambda u: u.new_zeros(3).index_copy(0, torch.tensor([1, 1, 0]), u),
        lambda u: u.new_zeros(3).scatter(0, torch.tensor([1, 1, 0]), u),
        lambda u: u.new_zeros(3).put(torch.tensor([1, 1, 0]), u),
    ],
)
def test_several_values_for_one_place(g: Callable[[Tensor], Tensor]) -> None:
    """Which value stays is not promised, so each of them may; one that is alone is known."""
    f, x = backwards(g, (3,))
    check(f, x, exact=False)
    expected = np.array([[0, np.nan, 0], [0, np.nan, 0], [1, 0, 0]])
    np.testing.assert_array_equal(pattern_of(f, x), expected)


def test_memory_that_belongs_to_another_tensor() -> None:
    """A window on memory beyond the tensor: nothing is known, and it is said."""

    def f(x: Tensor) -> Tensor:
        return (2 * x)[2:4].as_strided((4,), (1,), 0)

    check(f, floats(6), exact=False)


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.flip(0),
        lambda x: x.roll(1, 0),
        lambda x: x.gather(0, torch.zeros(1, 3, dtype=torch.int64)[: len(x)]),
        lambda x: x.index_select(0, torch.zeros(2, dtype=torch.int64)[: 2 * len(x)]),
        lambda x: x.index_add(0, torch.zeros(2, dtype=torch.int64)[: len(x)], x),
        lambda x: x.scatter_add(0, torch.zeros(1, 3, dtype=torch.int64)[: len(x)], x),
        lambda x: x.sort(0).values,
        lambda x: F.pad(x, (1, 1)),
        lambda x: x.unfold(1, 2, 1),
        lambda x: x.tril(),
    ],
)
def test_small_sizes(f: Callable[[Tensor], Tensor], size: int) -> None:
    check(f, floats(size, 3))


def test_complex_elements_are_one_element() -> None:
    """Parts of a complex tensor depend on what the complex element depends on."""

    def f(x: Tensor) -> Tensor:
        z = torch.view_as_complex(x.reshape(-1, 2).contiguous())
        return torch.view_as_real(z.flip(0) * (1 + 2j))

    check(f, floats(6))
    check(lambda x: torch.complex(x, x.flip(0)).abs(), floats(5))
    check(lambda x: (torch.complex(x, x) * (2 - 1j)).imag, floats(4), exact=False)


def test_a_batch_that_only_repeats_costs_no_memory() -> None:
    """Index maps keep strides of 0."""
    weight = floats(1, 6)

    def f(x: Tensor) -> Tensor:
        rows = x.sum(0, keepdim=True).expand(100_000, 6)
        return (rows[:, ROWS] * weight[:, :3]).sum(0)

    _, interpretation = interpreted(f, floats(2, 6))
    assert not interpretation.assumed
    check(lambda x: x.sum(0).expand(50, 6)[:, ROWS].sum(0), floats(2, 6))
