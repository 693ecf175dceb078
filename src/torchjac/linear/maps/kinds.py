"""The kinds of map: what each holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchjac.linear.maps.factors import Numbers, Shape


@dataclass(frozen=True, slots=True, eq=False)
class LinearMap:
    """A linear map between tensors.

    Attributes:
        shape_out: Shape of what it gives.
        shape_in: Shape of what it takes.
    """

    shape_out: Shape
    shape_in: Shape


@dataclass(frozen=True, slots=True, eq=False)
class Zero(LinearMap):
    """No entry."""


@dataclass(frozen=True, slots=True, eq=False)
class Scaled(LinearMap):
    """A multiple of the identity.

    Attributes:
        factor: The multiple; NaN if it is not known.
    """

    factor: float


@dataclass(frozen=True, slots=True, eq=False)
class Diagonal(LinearMap):
    """One factor an element: `out = factors * in`.

    Attributes:
        factors: Of that shape; strides of 0 where they do not change along an axis.
    """

    factors: Tensor | Numbers


@dataclass(frozen=True, slots=True, eq=False)
class IndexMap(LinearMap):
    """Each element of the result is one element of the argument, or zero.

    Kept as the operation itself: run on the positions of the elements it gives the index array,
    with the strides it would give its result, so a broadcast costs no memory.

    Attributes:
        run: The operation, on a tensor of `shape_in` of any dtype. May fill in zeros.
        fills: Whether it may.
    """

    run: Callable[[Tensor], Tensor]
    fills: bool

    def positions(self) -> Tensor:
        """Flat position in the argument of each element of the result; -1 for a zero."""
        size = math.prod(self.shape_in)
        if not self.fills:
            return self.run(torch.arange(size).reshape(self.shape_in))
        return self.run(torch.arange(1, size + 1).reshape(self.shape_in)) - 1


@dataclass(frozen=True, slots=True, eq=False)
class Scatter(LinearMap):
    """Along one axis, element j of the argument is added to element `index[j]` of the result.

    Attributes:
        axis: The axis, not negative.
        index: Where each slice goes.
    """

    axis: int
    index: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AxisSum(LinearMap):
    """The sum along axes, which are gone from the result.

    Attributes:
        axes: The axes, not negative.
    """

    axes: Shape


@dataclass(frozen=True, slots=True, eq=False)
class Dense(LinearMap):
    """All pairs along some axes, nothing known of the factors; the other axes are lanes.

    Lanes of argument and result correspond in order and have the same sizes.

    Attributes:
        axes_out: Axes of the result on which every element depends on all of `axes_in`.
        axes_in: Those axes of the argument.
    """

    axes_out: Shape
    axes_in: Shape


@dataclass(frozen=True, slots=True, eq=False)
class Sum(LinearMap):
    """A sum of maps.

    Attributes:
        parts: At least two, none of them a `Sum` or `Zero`.
    """

    parts: tuple[LinearMap, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Product(LinearMap):
    """A product of maps; the last acts first.

    Attributes:
        factors: At least two, none of them a `Product`, `Zero` or the identity.
    """

    factors: tuple[LinearMap, ...]
