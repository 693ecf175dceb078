"""Linear algebra: solves and products with factors; exact across batches and right-hand sides."""

from __future__ import annotations

import torch
from torch import Tensor

from torchjac._torch.operators import aten
from torchjac.linear.maps import (
    UNKNOWN,
    Factors,
    LinearMap,
    Shape,
    add,
    broadcast,
    dense,
    diagonal,
    index_map,
    product,
    times,
)
from torchjac.linear.maps.factors import map_axis, move_factors
from torchjac.linear.rules.reduce import dense_with_mask
from torchjac.linear.rules.registry import Local, NotLinear, Op, Operand, rule


def dense_solve(op: Op, operand: Operand, axis: int, shape: Shape) -> LinearMap:
    """Dense along one matrix axis of the right-hand side; all other axes are lanes."""
    return product(dense(shape, shape, [axis], [axis]), broadcast(shape, operand.shape))


def _right_hand_side(op: Op, name: str) -> Operand:
    operand: Operand = op.only(name)
    if not operand.linear:
        raise NotLinear
    return operand


@rule(aten.linalg_solve_triangular.default)
def solve_triangular(op: Op) -> Local:
    """A triangular solve: the inverse of a triangular matrix is triangular."""
    operand = _right_hand_side(op, "B")
    axis = -2 if op["left"] else -1
    # X A = B reads Aᵀ Xᵀ = Bᵀ: upper from the right is lower from the left.
    return [(operand, _triangular(op.shape, operand, axis, op["upper"] == op["left"]))]


@rule(aten.triangular_solve.default)
def triangular_solve(op: Op) -> tuple[Local, ...]:
    """The solution, and a copy of the coefficients, constant in the right-hand side."""
    operand = _right_hand_side(op, "self")
    return [(operand, _triangular(op.shape, operand, -2, op["upper"] != op["transpose"]))], []


def _triangular(shape: Shape, operand: Operand, axis: int, upper: bool) -> LinearMap:
    size = shape[axis]
    broadcast_map = broadcast(shape, operand.shape)

    def mask() -> torch.Tensor:
        ones = torch.full((size, size), UNKNOWN, dtype=torch.float64)
        return ones.triu() if upper else ones.tril()

    return product(dense_with_mask(shape, axis, size, mask), broadcast_map)


@rule(aten.linalg_lu_solve.default)
def lu_solve(op: Op) -> Local:
    """`A X = B` or `X A = B` by the factors of A."""
    operand = _right_hand_side(op, "B")
    return [(operand, dense_solve(op, operand, -2 if op["left"] else -1, op.shape))]


@rule(aten.lu_solve.default, aten.cholesky_solve.default)
def factor_solve(op: Op) -> Local:
    """`A X = B` by the factors of A."""
    operand = _right_hand_side(op, "self")
    return [(operand, dense_solve(op, operand, -2, op.shape))]


@rule(aten._linalg_solve_ex.default)
def solve(op: Op) -> tuple[Local, ...]:
    """`A X = B`; the factorization, which is a result too, does not depend on B."""
    operand = _right_hand_side(op, "B")
    matrices: Operand = op["A"]
    rank = len(matrices.shape)
    vectors = len(operand.shape) == 1 or (
        len(operand.shape) == rank - 1 and operand.shape == matrices.shape[:-1]
    )
    axis = -1 if vectors or not op["left"] else -2
    return [(operand, dense_solve(op, operand, axis, op.shape))], [], [], []


@rule(aten.ormqr.default)
def ormqr(op: Op) -> Local:
    """An orthogonal matrix, as a product of reflections, times a matrix."""
    operand = _right_hand_side(op, "input3")
    return [(operand, dense_solve(op, operand, -2 if op["left"] else -1, op.shape))]


@rule(aten.linalg_cross.default)
def cross(op: Op) -> Local:
    """`a x b` on an axis of size 3: each element depends on two elements of each operand."""
    if len(op.linear) > 1:
        raise NotLinear
    (operand,) = op.linear
    shape, axis = op.shape, op["dim"] % len(op.shape)
    other = op["other"] if operand is op["self"] else op["self"]
    sign = 1.0 if operand is op["self"] else -1.0
    factors = other.factors.expand(shape)

    def roll(t: Tensor, step: int) -> Tensor:
        return map_axis(lambda x: x.roll(-step, axis), t, axis)

    def rolled_factors(step: int) -> Factors:
        return move_factors(factors, lambda t: roll(t, step), shape)

    def roll_map(step: int) -> LinearMap:
        return index_map(lambda t: roll(t, step), shape, shape, False)

    return [
        (
            operand,
            product(
                add(
                    product(diagonal(shape, times(rolled_factors(2), sign)), roll_map(1)),
                    product(diagonal(shape, times(rolled_factors(1), -sign)), roll_map(2)),
                ),
                broadcast(shape, operand.shape),
            ),
        )
    ]
