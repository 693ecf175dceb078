"""How a loop goes through the elements of a tensor: along its axes where that is so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchjac._torch.modes import real_values
from torchjac.compiler.accumulate import adjoint as t
from torchjac.linear.maps import Shape


@dataclass(frozen=True, slots=True)
class Walk:
    """How a loop goes through the elements of a value.

    Attributes:
        loop: The loop.
        places: Their numbers; used where no axes are known.
        axes: For each axis of the loop the axis of the value that it runs along, or None; None for
            all where it is not that simple.
        start: Where it begins on each axis of the value.
        shape: Shape of the value.
    """

    loop: Shape
    places: Tensor
    axes: Sequence[int | None] | None
    start: Sequence[int]
    shape: Shape

    @classmethod
    def of(cls, places: Tensor, shape: Shape) -> Walk:
        """Reads off numbers of elements how the loop goes through them."""
        with real_values():
            found = t.even(places)
            loop = tuple(places.shape)
            if found is None or found[0] < 0:
                return cls(loop, places, None, (), shape)
            first, steps = found
            strides = [math.prod(shape[a + 1 :]) for a in range(len(shape))]
            start = [first // s % size for s, size in zip(strides, shape, strict=True)]
            axes: list[int | None] = []
            for size, step in zip(loop, steps, strict=True):
                fits = [
                    a
                    for a, s in enumerate(strides)
                    if s == step and a not in axes and shape[a] > 1 and start[a] + size <= shape[a]
                ]
                if step and not fits:
                    return cls(loop, places, None, (), shape)
                axes.append(fits[0] if step else None)
            return cls(loop, places, axes, start, shape)

    def take(self, tensor: Tensor, more: Shape) -> Tensor:
        """The elements of a tensor of the value's shape (and more axes), over the loop."""
        out = (*self.loop, *more)
        if self.axes is None:
            free = [a for a in range(len(self.loop)) if t.is_free(self.places, a)]
            where = t.compact(self.places, free).clamp(min=0)
            behind = [a for a in range(len(self.shape), tensor.ndim) if t.is_free(tensor, a)]
            small = t.compact(tensor, behind)
            rest = small.shape[len(self.shape) :]
            flat = small.reshape((math.prod(self.shape), *rest))
            made = flat.index_select(0, where.reshape(-1))
            return made.reshape((*where.shape, *rest)).expand(out)
        for axis in range(len(self.shape)):
            along = [s for s, a in zip(self.loop, self.axes, strict=True) if a == axis]
            tensor = tensor.narrow(axis, self.start[axis], along[0] if along else 1)
        used = [a for a in self.axes if a is not None]
        left = [a for a in range(len(self.shape)) if a not in used]
        others = range(len(self.shape), tensor.ndim)
        tensor = tensor.permute([*left, *used, *others])[(0,) * len(left)]
        for position, along_axis in enumerate(self.axes):
            if along_axis is None:
                tensor = tensor.unsqueeze(position)
        return tensor.expand(out)


def compressed(tensor: Tensor) -> Tensor:
    """The same with strides of 0 along axes on which it is the same."""
    for axis, size in enumerate(tensor.shape):
        if size > 1 and not t.is_free(tensor, axis):
            first = tensor.narrow(axis, 0, 1)
            if torch.equal(tensor, first.expand(tensor.shape)):
                tensor = first.expand(tensor.shape)
    return tensor
