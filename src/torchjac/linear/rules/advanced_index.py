"""Advanced indexing: `t[slots]` and `t.index_put(slots, values, accumulate=True)` as maps.

A slot stands for one axis of the indexed tensor: None (a full slice), a tensor (known indices), or
a shape (indices that depend on the input, so each may be any position on the axis). Axes are
permuted into the order known, unknown, whole. In that order a known index is a single gather or
scatter along one axis, an unknown index is a sum over its axis, and whole axes are lanes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchjac.linear.maps import (
    UNKNOWN,
    Factors,
    IndexMap,
    LinearMap,
    Shape,
    axis_sum,
    broadcast,
    diagonal,
    index_map,
    product,
    reshape,
    scatter,
)

Slot = Tensor | Shape | None


@dataclass(frozen=True, slots=True, eq=False)
class AdvancedIndex:
    """The slots of an indexed tensor, with its axes sorted.

    Attributes:
        shape: Shape of the indexed tensor.
        known_axes: Axes with known indices.
        unknown_axes: Axes with unknown indices.
        whole_axes: Axes without an index.
        flat_index: Known indices as positions on the flattened known axes.
        common_shape: Shape that all indices broadcast to.
        position: Number of whole axes before the axes of `common_shape` in `t[slots]`.
    """

    shape: Shape
    known_axes: list[int]
    unknown_axes: list[int]
    whole_axes: list[int]
    flat_index: Tensor
    common_shape: Shape
    position: int

    @property
    def result_shape(self) -> Shape:
        """Shape of `t[slots]`."""
        whole_sizes = self._sizes(self.whole_axes)
        return (*whole_sizes[: self.position], *self.common_shape, *whole_sizes[self.position :])

    @property
    def sorted_shape(self) -> Shape:
        """Shape in the order known (flattened to one axis), unknown, whole."""
        return (
            math.prod(self._sizes(self.known_axes)),
            *self._sizes(self.unknown_axes + self.whole_axes),
        )

    @property
    def aligned_shape(self) -> Shape:
        """Shape of the known indices, padded in front with ones to the rank of `common_shape`."""
        return (*[1] * (len(self.common_shape) - self.flat_index.ndim), *self.flat_index.shape)

    def _sizes(self, axes: list[int]) -> Shape:
        return tuple(self.shape[a] for a in axes)


def advanced_index(shape: Shape, slots: Sequence[Slot]) -> AdvancedIndex:
    """Sorts the axes of a tensor into known, unknown and whole ones."""
    slots = [*_masks_as_indices(slots)]
    slots += [None] * (len(shape) - len(slots))
    known = [i for i, s in enumerate(slots) if isinstance(s, Tensor)]
    unknown = [i for i, s in enumerate(slots) if isinstance(s, tuple)]
    whole = [i for i, s in enumerate(slots) if s is None]
    indexed = sorted(known + unknown)
    shapes = [tuple(s.shape) if isinstance(s, Tensor) else s for s in slots if s is not None]
    common = tuple(np.broadcast_shapes(*shapes))
    flat = torch.zeros((), dtype=torch.int64)
    for axis in known:
        index = slots[axis]
        assert isinstance(index, Tensor)
        flat = flat * shape[axis] + index.remainder(max(shape[axis], 1))
    adjacent = bool(indexed) and indexed == list(range(indexed[0], indexed[-1] + 1))
    return AdvancedIndex(shape, known, unknown, whole, flat, common, indexed[0] if adjacent else 0)


def _masks_as_indices(slots: Sequence[Slot]) -> list[Slot]:
    """The slots, with each mask replaced by the indices of its true elements."""
    indices: list[Slot] = []
    for slot in slots:
        if isinstance(slot, Tensor) and slot.dtype in (torch.bool, torch.uint8):
            indices += slot.nonzero().unbind(1)
        else:
            indices.append(slot.to(torch.int64) if isinstance(slot, Tensor) else slot)
    return indices


def gather_map(ix: AdvancedIndex) -> LinearMap:
    """`t[slots]` as a map of t."""
    order = ix.known_axes + ix.unknown_axes + ix.whole_axes
    sizes, narrow, common, at = ix.sorted_shape, ix.aligned_shape, ix.common_shape, ix.position
    index = ix.flat_index.reshape(-1)
    lanes = sizes[1:]
    spread = (*common, *lanes)

    def run(t: Tensor) -> Tensor:
        t = index_select(t.permute(order).reshape(sizes), 0, index)
        return unflatten_first(t, narrow).expand(spread)

    map_: LinearMap = index_map(run, spread, ix.shape, False)
    if ix.unknown_axes:
        first = len(common)
        axes = range(first, first + len(ix.unknown_axes))
        total = axis_sum(spread, axes)
        map_ = product(diagonal(total.shape_out, UNKNOWN), total, map_)
    return product(_front_axes_to_position(ix.result_shape, len(common), at), map_)


def scatter_map(ix: AdvancedIndex, values: Shape, *, replace: bool = False) -> LinearMap:
    """`index_put` as a map of the values, broadcast to the shape of `t[slots]`.

    Args:
        ix: The slots.
        values: Shape of the values.
        replace: Whether values are written, not added. Of several values for one element, which
            one stays is unknown.
    """
    count, value_shape, narrow = len(ix.common_shape), ix.result_shape, ix.aligned_shape
    whole = tuple(ix.shape[a] for a in ix.whole_axes)
    indexed = list(range(ix.position, ix.position + count))
    order = indexed + [i for i in range(len(value_shape)) if i not in indexed]
    index_first = (*ix.common_shape, *whole)
    steps: list[LinearMap] = [  # in order of application
        broadcast(value_shape, values),
        index_map(lambda t: t.permute(order), index_first, value_shape, False),
    ]
    repeated = [i for i in range(count) if narrow[i] == 1 and ix.common_shape[i] != 1]
    if repeated:  # indices repeat along an axis: its values add up
        total = axis_sum(index_first, repeated)
        steps += [total, reshape((*narrow, *whole), total.shape_out)]
    one_per_index = (ix.flat_index.numel(), *whole)
    factors = UNKNOWN if ix.unknown_axes or (replace and repeated) else 1.0
    steps += [
        reshape(one_per_index, (*narrow, *whole)),
        diagonal(
            one_per_index,
            _unique_factors(ix.flat_index.reshape(-1), one_per_index) if replace else 1.0,
        ),
        diagonal(one_per_index, factors),
    ]
    apart = (one_per_index[0], *[1] * len(ix.unknown_axes), *whole)
    spread = (one_per_index[0], *ix.sorted_shape[1:])
    steps.append(index_map(lambda t: t.reshape(apart).expand(spread), spread, one_per_index, False))
    if ix.known_axes:
        steps.append(scatter(ix.sorted_shape, spread, 0, ix.flat_index.reshape(-1)))
    return product(_unsort_axes(ix), *reversed(steps))


def untouched_factors(ix: AdvancedIndex) -> Factors:
    """Factor of each element of t in `index_put`: 0 if overwritten, 1 if not, NaN if unknown."""
    if 0 in ix.common_shape:
        return 1.0
    factors = torch.ones(ix.sorted_shape[0], dtype=torch.float64)
    factors[ix.flat_index.reshape(-1)] = UNKNOWN if ix.unknown_axes else 0.0
    factors = factors.reshape((-1, *[1] * (len(ix.sorted_shape) - 1))).expand(ix.sorted_shape)
    return _unsort_axes(ix).run(factors)


def index_select(t: Tensor, axis: int, index: Tensor) -> Tensor:
    """`torch.index_select` that preserves expanded axes (stride 0)."""
    shape = (*t.shape[:axis], len(index), *t.shape[axis + 1 :])
    for i in range(t.ndim):
        if t.shape[i] > 1 and t.stride(i) == 0:
            t = t.narrow(i, 0, 1)
            if i == axis:
                index = torch.zeros(min(1, len(index)), dtype=torch.int64)
    return t.index_select(axis, index).expand(shape)


def unflatten_first(t: Tensor, sizes: Shape) -> Tensor:
    """The tensor with its first axis unflattened; expanded axes (stride 0) are preserved."""
    return t.reshape((*sizes, *t.shape[1:]))


def _front_axes_to_position(shape: Shape, count: int, at: int) -> LinearMap:
    """The permutation of the indexed axes from the front to their position in `t[slots]`."""
    ndim = len(shape)
    order = [*range(count, count + at), *range(count), *range(count + at, ndim)]
    shape_in = (*shape[at : at + count], *shape[:at], *shape[at + count :])
    if order == list(range(ndim)):
        return reshape(shape, shape)
    return index_map(lambda t: t.permute(order), shape, shape_in, False)


def _unsort_axes(ix: AdvancedIndex) -> IndexMap:
    """The map from the sorted axes back to the axes of the tensor."""
    order = ix.known_axes + ix.unknown_axes + ix.whole_axes
    sizes = tuple(ix.shape[a] for a in order)
    inverse = [order.index(i) for i in range(len(order))]
    return index_map(lambda t: t.reshape(sizes).permute(inverse), ix.shape, ix.sorted_shape, False)


def _unique_factors(index: Tensor, shape: Shape) -> Factors:
    """1 for indices that occur once, NaN for repeated ones."""
    if index.numel() == 0:
        return 1.0
    repeated = torch.bincount(index)[index] > 1
    if not bool(repeated.any()):
        return 1.0
    factors = torch.where(repeated, UNKNOWN, 1.0).to(torch.float64)
    return factors.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
