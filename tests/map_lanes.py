"""Lanes of a map: axes along which it is block diagonal, read off its structure.

A batch gives lanes whose blocks are all the same (a Kronecker product with the identity) or one of
their own each. What follows of one lane holds for all, and costs the memory of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor

from torchjac.linear.maps.factors import known, on_support, stored
from torchjac.linear.maps.kinds import (
    AxisSum,
    Dense,
    Diagonal,
    IndexMap,
    LinearMap,
    Product,
    Scaled,
    Scatter,
    Sum,
    Zero,
)


@dataclass(frozen=True, slots=True)
class Along:
    """A pair of axes along which a map is block diagonal.

    Attributes:
        axis_out: Axis of the result.
        axis_in: Axis of the argument, of the same size.
        same: Whether all blocks are known to be the same.
    """

    axis_out: int
    axis_in: int
    same: bool


def lanes(map_: LinearMap) -> tuple[Along, ...]:
    """Axes of size 2 or more along which a map is block diagonal.

    Element k along `axis_out` depends on nothing but elements k along `axis_in`. All pairs that
    the factors of a product show one by one are found; one that appears only when a product is
    multiplied out may be missed.
    """
    return tuple(a for a in _lanes(map_) if map_.shape_in[a.axis_in] > 1)


@singledispatch
def _lanes(map_: LinearMap) -> list[Along]:
    raise NotImplementedError(f"no lanes of {type(map_).__name__}")


@_lanes.register(Zero)
@_lanes.register(Scaled)
def _(map_: LinearMap) -> list[Along]:
    if map_.shape_out != map_.shape_in:
        return []
    return [Along(i, i, True) for i in range(len(map_.shape_in))]


@_lanes.register
def _(map_: Diagonal) -> list[Along]:
    return [Along(i, i, not step) for i, step in enumerate(known(map_.factors).stride())]


@_lanes.register
def _(map_: IndexMap) -> list[Along]:
    shape = map_.shape_in
    coordinates = [_moved(map_, axis) for axis in range(len(shape))]
    pairs = []
    for j, coordinate in enumerate(coordinates):
        for i, size in enumerate(map_.shape_out):
            if size == shape[j] and _runs_along(coordinate, i):
                rest = [c for k, c in enumerate(coordinates) if k != j]
                filled = [(coordinate < 0)] if map_.fills else []
                pairs.append(Along(i, j, all(_is_fixed(c, i) for c in [*rest, *filled])))
    return pairs


@_lanes.register
def _(map_: Scatter) -> list[Along]:
    return [Along(i, i, True) for i in range(len(map_.shape_in)) if i != map_.axis]


@_lanes.register
def _(map_: AxisSum) -> list[Along]:
    remaining = [i for i in range(len(map_.shape_in)) if i not in map_.axes]
    return [Along(i, axis, True) for i, axis in enumerate(remaining)]


@_lanes.register
def _(map_: Dense) -> list[Along]:
    out = [i for i in range(len(map_.shape_out)) if i not in map_.axes_out]
    in_ = [i for i in range(len(map_.shape_in)) if i not in map_.axes_in]
    return [Along(a, b, False) for a, b in zip(out, in_, strict=True)]


@_lanes.register
def _(map_: Sum) -> list[Along]:
    pairs = _same_of(_lanes(map_.parts[0]))
    for part in map_.parts[1:]:
        other = _same_of(_lanes(part))
        pairs = {pair: same and other[pair] for pair, same in pairs.items() if pair in other}
    return [Along(*pair, same) for pair, same in pairs.items()]


@_lanes.register
def _(map_: Product) -> list[Along]:
    pairs = _same_of(_lanes(map_.factors[0]))
    for factor in map_.factors[1:]:
        longer: dict[tuple[int, int], bool] = {}
        for along in _lanes(factor):
            for (out, middle), same in pairs.items():
                if middle == along.axis_out:
                    pair = out, along.axis_in
                    longer[pair] = (same and along.same) or longer.get(pair, False)
        pairs = longer
    return [Along(*pair, same) for pair, same in pairs.items()]


def _same_of(pairs: list[Along]) -> dict[tuple[int, int], bool]:
    return {(a.axis_out, a.axis_in): a.same for a in pairs}


def _moved(map_: IndexMap, axis: int) -> Tensor:
    """The coordinate along an axis of the argument that each element comes from; -1 for a zero."""
    shape = map_.shape_in
    along = torch.arange(1, shape[axis] + 1, dtype=torch.int32)
    along = along.reshape([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)
    return map_.run(along) - 1 if map_.fills else on_support(lambda t: t - 1, map_.run(along))


def _runs_along(coordinate: Tensor, axis: int) -> bool:
    """Whether the coordinate is the position along an axis, wherever there is one."""
    sizes = [-1 if i == axis else 1 for i in range(coordinate.ndim)]
    own = torch.arange(coordinate.shape[axis], dtype=coordinate.dtype).reshape(sizes)

    def fine(c: Tensor, mine: Tensor) -> Tensor:
        return (c == mine) | (c < 0)

    return bool(stored(on_support(fine, coordinate, own.expand(coordinate.shape))).all())


def _is_fixed(coordinate: Tensor, axis: int) -> bool:
    """Whether nothing changes along an axis."""
    if not coordinate.stride(axis) or not coordinate.numel():
        return True
    small = stored(coordinate)
    return bool((small == small.narrow(axis, 0, 1)).all())
