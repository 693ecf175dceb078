"""Probe: operations that are linear with coefficients that no input changes.

Pooling, interpolation and padding act along each spatial axis in the same way whatever is on the
others, so an operation on a plane is a product of one small sparse matrix an axis. A matrix is
found by running the operation on the unit vectors of its axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchjac._torch.modes import real_values
from torchjac.linear.maps import (
    UNKNOWN,
    LinearMap,
    Shape,
    dense,
    diagonal,
    index_map,
    product,
    scatter,
)
from torchjac.linear.rules.places import along

# A probe with all unit vectors at once has at most this many numbers (8 bytes each).
_AT_ONCE = 2**20
# How many neighbors a result may see on an axis too long for that, if nobody knows better.
_REACH = 96

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class AxisMatrix:
    """A sparse matrix that acts along one axis.

    Attributes:
        rows: Row of each entry.
        columns: Column of each entry.
        factors: Value of each entry.
        shape: Its size.
    """

    rows: Tensor
    columns: Tensor
    factors: Tensor
    shape: tuple[int, int]

    def times(self, t: Tensor, axis: int) -> Tensor:
        """The product with a tensor along an axis."""
        shape = [-1 if i == axis else 1 for i in range(t.ndim)]
        entries = t.index_select(axis, self.columns) * self.factors.reshape(shape)
        sizes = [self.shape[0] if i == axis else s for i, s in enumerate(t.shape)]
        return t.new_zeros(sizes).index_add(axis, self.rows, entries)

    def transposed(self) -> AxisMatrix:
        """The transposed matrix."""
        rows, columns = self.shape
        return AxisMatrix(self.columns, self.rows, self.factors, (columns, rows))


def probed(
    run: Run, size: int, dtype: torch.dtype = torch.float64, reach: int = _REACH
) -> AxisMatrix | None:
    """The matrix of an operation on one axis, or None if it is too long and not local.

    Args:
        run: Takes numbers of shape (vectors, size), acts on the last axis.
        size: Length of the axis.
        dtype: Of the tensors that the program works with. A weight that float64 rounds to zero and
            this dtype does not is an entry, of unknown value.
        reach: How many neighbors a result sees at most; a long axis is probed with so many vectors.
            A number that is too small is found out.
    """
    with real_values():
        length = run(torch.zeros(1, size, dtype=torch.float64)).shape[1]
        local = size * max(size, length) > _AT_ONCE
        vectors = _one_in(reach, size) if local else torch.eye(size, dtype=torch.float64)
        made = run(vectors)
        more = torch.zeros_like(made)
        if dtype != torch.float64:
            more = torch.where((made == 0) & (run(vectors.float()) != 0), UNKNOWN, 0.0).to(made)
        if local:
            return None if bool(more.any()) else _by_color(run, vectors, made)
        made = made + more
        columns, rows = made.nonzero().unbind(1)
        return AxisMatrix(rows, columns, made[columns, rows], (length, size))


def _one_in(count: int, size: int) -> Tensor:
    """Vector c is one at elements c, c + count, c + 2 count, ..."""
    mine = torch.arange(size)[None, :] % count == torch.arange(count)[:, None]
    return mine.to(torch.float64)


def _by_color(run: Run, ones: Tensor, factors: Tensor) -> AxisMatrix | None:
    """The entries from vectors that stand for many unit vectors each.

    A result that sees few neighbors saw only one of the elements of a vector; which one is read off
    a run with the numbers of the elements in their place, and checked with two more.
    """
    size = ones.shape[1]
    number = torch.arange(1, size + 1, dtype=torch.float64)
    noise = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    colors, rows = factors.nonzero().unbind(1)
    values = factors[colors, rows]
    columns = (run(ones * number)[colors, rows] / values).round().to(torch.int64) - 1
    if not bool(((columns >= 0) & (columns < size) & (columns % len(ones) == colors)).all()):
        return None
    for weights in (noise, noise * number):
        expected = values * weights[columns]
        if not torch.allclose(run(ones * weights)[colors, rows], expected, rtol=1e-9, atol=0):
            return None
    return AxisMatrix(rows, columns, values, (factors.shape[1], size))


def applied(matrix: AxisMatrix, axis: int, shape_in: Shape) -> LinearMap:
    """The matrix along one axis; the others are lanes."""
    length, size = matrix.shape
    assert shape_in[axis] == size, (shape_in, axis, matrix.shape)
    count = len(matrix.rows)
    entries = (*shape_in[:axis], count, *shape_in[axis + 1 :])
    shape_out = (*shape_in[:axis], length, *shape_in[axis + 1 :])
    columns = matrix.columns
    gather = index_map(lambda t: along(t, axis, columns), entries, shape_in, False)
    factors = matrix.factors.reshape(-1, *[1] * (len(shape_in) - axis - 1)).expand(entries)
    known = 1.0 if bool((matrix.factors == 1).all()) else factors
    scaled = product(diagonal(entries, known), gather)
    order = matrix.rows.argsort(stable=True)
    if count == length and bool((matrix.rows[order] == torch.arange(length)).all()):
        return product(
            index_map(lambda t: along(t, axis, order), shape_out, entries, False), scaled
        )
    return product(scatter(shape_out, entries, axis, matrix.rows), scaled)


def separable(matrices: Sequence[AxisMatrix], shape_in: Shape) -> LinearMap:
    """A matrix for each of the last axes."""
    first = len(shape_in) - len(matrices)
    steps: list[LinearMap] = []
    shape = shape_in
    for i, matrix in enumerate(matrices):
        step = applied(matrix, first + i, shape)
        steps.append(step)
        shape = step.shape_out
    return product(*reversed(steps))


def planes(shape_out: Shape, shape_in: Shape, ndim: int) -> LinearMap:
    """All pairs along the last axes."""
    axes = range(-ndim, 0)
    return dense(shape_out, shape_in, axes, axes)
