"""Reduce: sums along axes, whole or running."""

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
    """Running sum along an axis: the sum over a pair axis, masked to what came before."""
    operand, axis = op.only("self"), op["dim"]
    shape = operand.shape
    if not shape:
        return [(operand, reshape(op.shape, shape))]
    size = shape[axis]
    map_ = along_pairs(
        shape, axis, size, lambda: torch.ones(size, size, dtype=torch.float64).tril()
    )
    return [(operand, map_)]


# A mask of all pairs along an axis is written out up to this size (4096 x 4096 factors are 128
# MiB); a longer axis is taken to be all to all.
_PAIRS = 2**24


def along_pairs(shape_in: Shape, axis: int, size: int, mask: Callable[[], Tensor]) -> LinearMap:
    """A matrix along one axis, the same in all lanes.

    Args:
        shape_in: Shape of the argument.
        axis: The axis.
        size: Its size in the result.
        mask: Gives the factors, `(size, shape_in[axis])`.
    """
    axis %= len(shape_in)
    before, after = shape_in[:axis], shape_in[axis + 1 :]
    shape_out = (*before, size, *after)
    if size * shape_in[axis] > _PAIRS:
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
    """The sum of what is a number."""
    operand = op.only("self")
    return [(operand, product(summed(op), diagonal(operand.shape, UNKNOWN)))]
