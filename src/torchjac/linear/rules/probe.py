"""Probe: sparse matrices of operations that are linear with constant coefficients.

Pooling, interpolation and padding are separable: an operation on a plane is a product of one small
sparse matrix per spatial axis. The matrix of an axis is probed: the operation runs on unit vectors.
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
from torchjac.linear.rules.advanced_index import index_select

# Numbers (8 bytes each) in a probe with all unit vectors; a larger probe is compressed.
_MAX_PROBE = 2**20
# Default number of elements that one result reads, for a compressed probe.
_REACH = 96

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class AxisMatrix:
    """A sparse matrix that acts along one axis.

    Attributes:
        rows: Row of each entry.
        columns: Column of each entry.
        factors: Value of each entry.
        shape: Number of rows and of columns.
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


def probe_matrix(
    run: Run, size: int, dtype: torch.dtype = torch.float64, reach: int = _REACH
) -> AxisMatrix | None:
    """The matrix of an operation on one axis, or None if a long axis is not banded.

    Args:
        run: The operation, on the last axis of a tensor of shape (vectors, size).
        size: Length of the axis.
        dtype: Dtype of the program. A weight that is zero in float64 and nonzero in this dtype is
            an entry of unknown value.
        reach: Most elements that one result reads; a long axis is probed with that many vectors.
            A bound that is too small is detected.
    """
    with real_values():
        length = run(torch.zeros(1, size, dtype=torch.float64)).shape[1]
        local = size * max(size, length) > _MAX_PROBE
        vectors = _combs(reach, size) if local else torch.eye(size, dtype=torch.float64)
        responses = run(vectors)
        subnormal = torch.zeros_like(responses)
        if dtype != torch.float64:
            subnormal = torch.where(
                (responses == 0) & (run(vectors.float()) != 0), UNKNOWN, 0.0
            ).to(responses)
        if local:
            return None if bool(subnormal.any()) else _by_color(run, vectors, responses)
        responses = responses + subnormal
        columns, rows = responses.nonzero().unbind(1)
        return AxisMatrix(rows, columns, responses[columns, rows], (length, size))


def _combs(count: int, size: int) -> Tensor:
    """Seeds of a banded matrix: vector c is one at elements c, c + count, c + 2 count, ..."""
    mine = torch.arange(size)[None, :] % count == torch.arange(count)[:, None]
    return mine.to(torch.float64)


def _by_color(run: Run, ones: Tensor, factors: Tensor) -> AxisMatrix | None:
    """The entries from a compressed probe, or None if two elements of a seed met in one result.

    If no result reads two elements of one seed, the column of each entry is read off a run with
    seeds weighted by the numbers of their elements. Two runs with random weights check the columns.
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


def axis_matrix_map(matrix: AxisMatrix, axis: int, shape_in: Shape) -> LinearMap:
    """The matrix as a map along one axis; all other axes are lanes."""
    length, size = matrix.shape
    assert shape_in[axis] == size, (shape_in, axis, matrix.shape)
    count = len(matrix.rows)
    entries = (*shape_in[:axis], count, *shape_in[axis + 1 :])
    shape_out = (*shape_in[:axis], length, *shape_in[axis + 1 :])
    columns = matrix.columns
    gather = index_map(lambda t: index_select(t, axis, columns), entries, shape_in, False)
    factors = matrix.factors.reshape(-1, *[1] * (len(shape_in) - axis - 1)).expand(entries)
    known = 1.0 if bool((matrix.factors == 1).all()) else factors
    scaled = product(diagonal(entries, known), gather)
    order = matrix.rows.argsort(stable=True)
    if count == length and bool((matrix.rows[order] == torch.arange(length)).all()):
        return product(
            index_map(lambda t: index_select(t, axis, order), shape_out, entries, False), scaled
        )
    return product(scatter(shape_out, entries, axis, matrix.rows), scaled)


def separable(matrices: Sequence[AxisMatrix], shape_in: Shape) -> LinearMap:
    """The product of one matrix for each of the last axes."""
    first = len(shape_in) - len(matrices)
    steps: list[LinearMap] = []
    shape = shape_in
    for i, matrix in enumerate(matrices):
        step = axis_matrix_map(matrix, first + i, shape)
        steps.append(step)
        shape = step.shape_out
    return product(*reversed(steps))


def dense_planes(shape_out: Shape, shape_in: Shape, ndim: int) -> LinearMap:
    """A dense map along the last axes."""
    axes = range(-ndim, 0)
    return dense(shape_out, shape_in, axes, axes)
