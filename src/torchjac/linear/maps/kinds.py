"""The kinds of linear map, one class each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchjac.linear.maps.factors import ComputedFactors, Shape


@dataclass(frozen=True, slots=True, eq=False)
class LinearMap:
    """A linear map between tensors.

    Attributes:
        shape_out: Shape of the result.
        shape_in: Shape of the argument.
    """

    shape_out: Shape
    shape_in: Shape


@dataclass(frozen=True, slots=True, eq=False)
class Zero(LinearMap):
    """The zero map: no entry."""


@dataclass(frozen=True, slots=True, eq=False)
class Scaled(LinearMap):
    """A multiple of the identity.

    Attributes:
        factor: The multiple; NaN if it is unknown.
    """

    factor: float


@dataclass(frozen=True, slots=True, eq=False)
class Diagonal(LinearMap):
    """One factor per element: `out = factors * in`.

    Attributes:
        factors: Tensor of `shape_out`; stride 0 along axes on which all factors are equal.
    """

    factors: Tensor | ComputedFactors


@dataclass(frozen=True, slots=True, eq=False)
class IndexMap(LinearMap):
    """Each element of the result is one element of the argument, or zero.

    The map holds the operation itself. Run on a tensor of positions, the operation returns the
    index array, with the strides of its result, so a broadcast costs no memory.

    Attributes:
        run: The operation, on tensors of `shape_in` of any dtype.
        fills: Whether the operation may fill in zeros.
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
        index: Slice of the result for each slice of the argument.
    """

    axis: int
    index: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AxisSum(LinearMap):
    """The sum along axes, which the result does not have.

    Attributes:
        axes: The axes, not negative.
    """

    axes: Shape


@dataclass(frozen=True, slots=True, eq=False)
class Dense(LinearMap):
    """A dense block of unknown factors along some axes; the remaining axes are lanes.

    Lanes of argument and result correspond in order and have the same sizes.

    Attributes:
        axes_out: Axes of the result in the block.
        axes_in: Axes of the argument in the block.
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
