"""Indexing: what `t[slots]` and `t.index_put(slots, values, accumulate=True)` do as maps.

A slot stands for one axis of the indexed tensor: None (the axis is kept whole), a tensor (its
indices are known), or a shape (the indices depend on the input: each may be any of that axis).
Axes are brought into the order known, unknown, whole; there a known index is one gather or scatter
along one axis, an unknown one a sum over its axis, and the whole axes are lanes.
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
class Places:
    """Slots of a tensor, with its axes sorted.

    Attributes:
        shape: Of the indexed tensor.
        known: Axes with known indices.
        unknown: Axes with unknown ones.
        whole: Axes without.
        flat: Known indices as positions in the known axes taken as one; of their common shape.
        common: Shape that all indices broadcast to.
        at: Before which of the whole axes the common ones stand in `t[slots]`.
    """

    shape: Shape
    known: list[int]
    unknown: list[int]
    whole: list[int]
    flat: Tensor
    common: Shape
    at: int

    @property
    def taken(self) -> Shape:
        """Shape of `t[slots]`."""
        kept = self._sizes(self.whole)
        return (*kept[: self.at], *self.common, *kept[self.at :])

    @property
    def sorted(self) -> Shape:
        """Sizes in the order known (as one axis), unknown, whole."""
        return (math.prod(self._sizes(self.known)), *self._sizes(self.unknown + self.whole))

    @property
    def narrow(self) -> Shape:
        """Shape of the known indices, with ones in front where the common shape has more axes."""
        return (*[1] * (len(self.common) - self.flat.ndim), *self.flat.shape)

    def _sizes(self, axes: list[int]) -> Shape:
        return tuple(self.shape[a] for a in axes)


def places(shape: Shape, slots: Sequence[Slot]) -> Places:
    """Sorts the axes of a tensor by what is known of their indices."""
    slots = [*_expanded(slots)]
    slots += [None] * (len(shape) - len(slots))
    known = [i for i, s in enumerate(slots) if isinstance(s, Tensor)]
    unknown = [i for i, s in enumerate(slots) if isinstance(s, tuple)]
    whole = [i for i, s in enumerate(slots) if s is None]
    taken = sorted(known + unknown)
    shapes = [tuple(s.shape) if isinstance(s, Tensor) else s for s in slots if s is not None]
    common = tuple(np.broadcast_shapes(*shapes))
    flat = torch.zeros((), dtype=torch.int64)
    for axis in known:
        index = slots[axis]
        assert isinstance(index, Tensor)
        flat = flat * shape[axis] + index.remainder(max(shape[axis], 1))
    together = bool(taken) and taken == list(range(taken[0], taken[-1] + 1))
    return Places(shape, known, unknown, whole, flat, common, taken[0] if together else 0)


def _expanded(slots: Sequence[Slot]) -> list[Slot]:
    """Masks as the indices of their true elements."""
    found: list[Slot] = []
    for slot in slots:
        if isinstance(slot, Tensor) and slot.dtype in (torch.bool, torch.uint8):
            found += slot.nonzero().unbind(1)
        else:
            found.append(slot.to(torch.int64) if isinstance(slot, Tensor) else slot)
    return found


def take(p: Places) -> LinearMap:
    """`t[slots]`."""
    order = p.known + p.unknown + p.whole
    sizes, narrow, common, at = p.sorted, p.narrow, p.common, p.at
    index = p.flat.reshape(-1)
    lanes = sizes[1:]
    spread = (*common, *lanes)

    def run(t: Tensor) -> Tensor:
        t = along(t.permute(order).reshape(sizes), 0, index)
        return unflattened(t, narrow).expand(spread)

    gathered: LinearMap = index_map(run, spread, p.shape, False)
    if p.unknown:
        first = len(common)
        axes = range(first, first + len(p.unknown))
        total = axis_sum(spread, axes)
        gathered = product(diagonal(total.shape_out, UNKNOWN), total, gathered)
    return product(_moved(p.taken, len(common), at), gathered)


def put(p: Places, values: Shape, *, replace: bool = False) -> LinearMap:
    """Values, broadcast to the shape of `t[slots]`, added up where the slots say.

    Args:
        p: The slots.
        values: Shape of the values.
        replace: Whether values are written, not added: which one of several for the same place
            is not known.
    """
    count, taken, narrow = len(p.common), p.taken, p.narrow
    whole = tuple(p.shape[a] for a in p.whole)
    first = list(range(p.at, p.at + count))
    order = first + [i for i in range(len(taken)) if i not in first]
    mine = (*p.common, *whole)
    steps: list[LinearMap] = [  # in the order in which they act
        broadcast(taken, values),
        index_map(lambda t: t.permute(order), mine, taken, False),
    ]
    once = [i for i in range(count) if narrow[i] == 1 and p.common[i] != 1]
    if once:  # indices that are the same along an axis: its values add up
        total = axis_sum(mine, once)
        steps += [total, reshape((*narrow, *whole), total.shape_out)]
    ready = (p.flat.numel(), *whole)
    factors = UNKNOWN if p.unknown or (replace and once) else 1.0
    steps += [
        reshape(ready, (*narrow, *whole)),
        diagonal(ready, _single(p.flat.reshape(-1), ready) if replace else 1.0),
        diagonal(ready, factors),
    ]
    apart = (ready[0], *[1] * len(p.unknown), *whole)
    spread = (ready[0], *p.sorted[1:])
    steps.append(index_map(lambda t: t.reshape(apart).expand(spread), spread, ready, False))
    if p.known:
        steps.append(scatter(p.sorted, spread, 0, p.flat.reshape(-1)))
    return product(_unsorted(p), *reversed(steps))


def spared(p: Places) -> Factors:
    """1 for elements that the slots do not meet, 0 for those they do, NaN where unknown."""
    if 0 in p.common:
        return 1.0
    met = torch.ones(p.sorted[0], dtype=torch.float64)
    met[p.flat.reshape(-1)] = UNKNOWN if p.unknown else 0.0
    met = met.reshape((-1, *[1] * (len(p.sorted) - 1))).expand(p.sorted)
    return _unsorted(p).run(met)


def along(t: Tensor, axis: int, index: Tensor) -> Tensor:
    """`index_select` that keeps strides of 0."""
    shape = (*t.shape[:axis], len(index), *t.shape[axis + 1 :])
    for i in range(t.ndim):
        if t.shape[i] > 1 and t.stride(i) == 0:
            t = t.narrow(i, 0, 1)
            if i == axis:
                index = torch.zeros(min(1, len(index)), dtype=torch.int64)
    return t.index_select(axis, index).expand(shape)


def unflattened(t: Tensor, sizes: Shape) -> Tensor:
    """The first axis as several, strides of 0 kept."""
    return t.reshape((*sizes, *t.shape[1:]))


def _moved(taken: Shape, count: int, at: int) -> LinearMap:
    """From the indexed axes in front to their place among the others."""
    ndim = len(taken)
    order = [*range(count, count + at), *range(count), *range(count + at, ndim)]
    before = (*taken[at : at + count], *taken[:at], *taken[at + count :])
    if order == list(range(ndim)):
        return reshape(taken, taken)
    return index_map(lambda t: t.permute(order), taken, before, False)


def _unsorted(p: Places) -> IndexMap:
    """From the sorted axes back to those of the tensor."""
    order = p.known + p.unknown + p.whole
    sizes = tuple(p.shape[a] for a in order)
    back = [order.index(i) for i in range(len(order))]
    return index_map(lambda t: t.reshape(sizes).permute(back), p.shape, p.sorted, False)


def _single(index: Tensor, shape: Shape) -> Factors:
    """1 for indices that occur once, NaN for the others."""
    if index.numel() == 0:
        return 1.0
    repeated = torch.bincount(index)[index] > 1
    if not bool(repeated.any()):
        return 1.0
    factors = torch.where(repeated, UNKNOWN, 1.0).to(torch.float64)
    return factors.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
