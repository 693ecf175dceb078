"""Reduce: sums and running sums along axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchjac._torch.operators import aten
from torchjac.linear.maps import (
    UNKNOWN,
    LinearMap,
    Shape,
    axis_sum,
    broadcast,
    dense,
    diagonal,
    product,
    reshape,
)
from torchjac.linear.rules.registry import Local, Op, rule


def summed(op: Op, factor: float = 1.0) -> LinearMap:
    """The sum over `dim` (all axes if it is None or empty), times a factor."""
    shape = op.only("self").shape
    dim: Sequence[int] | int | None = op.arguments.get("dim")
    axes = [dim] if isinstance(dim, int) else list(dim or range(len(shape)))
    total = axis_sum(shape, axes)
    return product(diagonal(op.shape, factor), reshape(op.shape, total.shape_out), total)


@rule(aten.sum.default, aten.sum.dim_IntList)
def sum_(op: Op) -> Local:
    """Sum over axes."""
    return [(op.only("self"), summed(op))]


@rule(aten.mean.default, aten.mean.dim)
def mean(op: Op) -> Local:
    """Mean over axes."""
    operand = op.only("self")
    count = math.prod(operand.shape) // max(math.prod(op.shape), 1)
    return [(operand, summed(op, 1 / count if count else math.nan))]


@rule(aten.cumsum.default)
def cumsum(op: Op) -> Local:
    """Running sum along an axis: a lower triangular matrix of ones."""
    operand, axis = op.only("self"), op["dim"]
    shape = operand.shape
    if not shape:
        return [(operand, reshape(op.shape, shape))]
    size = shape[axis]
    map_ = dense_with_mask(
        shape, axis, size, lambda: torch.ones(size, size, dtype=torch.float64).tril()
    )
    return [(operand, map_)]


# Pairs along an axis up to which a mask is materialized (4096 x 4096 factors take 128 MiB); a
# longer axis is dense.
_MAX_PAIRS = 2**24


def dense_with_mask(shape_in: Shape, axis: int, size: int, mask: Callable[[], Tensor]) -> LinearMap:
    """A matrix along one axis, equal in all lanes.

    Args:
        shape_in: Shape of the argument.
        axis: The axis.
        size: Size of the axis in the result.
        mask: Returns the factors, shape `(size, shape_in[axis])`.
    """
    axis %= len(shape_in)
    before, after = shape_in[:axis], shape_in[axis + 1 :]
    shape_out = (*before, size, *after)
    if size * shape_in[axis] > _MAX_PAIRS:
        return dense(shape_out, shape_in, [axis], [axis])
    pairs = (*before, size, shape_in[axis], *after)
    factors = mask().reshape(*[1] * axis, size, shape_in[axis], *[1] * len(after)).expand(pairs)
    apart = reshape((*before, 1, *shape_in[axis:]), shape_in)
    return product(
        axis_sum(pairs, [axis + 1]),
        diagonal(pairs, factors),
        broadcast(pairs, apart.shape_out),
        apart,
    )


@rule(aten.nansum.default)
def nansum(op: Op) -> Local:
    """The sum of all elements that are not NaN."""
    operand = op.only("self")
    return [(operand, product(summed(op), diagonal(operand.shape, UNKNOWN)))]
