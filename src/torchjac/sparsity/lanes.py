"""Lanes: axes along which a program is independent, proved from the dependence of each gradient.

An input axis b and an output axis a of the same size are a lane if element k along b influences
outputs only at k along a. Along a lane J is block diagonal, so all of its samples share a pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchjac.capture.linear_program import LinearProgram
from torchjac.linear.maps import Shape, map_unexpanded
from torchjac.sparsity.dependence import Dependence, Term
from torchjac.sparsity.interpret import Interpretation

# Coordinate of a row of another output leaf, or of an empty row.
_NONE = -1


@dataclass(frozen=True, slots=True)
class Lane:
    """A pair of axes along which outputs depend on inputs of the same position only.

    Attributes:
        output: Number of the output leaf.
        output_axis: Axis of the output leaf.
        input: Number of the input leaf.
        input_axis: Axis of the input leaf.
        size: Size of both axes.
    """

    output: int
    output_axis: int
    input: int
    input_axis: int
    size: int


def find_lanes(program: LinearProgram, interpretation: Interpretation) -> tuple[Lane, ...]:
    """All lanes between output and input leaves (pairs of axes of size 1 are trivial lanes)."""
    proved = []
    first = 0
    for i, row_shape in enumerate(program.row_shapes):
        for a, size in enumerate(row_shape):
            coordinate = _coordinates(tuple(row_shape), a, first, program.m)
            for j, (gradient, shape) in enumerate(
                zip(interpretation.gradients, program.column_shapes, strict=True)
            ):
                for b, width in enumerate(shape):
                    if width == size and _is_independent(gradient, coordinate, b):
                        proved.append(Lane(i, a, j, b, size))
        first += row_shape.numel()
    return tuple(proved)


def is_batched(program: LinearProgram, interpretation: Interpretation) -> bool:
    """Whether the leading axes of all leaves are a batch of independent samples."""
    first = 0
    for row_shape in program.row_shapes:
        coordinate = _coordinates(tuple(row_shape), 0, first, program.m)
        if not all(_is_independent(g, coordinate, 0) for g in interpretation.gradients):
            return False
        first += row_shape.numel()
    return True


def _coordinates(shape: Shape, axis: int, first: int, m: int) -> NDArray[np.int64]:
    """Position along an axis of each row of one leaf; -1 for rows of other leaves."""
    coordinates = np.full(m, _NONE)
    along = np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    coordinates[first : first + math.prod(shape)] = np.broadcast_to(along, shape).ravel()
    return coordinates


def _is_independent(gradient: Dependence | None, coordinate: NDArray[np.int64], axis: int) -> bool:
    if gradient is None:
        return True
    return all(_is_term_independent(term, coordinate, axis) for term in gradient.terms)


def _is_term_independent(term: Term, coordinate: NDArray[np.int64], axis: int) -> bool:
    if term.table is None:
        low = high = torch.from_numpy(coordinate)
    else:
        low, high = _ranges(term, coordinate)
    size = term.positions.shape[axis]
    own = (
        torch.arange(size)
        .reshape([-1 if i == axis else 1 for i in range(term.positions.ndim)])
        .expand(term.positions.shape)
    )
    used = term.factors
    used = used if isinstance(used, Tensor) else torch.tensor(used).expand(term.positions.shape)

    def is_own(positions: Tensor, mine: Tensor, factors: Tensor) -> Tensor:
        below, above = low[positions], high[positions]
        other = below == _NONE
        return other | ((below == mine) & (above == mine)) | (factors == 0)

    return bool(map_unexpanded(is_own, term.positions, own, used).all())


def _ranges(term: Term, coordinate: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Least and largest coordinate in each row of a table; -1 if the row has no entry."""
    table = term.table
    assert table is not None
    where = coordinate[table.indices]
    counts = np.diff(table.indptr)
    filled = counts > 0
    low = np.full(len(counts), _NONE)
    high = low.copy()
    if filled.any():
        begin = table.indptr[:-1][filled]
        high[filled] = np.maximum.reduceat(where, begin)
        beyond = np.iinfo(np.int64).max
        least = np.minimum.reduceat(np.where(where == _NONE, beyond, where), begin)
        low[filled] = np.where(least == beyond, _NONE, least)
    return torch.from_numpy(low), torch.from_numpy(high)
