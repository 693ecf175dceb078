"""The index map from the points of a loop to the elements of a tensor: strided where possible."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from torchjac._torch.modes import real_values
from torchjac.compiler.accumulate.broadcast import affine_strides, broadcast_axes, collapse
from torchjac.linear.maps import Shape


@dataclass(frozen=True, slots=True)
class StridedIndex:
    """The element of a value at each point of a loop.

    Attributes:
        loop: Sizes of the loop's axes.
        elements: Flat number of each element; read only where `axes` is None.
        axes: Axis of the value along which each axis of the loop runs, None for an axis on which
            the element is constant; None for all if the map is not strided.
        start: First index on each axis of the value.
        shape: Shape of the value.
    """

    loop: Shape
    elements: Tensor
    axes: Sequence[int | None] | None
    start: Sequence[int]
    shape: Shape

    @classmethod
    def of(cls, elements: Tensor, shape: Shape) -> StridedIndex:
        """Finds the axes along which a loop runs, from the flat numbers of its elements."""
        with real_values():
            loop = tuple(elements.shape)
            affine = affine_strides(elements)
            if affine is None or affine[0] < 0:
                return cls(loop, elements, None, (), shape)
            first, steps = affine
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
                    return cls(loop, elements, None, (), shape)
                axes.append(fits[0] if step else None)
            return cls(loop, elements, axes, start, shape)

    def gather(self, tensor: Tensor, trailing: Shape) -> Tensor:
        """Elements of a tensor over the loop; views where the map is strided.

        Args:
            tensor: A tensor of the value's shape, and more axes after them.
            trailing: Sizes of these axes in the result, to which they are expanded.
        """
        out = (*self.loop, *trailing)
        if self.axes is None:
            return self._gather_flat(tensor).expand(out)
        for axis in range(len(self.shape)):
            along = [s for s, a in zip(self.loop, self.axes, strict=True) if a == axis]
            tensor = tensor.narrow(axis, self.start[axis], along[0] if along else 1)
        used = [a for a in self.axes if a is not None]
        unused = [a for a in range(len(self.shape)) if a not in used]
        rest = range(len(self.shape), tensor.ndim)
        tensor = tensor.permute([*unused, *used, *rest])[(0,) * len(unused)]
        for position, along_axis in enumerate(self.axes):
            if along_axis is None:
                tensor = tensor.unsqueeze(position)
        return tensor.expand(out)

    def _gather_flat(self, tensor: Tensor) -> Tensor:
        """Elements of a tensor by one lookup in flat memory, each once."""
        where = collapse(self.elements, broadcast_axes(self.elements)).clamp(min=0)
        small = collapse(tensor, broadcast_axes(tensor, range(len(self.shape), tensor.ndim)))
        rest = small.shape[len(self.shape) :]
        flat = small.reshape((math.prod(self.shape), *rest))
        return flat.index_select(0, where.reshape(-1)).reshape((*where.shape, *rest))
