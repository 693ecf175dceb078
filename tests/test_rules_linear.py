"""Rules of scale, reduce, contract, linear algebra, transforms and opaque kernels.

Each rule is tested twice: on the operation itself, as the backward of a custom function (so that
the operation acts on the cotangent and on nothing else), and on functions whose derivatives
PyTorch writes with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx
from torch import nn as nn
from torch.nn import functional as F

from laws import value
from patterns import check, interpreted, numeric, pattern_of
from torchjac.linear.known_values import KnownValues
from torchjac.linear.rules import NoRule, Op, local_of

aten = torch.ops.aten


def backward_is(operation: Callable[..., Tensor], *shape: int) -> Callable[..., Tensor]:
    """A function whose backward is an operation on the cotangent, which has this shape."""

    class Applied(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, *constants: Tensor) -> Tensor:
            ctx.save_for_backward(*constants)
            return x.new_zeros(shape)

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Any:
            constants = ctx.saved_tensors
            return operation(cotangent, *constants), *(None for _ in constants)

    return Applied.apply


def check_operation(
    operation: Callable[..., Tensor], shape: tuple[int, ...], *constants: Tensor
) -> np.ndarray:
    """Checks the rule of an operation that is linear in its first argument: sound and exact."""
    out = operation(value(*shape), *constants)
    return check(backward_is(operation, *shape), value(*out.shape), *constants, points=24)


def lanes(pattern: np.ndarray, out: tuple[int, ...], axes: tuple[int, ...]) -> np.ndarray:
    """A pattern between tensors of one shape, as (lanes, lanes, entries between them)."""
    rank = len(out)
    rest = [a for a in range(rank) if a not in axes]
    order = [*axes, *(a + rank for a in axes), *rest, *(a + rank for a in rest)]
    many = int(np.prod([out[a] for a in axes]))
    return (pattern != 0).reshape(*out, *out).transpose(order).reshape(many, many, -1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(11)  # the other points are drawn at random


MASK = torch.tensor([[True, False, True], [False, False, True]])
SPARSE = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 0], [3, 0, 4]], dtype=torch.float64)
A, B = value(4, 3, seed=1), value(2, 4, 3, seed=2)
SQUARE = value(3, 3, seed=3) + 3 * torch.eye(3, dtype=torch.float64)
SQUARES = value(2, 3, 3, seed=4) + 3 * torch.eye(3, dtype=torch.float64)

SCALE: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[Tensor, ...]]] = {
    "mul": (lambda g, w: g * w, (2, 3), (value(2, 3),)),
    "mul, broadcast": (lambda g, w: g * w, (1, 3), (value(2, 1),)),
    "mul by zeros": (lambda g: SPARSE * g, (3,), ()),
    "mul by a number": (lambda g: 2.5 * g, (2, 3), ()),
    "mul, empty": (lambda g, w: g * w, (0, 3), (value(3),)),
    "mul, scalar": (lambda g, w: g * w, (), (value(),)),
    "div": (lambda g, w: g / w, (2, 3), (value(3),)),
    "div by a number": (lambda g: g / 4, (2, 3), ()),
    "div by three": (lambda g: g / 3, (2, 3), ()),
    "neg": (lambda g: -g, (2, 3), ()),
    "where, known": (lambda g: torch.where(MASK, g, 0.0), (2, 3), ()),
    "where, not known": (lambda g, w: torch.where(w > 0, g, 0.0), (2, 3), (value(2, 3),)),
    "where, both": (lambda g: torch.where(MASK, g, g.flip(0)), (2, 3), ()),
    "masked_fill": (lambda g: g.masked_fill(MASK, 0), (2, 3), ()),
    "addcmul": (lambda g, a, b: torch.addcmul(g, a * g, b, value=2), (3,), (value(3), value(3))),
    "addcdiv": (lambda g, a: torch.addcdiv(g, g, a, value=-1), (3,), (value(3),)),
    "addcmul, known": (lambda g: torch.addcmul(torch.zeros(3), g, SPARSE[3]), (3,), ()),
    "xlogy": (lambda g, w: torch.special.xlogy(g, w * w), (2, 3), (value(3),)),
    "xlog1py": (lambda g, w: torch.special.xlog1py(g, w * w), (2, 3), (value(3),)),
    "tanh": (lambda g, w: aten.tanh_backward(g, w), (2, 3), (value(2, 3),)),
    "sigmoid": (lambda g, w: aten.sigmoid_backward(g, w), (2, 3), (value(2, 3),)),
    "gelu": (lambda g, w: aten.gelu_backward(g, w), (2, 3), (value(2, 3),)),
    "hardshrink": (lambda g, w: aten.hardshrink_backward(g, w, 0.1), (2, 3), (value(2, 3),)),
    "threshold, known": (
        lambda g: aten.threshold_backward(g, SPARSE, 0),
        (4, 3),
        (),
    ),
    "conj": (lambda g: torch.conj_physical(g), (2, 3), ()),
    "fill": (lambda g: torch.fill(torch.zeros(3, dtype=torch.float64), g), (), ()),
}
REDUCE: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[Tensor, ...]]] = {
    "sum": (lambda g: g.sum(), (2, 3), ()),
    "sum, axes": (lambda g: g.sum((0, -1)), (2, 3, 4), ()),
    "sum, kept": (lambda g: g.sum(1, keepdim=True), (2, 3), ()),
    "sum, empty": (lambda g: g.sum(1), (2, 0), ()),
    "sum, scalar": (lambda g: g.sum(), (), ()),
    "mean": (lambda g: g.mean(), (2, 3), ()),
    "mean, axis": (lambda g: g.mean(-1, keepdim=True), (2, 3), ()),
    "cumsum": (lambda g: g.cumsum(1), (2, 4), ()),
    "cumsum, first axis": (lambda g: g.cumsum(0), (3, 2), ()),
    "cumsum, reversed": (lambda g: g.flip(0).cumsum(0).flip(0), (4,), ()),
    "cumsum, one": (lambda g: g.cumsum(0), (1,), ()),
    "cumsum, empty": (lambda g: g.cumsum(0), (0, 2), ()),
    "cumsum, scalar": (lambda g: g.cumsum(0), (), ()),
    "diff of cumsum": (lambda g: g.cumsum(0).diff(), (5,), ()),
    "sum cancels": (lambda g: g + g.sum() - g.sum(), (5,), ()),
    "nansum": (lambda g: torch.nansum(g, 1), (2, 3), ()),
}
CONTRACT: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[Tensor, ...]]] = {
    "mm": (lambda g, a: g @ a, (2, 4), (A,)),
    "mm, from the left": (lambda g, a: a @ g, (3, 2), (A,)),
    "mm, zeros": (lambda g: g @ SPARSE, (2, 4), ()),
    "mm, diagonal": (lambda g, d: torch.diag(d) @ g, (3, 2), (value(3),)),
    "mm, empty": (lambda g, a: g @ a[:, :0], (2, 4), (A,)),
    "mm, nothing to sum": (lambda g, a: g @ a[:0], (2, 0), (A,)),
    "bmm": (lambda g, b: torch.bmm(g, b), (2, 5, 4), (B,)),
    "bmm, from the left": (lambda g, b: torch.bmm(b, g), (2, 3, 5), (B,)),
    "matmul, broadcast": (lambda g, b: torch.matmul(g, b), (5, 4), (B,)),
    "mv": (lambda g, a: a @ g, (3,), (A,)),
    "mv, of a matrix": (lambda g, v: g @ v, (3, 4), (value(4),)),
    "dot": (lambda g, v: g.dot(v), (4,), (value(4),)),
    "vdot": (lambda g, v: torch.vdot(g, v), (4,), (value(4),)),
    "outer": (lambda g, v: torch.outer(g, v), (4,), (value(3),)),
    "addmm": (lambda g, a: torch.addmm(g[:, :3], g, a, beta=2, alpha=3), (2, 4), (A,)),
    "addmm, added": (lambda g: torch.addmm(g, SPARSE * 0, torch.eye(3).double()), (4, 3), ()),
    "addmm, broadcast": (lambda g, a: torch.addmm(g[0, :3], g, a), (2, 4), (A,)),
    "addmv": (lambda g, a: torch.addmv(g[:1], a, g, alpha=2), (3,), (A,)),
    "addr": (lambda g, v: torch.addr(torch.diag(g), g, v, beta=3), (3,), (value(3),)),
    "baddbmm": (lambda g, b: torch.baddbmm(g[..., :3], g, b, beta=2), (2, 5, 4), (B,)),
    "addbmm": (lambda g, b: torch.addbmm(g[0, :, :3], g, b, beta=2), (2, 5, 4), (B,)),
    "einsum": (lambda g, b: torch.einsum("ij,kjl->ilk", g, b), (5, 4), (B,)),
    "einsum, trace": (lambda g, a: torch.einsum("ij,ij->", g, a), (4, 3), (A,)),
    "bilinear": (lambda g, b, x: F.bilinear(g, x, b), (5, 4), (B, value(5, 3))),
    "bilinear, weight": (
        lambda g, x, y: F.bilinear(x, y, g),
        (2, 4, 3),
        (value(5, 4), value(5, 3)),
    ),
    "cross": (lambda g, v: torch.linalg.cross(g, v), (2, 3), (value(2, 3),)),
    "cross, from the left": (lambda g, v: torch.linalg.cross(v, g), (2, 3), (value(1, 3),)),
    "cross, known": (lambda g: torch.linalg.cross(g, SPARSE[:1].expand(2, 3)), (2, 3), ()),
    "linear": (lambda g, a, c: F.linear(g, a) + 0 * c.sum() * g[..., :1], (2, 5, 3), (A, A)),
}


@pytest.mark.parametrize("name", SCALE)
def test_scale_is_exact(name: str) -> None:
    operation, shape, constants = SCALE[name]
    check_operation(operation, shape, *constants)


@pytest.mark.parametrize("name", REDUCE)
def test_reduce_is_exact(name: str) -> None:
    operation, shape, constants = REDUCE[name]
    check_operation(operation, shape, *constants)


@pytest.mark.parametrize("name", CONTRACT)
def test_contract_is_exact(name: str) -> None:
    operation, shape, constants = CONTRACT[name]
    check_operation(operation, shape, *constants)


def test_constants_keep_their_numbers() -> None:
    """What does not depend on the input is known, to the last bit."""
    cases: list[tuple[Callable[[Tensor], Tensor], np.ndarray]] = [
        (lambda x: SPARSE @ x, SPARSE.numpy()),
        (lambda x: x.cumsum(0), np.tril(np.ones((3, 3)))),
        (lambda x: x / 4 - x.sum() * 2, np.eye(3) / 4 - 2),
        (lambda x: torch.linalg.cross(x, SPARSE[3]), [[0, 4, 0], [-4, 0, 3], [0, -3, 0]]),
    ]
    for function, expected in cases:
        np.testing.assert_array_equal(pattern_of(function, value(3)), np.asarray(expected))


@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_triangular_solves_are_triangular(upper: bool, left: bool, batch: tuple[int, ...]) -> None:
    """Exact: the inverse of a triangular matrix is triangular, right-hand sides are lanes."""
    shape = (*batch, 3, 2) if left else (*batch, 2, 3)
    matrix = SQUARES if batch else SQUARE

    def solve(g: Tensor, a: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(a, g, upper=upper, left=left)

    check_operation(solve, shape, matrix)


@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
def test_old_triangular_solve(upper: bool, transpose: bool) -> None:
    def solve(g: Tensor, a: Tensor) -> Tensor:
        return torch.triangular_solve(g, a, upper, transpose)[0]

    check_operation(solve, (2, 3, 2), SQUARES)


SOLVES: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[Tensor, ...]]] = {
    "solve": (lambda g, a: torch.linalg.solve(a, g), (2, 3, 4), (SQUARES,)),
    "solve, from the right": (
        lambda g, a: torch.linalg.solve(a, g, left=False),
        (2, 4, 3),
        (SQUARES,),
    ),
    "solve, vectors": (lambda g, a: torch.linalg.solve(a, g), (2, 3), (SQUARES,)),
    "solve, vector": (lambda g, a: torch.linalg.solve(a, g), (3,), (SQUARE,)),
    "solve, broadcast": (lambda g, a: torch.linalg.solve(a, g), (3, 4), (SQUARES,)),
    "lu_solve": (
        lambda g, a: torch.linalg.lu_solve(*torch.linalg.lu_factor(a), g),
        (2, 3, 4),
        (SQUARES,),
    ),
    "lu_solve, from the right": (
        lambda g, a: torch.linalg.lu_solve(*torch.linalg.lu_factor(a), g, left=False),
        (2, 4, 3),
        (SQUARES,),
    ),
    "cholesky_solve": (lambda g, a: torch.cholesky_solve(g, a), (2, 3, 4), (SQUARES,)),
    "ormqr": (lambda g, a: torch.ormqr(a, a[..., 0], g), (2, 3, 4), (SQUARES,)),
}


@pytest.mark.parametrize("name", SOLVES)
def test_solves_are_dense_within_a_matrix(name: str) -> None:
    """Exact: batches and right-hand sides are lanes."""
    operation, shape, constants = SOLVES[name]
    check_operation(operation, shape, *constants)


FACTORIZATIONS: dict[str, Callable[[Tensor], Any]] = {
    "inv": torch.linalg.inv,
    "cholesky": lambda x: torch.linalg.cholesky(x @ x.mT + torch.eye(3, dtype=x.dtype)),
    "qr": lambda x: list(torch.linalg.qr(x)),
    "eigh": lambda x: torch.linalg.eigh(x + x.mT)[0],
    "svd": lambda x: torch.linalg.svdvals(x),
    "lu": lambda x: list(torch.linalg.lu(x))[1:],
    "det": torch.linalg.det,
    "slogdet": lambda x: torch.linalg.slogdet(x)[1],
    "matrix_power": lambda x: torch.linalg.matrix_power(x, 3),
    "pinv": torch.linalg.pinv,
    "solve": lambda x: torch.linalg.solve(x, torch.ones(3, 1, dtype=x.dtype)),
}


@pytest.mark.parametrize("name", FACTORIZATIONS)
def test_factorizations_keep_batches_apart(name: str) -> None:
    """Sound, and exact across the batch."""
    pattern = check(FACTORIZATIONS[name], SQUARES, exact=False)
    interpretation = interpreted(FACTORIZATIONS[name], SQUARES)[1]
    assert not interpretation.assumed
    outputs = FACTORIZATIONS[name](SQUARES)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    sample_of_row = np.concatenate([np.repeat(np.arange(2), out.numel() // 2) for out in outputs])
    sample_of_column = np.repeat(np.arange(2), 9)
    assert not (pattern != 0)[sample_of_row[:, None] != sample_of_column[None, :]].any()


@pytest.mark.parametrize("axes", [(0,), (1,), (1, 2), (-1,)])
def test_transforms_are_dense_along_their_axes(axes: tuple[int, ...]) -> None:
    """All to all along the axes of a transform, nothing across the others."""
    shape = (2, 3, 4)
    pattern = check(lambda x: torch.fft.fftn(x, dim=axes).real, value(*shape), exact=False)
    lane_axes = tuple(a for a in range(3) if a not in {b % 3 for b in axes})
    table = lanes(pattern, shape, lane_axes)
    for i in range(table.shape[0]):
        for j in range(table.shape[1]):
            assert table[i, j].all() == (i == j)
            assert table[i, j].any() == (i == j)


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "rfft": lambda x: torch.fft.rfft(x).real,
    "irfft": lambda x: torch.fft.irfft(torch.complex(x, x)),
    "hfft": lambda x: torch.fft.hfft(x),
    "ihfft": lambda x: torch.fft.ihfft(x).imag,
    "round trip": lambda x: torch.fft.ifft(torch.fft.fft(x).exp()).real,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_keep_lanes(name: str) -> None:
    pattern = check(TRANSFORMS[name], value(2, 5), exact=False) != 0
    assert not interpreted(TRANSFORMS[name], value(2, 5))[1].assumed
    half = pattern.shape[0] // 2
    assert not pattern[:half, 5:].any()
    assert not pattern[half:, :5].any()


def attention(x: Tensor) -> Tensor:
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(x, 2 * x, x.flip(-1))


OPAQUE: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], bool]] = {
    "cdist": (lambda x, y: torch.cdist(x, y), (value(2, 4, 3), value(2, 5, 3, seed=1)), True),
    "pdist": (lambda x: F.pdist(x), (value(4, 3),), True),
    "attention": (attention, (value(2, 3, 4, 5),), True),
    "grid_sample": (
        lambda x, grid: F.grid_sample(x, grid.tanh(), align_corners=False),
        (value(2, 3, 4, 5), value(2, 3, 2, 2)),
        False,
    ),
    "embedding_bag": (
        lambda w: F.embedding_bag(torch.tensor([0, 2, 2, 4]), w, torch.tensor([0, 3])),
        (value(5, 3),),
        True,
    ),
    "embedding_bag, of weights": (
        lambda w: F.embedding_bag(
            torch.tensor([[0, 2], [1, 1]]),
            torch.ones(3, 2, dtype=torch.float64),
            per_sample_weights=w,
            mode="sum",
        ),
        (value(2, 2),),
        True,
    ),
    "segment_reduce": (
        lambda x: torch.segment_reduce(x, "mean", lengths=torch.tensor([2, 1, 3])),
        (value(6, 2),),
        True,
    ),
    "multi_margin_loss": (
        lambda x: F.multi_margin_loss(x, torch.tensor([0, 2, 1]), reduction="none", margin=9.0),
        (value(3, 4),),
        True,
    ),
    "masked softmax": (lambda x: torch.softmax(x, 1), (value(2, 4, 3),), True),
    "ctc_loss": (
        lambda x: F.ctc_loss(
            x.log_softmax(-1),
            torch.tensor([[1, 2], [2, 1]]),
            torch.tensor([5, 5]),
            torch.tensor([2, 2]),
            reduction="none",
        ),
        (value(5, 2, 3),),
        False,
    ),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_opaque_kernels(name: str) -> None:
    """Sound; exact across lanes."""
    function, arguments, exact = OPAQUE[name]
    if name == "ctc_loss":  # it reads its lengths: only its graph can be looked at
        pattern = pattern_of(function, *arguments, scope="local")
        assert ((pattern != 0) == (numeric(function, *arguments) != 0)).all()
        return
    check(function, *arguments, argnums=tuple(range(len(arguments))), exact=exact)


class TestNoRule:
    """The reason is a field: nobody has to read the message."""

    @staticmethod
    def op(target: Any, *args: Any) -> Op:
        graph = fx.Graph()
        node = graph.call_function(target, tuple(args))
        return Op(node, set(), KnownValues.__new__(KnownValues))

    def test_no_operation(self) -> None:
        with pytest.raises(NoRule) as caught:
            local_of(self.op(aten.bincount.default, None))
        assert (caught.value.lack, caught.value.operation) == ("operation", "aten::bincount")

    def test_no_case(self) -> None:
        with pytest.raises(NoRule, match="not a sum") as caught:
            local_of(self.op(aten.scatter.reduce, None, 0, None, None, "multiply"))
        assert (caught.value.lack, caught.value.operation) == ("case", "aten::scatter")

    def test_an_argument_that_this_version_lacks(self) -> None:
        with pytest.raises(NoRule, match="which this torch has not") as caught:
            self.op(aten.sin.default, None)["exponent"]
        assert (caught.value.lack, caught.value.operation) == ("version", "aten::sin")
