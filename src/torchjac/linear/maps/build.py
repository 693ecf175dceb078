"""Constructors of maps, in the terms of tensor operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchjac.linear.maps.factors import Factors, map_axis
from torchjac.linear.maps.kinds import (
    AxisSum,
    Dense,
    Diagonal,
    IndexMap,
    LinearMap,
    Scaled,
    Scatter,
    Zero,
)


def identity(shape: Sequence[int]) -> Scaled:
    """The identity on tensors of this shape."""
    return Scaled(tuple(shape), tuple(shape), 1.0)


def diagonal(shape: Sequence[int], factors: Factors) -> LinearMap:
    """A map that multiplies every element by its factor."""
    shape = tuple(shape)
    if isinstance(factors, float):
        return Zero(shape, shape) if factors == 0 else Scaled(shape, shape, factors)
    if isinstance(factors, Tensor):
        factors = factors.to(torch.float64)
    return Diagonal(shape, shape, factors.expand(shape))


def index_map(
    run: Callable[[Tensor], Tensor], shape_out: Sequence[int], shape_in: Sequence[int], fills: bool
) -> IndexMap:
    """A map that only moves elements.

    Args:
        run: The operation, on tensors of any dtype.
        shape_out: Shape of the result.
        shape_in: Shape of the argument.
        fills: Whether the operation may fill in zeros.
    """
    return IndexMap(tuple(shape_out), tuple(shape_in), run, fills)


def reshape(shape_out: Sequence[int], shape_in: Sequence[int]) -> LinearMap:
    """The same elements in another shape."""
    shape_out, shape_in = tuple(shape_out), tuple(shape_in)
    if shape_out == shape_in:
        return identity(shape_in)
    return IndexMap(shape_out, shape_in, lambda t: t.reshape(shape_out), False)


def broadcast(shape_out: Sequence[int], shape_in: Sequence[int]) -> LinearMap:
    """Elements repeated along new axes or axes of size 1, as torch broadcasts."""
    shape_out, shape_in = tuple(shape_out), tuple(shape_in)
    if shape_out == shape_in:
        return identity(shape_in)
    return IndexMap(shape_out, shape_in, lambda t: t.expand(shape_out), False)


def axis_sum(shape_in: Sequence[int], axes: Sequence[int]) -> LinearMap:
    """The sum along axes (negative numbers count from the end)."""
    shape_in = tuple(shape_in)
    summed = tuple(sorted({a % len(shape_in) for a in axes})) if shape_in else ()
    if not summed:
        return identity(shape_in)
    remaining = tuple(s for i, s in enumerate(shape_in) if i not in summed)
    return AxisSum(remaining, shape_in, summed)


def scatter(
    shape_out: Sequence[int], shape_in: Sequence[int], axis: int, index: Tensor
) -> LinearMap:
    """Slices of the argument added to slices of the result; an index map if no index repeats.

    Args:
        shape_out: Shape of the result.
        shape_in: Shape of the argument; sizes differ along the axis only.
        axis: The axis.
        index: Slice of the result for each slice of the argument, not negative.
    """
    shape_out, shape_in = tuple(shape_out), tuple(shape_in)
    axis %= len(shape_in)
    index = index.to(torch.int64)
    size, count = shape_out[axis], len(index)
    if count > size or (count and int(torch.bincount(index).max()) > 1):
        return Scatter(shape_out, shape_in, axis, index)
    if count < size:

        def place(t: Tensor) -> Tensor:
            sizes = list(t.shape)
            sizes[axis] = size
            return t.new_zeros(sizes).index_copy(axis, index, t)

        return index_map(lambda t: map_axis(place, t, axis), shape_out, shape_in, True)
    source = torch.empty_like(index)
    source[index] = torch.arange(count, dtype=index.dtype)
    if bool((source[1:] > source[:-1]).all()):
        return identity(shape_in)
    return gather(shape_in, axis, source)


def gather(shape_in: Sequence[int], axis: int, index: Tensor) -> IndexMap:
    """Slices of the argument along an axis, selected by `index`."""
    shape_in = tuple(shape_in)
    axis %= len(shape_in)
    shape_out = (*shape_in[:axis], len(index), *shape_in[axis + 1 :])

    def run(t: Tensor) -> Tensor:
        return map_axis(lambda x: x.index_select(axis, index), t, axis)

    return index_map(run, shape_out, shape_in, False)


def dense(
    shape_out: Sequence[int],
    shape_in: Sequence[int],
    axes_out: Sequence[int] | None = None,
    axes_in: Sequence[int] | None = None,
) -> LinearMap:
    """A dense block along axes (by default all of them), once for each lane."""
    shape_out, shape_in = tuple(shape_out), tuple(shape_in)
    outs = range(len(shape_out)) if axes_out is None else [a % len(shape_out) for a in axes_out]
    ins = range(len(shape_in)) if axes_in is None else [a % len(shape_in) for a in axes_in]
    lanes_out = [s for i, s in enumerate(shape_out) if i not in outs]
    lanes_in = [s for i, s in enumerate(shape_in) if i not in ins]
    assert lanes_out == lanes_in, f"lanes differ: {shape_out} {shape_in} {axes_out} {axes_in}"
    return Dense(shape_out, shape_in, tuple(sorted(outs)), tuple(sorted(ins)))
