"""CSR tables of factors: NaN is an unknown factor, and zeros are never stored.

Sums follow the rules of `maps.factors`: an entry vanishes only where exact numbers cancel, and a
rounded number is never represented by float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from torchjac.linear.maps.factors import (
    BELOW_SINGLE,
    BITS,
    GRIDS,
    UNKNOWN,
    Known,
    expand_factors,
    map_unexpanded,
    plus,
)

# Rows of a table: from here on, entries are inserted in the column order of most rows, so that few
# rows need sorting (heat equation, n = 10**6: 13 ms instead of 28; below, the order costs more).
_LARGE = 2**14

Floats = NDArray[np.float64]
Integers = NDArray[np.integer]


def csr(
    data: Floats, indices: Integers, starts: Integers, shape: tuple[int, int]
) -> sparse.csr_array:
    """A CSR matrix with 32-bit indices if they fit; it may share memory with the arrays."""
    kind = np.int32 if max(len(indices), *shape) < 2**31 else np.int64
    parts = data, indices.astype(kind, copy=False), starts.astype(kind, copy=False)
    return sparse.csr_array(parts, shape=shape)


def row_numbers(shape: tuple[int, ...]) -> Tensor:
    """Row numbers of a new table with one row per element."""
    size = math.prod(shape)
    return torch.arange(size, dtype=torch.int32 if size < 2**31 else torch.int64).reshape(shape)


def first_row(shape: tuple[int, ...]) -> Tensor:
    """Row numbers of a table with a single row, which all elements share."""
    return torch.zeros((), dtype=torch.int32).expand(shape)


def add_factors_of_rows(one: Known, other: Known, table: sparse.csr_array | None) -> Known:
    """The sum of two factors per element, for the same rows of a table.

    Factors cancel only if the entries of the row are known: elements that share a row with unknown
    entries depend on the same rows of J, but by numbers that may differ.
    """
    total = plus(one, other)
    if table is None or not np.isnan(table.data).any():
        return total
    if isinstance(total, float):
        return 0.0 if one == 0 and other == 0 else UNKNOWN
    size = torch.maximum(
        expand_factors(one, total.shape).abs(), expand_factors(other, total.shape).abs()
    )
    return map_unexpanded(lambda t, s: torch.where((t == 0) & (s != 0), UNKNOWN, t), total, size)


def summable_factors(data: Floats, rows: Integers, table: sparse.csr_array | None) -> Floats:
    """Factors of rows of a table, for a sum: unknown where they could cancel without proof.

    Args:
        data: The factors.
        rows: The row of each factor.
        table: The table; None for the identity.
    """
    if table is None or not (np.any(data < 0) and np.any(data > 0)):
        return data
    unknown = np.isnan(table.data)
    if not unknown.any():
        return data
    hidden = np.zeros(table.shape[0], dtype=bool)
    hidden[np.repeat(np.arange(table.shape[0]), np.diff(table.indptr))[unknown]] = True
    return np.where((data != 0) & hidden[rows], UNKNOWN, data)


def from_entries(
    rows: Integers, columns: Integers, data: Floats, shape: tuple[int, int]
) -> sparse.csr_array:
    """A CSR matrix from entries in any order; repeated entries are added."""
    nonzero = data != 0
    if not nonzero.all():
        rows, columns, data = rows[nonzero], columns[nonzero], data[nonzero]
    starts = np.zeros(shape[0] + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=shape[0]), out=starts[1:])
    order = _row_order(rows, shape[0])
    return sum_duplicates(csr(data[order], columns[order], starts, shape))


def sum_duplicates(table: sparse.csr_array) -> sparse.csr_array:
    """The table with repeated entries added and structural zeros removed. In place."""
    table.sort_indices()
    if table.has_canonical_format:
        return table
    data = table.data
    if np.isnan(data).all():
        table.sum_duplicates()
        return table
    terms = int(np.diff(table.indptr).max(initial=0))
    exact = is_exact(data, terms)
    unsummed = None if exact else table.copy()
    table.sum_duplicates()
    if unsummed is not None and _is_doubtful(table.data).any():

        def recompute(count: Callable[[Floats], Floats]) -> sparse.csr_array:
            copy = _with_data(unsummed.copy(), count(unsummed.data))
            copy.sum_duplicates()
            return copy

        return _certify(table, recompute)
    drop_zeros(table)
    return table


def from_columns(
    columns: Sequence[Integers], factors: Sequence[float | Floats], width: int
) -> sparse.csr_array:
    """A matrix with a row per element, each the sum of one entry per array.

    Args:
        columns: Arrays of one shape: column of the entry of each element.
        factors: For each array the values of its entries, or one number for all.
        width: Number of columns of the matrix.
    """
    shape, size, count = columns[0].shape, columns[0].size, len(columns)
    order = list(range(count))
    if size >= _LARGE and count > 1:
        order = sorted(order, key=lambda k: _median_offset(columns[k], factors[k]))
    indices = np.empty((*shape, count), dtype=np.int32 if width < 2**31 else np.int64)
    data = np.empty((*shape, count))
    for place, k in enumerate(order):
        indices[..., place] = columns[k]
        data[..., place] = factors[k]
    starts = np.arange(0, data.size + 1, count)
    table = csr(data.reshape(-1), indices.reshape(-1), starts, (size, width))
    drop_zeros(table)
    return sort_rows(table)


def as_product(
    columns: Sequence[Integers],
    factors: Sequence[Floats],
    parts: Sequence[sparse.csr_array | None],
    width: int,
) -> tuple[sparse.csr_array, sparse.csr_array | None]:
    """A sum over tables as a product of two matrices.

    Row i of the sum is the sum over k and j of `factors[k][i, j]` times row `columns[k][i, j]` of
    table k.

    Args:
        columns: For each table the row numbers, shape (rows, summands).
        factors: For each table the factors, of the same shape.
        parts: The tables, or None everywhere for the identity.
        width: Number of columns of the identity.

    Returns:
        The left matrix, with repeated entries, and the stacked tables.
    """
    distinct = list({id(p): p for p in parts if p is not None}.values())
    first = dict(
        zip(map(id, distinct), accumulate((p.shape[0] for p in distinct), initial=0), strict=False)
    )
    right = (
        sparse.vstack(distinct, format="csr") if len(distinct) > 1 else next(iter(distinct), None)
    )
    height = width if right is None else right.shape[0]
    kind = np.dtype(np.int32 if height < 2**31 else np.int64)
    row_indices = [
        np.add(column, first.get(id(part), 0), dtype=kind)
        for column, part in zip(columns, parts, strict=True)
    ]
    wide, data = np.concatenate(row_indices, 1), np.concatenate(factors, 1)
    starts = np.arange(0, wide.size + 1, wide.shape[1])
    left = csr(data.ravel(), wide.ravel(), starts, (len(wide), height))
    drop_zeros(left)
    return left, right


def _median_offset(columns: Integers, factors: float | Floats) -> float:
    """Median distance of sampled entries from the diagonal: the order in most rows of a stencil."""
    some = np.linspace(0, columns.size - 1, 13, dtype=np.int64)[1:-1]
    at = np.unravel_index(some, columns.shape)
    offsets = columns[at] - some
    if not isinstance(factors, float):
        offsets = offsets[factors[at] != 0]
    return float(np.median(offsets)) if len(offsets) else 0.0


def sort_rows(table: sparse.csr_array) -> sparse.csr_array:
    """As `sum_duplicates`, faster if most rows are sorted. In place."""
    indices, starts = table.indices, table.indptr
    is_descent = indices[1:] <= indices[:-1]
    ends = starts[1:-1]
    is_descent[ends[(ends > 0) & (ends < len(indices))] - 1] = False
    descents = is_descent.nonzero()[0]
    if not len(descents):
        return table
    if 4 * len(descents) > table.shape[0]:
        return sum_duplicates(table)
    rows = np.unique(np.searchsorted(starts, descents, side="right") - 1)
    part = table[rows]
    count = part.nnz
    part.sum_duplicates()
    if part.nnz < count:
        return sum_duplicates(table)
    slots = np.repeat(starts[rows] - part.indptr[:-1], np.diff(part.indptr)) + np.arange(count)
    indices[slots] = part.indices
    table.data[slots] = part.data
    return csr(table.data, indices, starts, table.shape)


def drop_zeros(table: sparse.csr_array) -> None:
    """Removes stored zeros in place."""
    if not table.data.all():
        table.eliminate_zeros()


def multiply(left: sparse.csr_array, right: sparse.csr_array) -> sparse.csr_array:
    """The product."""
    table = left @ right
    table.sort_indices()
    if np.isnan(left.data).all() or np.isnan(right.data).all():
        return table
    terms = int(np.diff(left.indptr).max(initial=0))
    if _span(left.data) * _span(right.data) * terms <= BITS:
        drop_zeros(table)
        return table

    def recompute(count: Callable[[Floats], Floats]) -> sparse.csr_array:
        positive = _with_data(left, count(left.data)) @ _with_data(right, count(right.data))
        positive.sort_indices()
        return positive

    return _certify(table, recompute)


def add(a: sparse.csr_array, b: sparse.csr_array) -> sparse.csr_array:
    """The sum."""
    table = a + b
    if is_exact(a.data, 2) and is_exact(b.data, 2):
        return table
    return _certify(
        table, lambda count: _with_data(a, count(a.data)) + _with_data(b, count(b.data))
    )


def columns_used(table: sparse.csr_array) -> NDArray[np.bool_]:
    """Whether each column has an entry."""
    used = np.zeros(table.shape[1], dtype=bool)
    used[table.indices] = True
    return used


def is_exact(data: Floats, terms: int = 1) -> bool:
    """Whether every sum of this many known numbers is exact, even in float32."""
    return _span(data) * terms <= BITS


def _span(data: Floats) -> float:
    """The largest known number in units of a grid that holds all of them; infinite without one."""
    # Shortcuts: a few samples usually rule out every grid, and often all numbers are unknown.
    some = np.abs(data[:: len(data) // 256 + 1])
    grids = [g for g in GRIDS if _is_integral(some * g)]
    unknown = np.isnan(data) if grids else None
    if unknown is None or unknown.all():
        return np.inf if unknown is None else 0.0
    size = np.abs(data)
    for grid in grids:
        scaled = size * grid
        if _is_integral(scaled):
            return float(np.max(scaled, initial=0.0, where=~unknown))
    return np.inf


def _is_integral(scaled: Floats) -> bool:
    return bool(((scaled == np.rint(scaled)) | np.isnan(scaled)).all())


def _is_doubtful(data: Floats) -> NDArray[np.bool_]:
    """Whether float32 represents a sum (zero, too), so that the sum needs a proof."""
    doubtful: NDArray[np.bool_] = ((data.view(np.int64) & BELOW_SINGLE) == 0) & ~np.isnan(data)
    return doubtful


def _certify(
    table: sparse.csr_array, recompute: Callable[[Callable[[Floats], Floats]], sparse.csr_array]
) -> sparse.csr_array:
    """A sum with rounded numbers: zeros and exact numbers without proof become unknown or inexact.

    Args:
        table: The sum. Entries that cancel may be missing.
        recompute: Computes the sum for other values of the operands, all of them positive.
    """
    entries = recompute(np.ones_like)
    if table.nnz == entries.nnz and not _is_doubtful(table.data).any():
        return table
    data = np.zeros(entries.nnz)
    data[np.searchsorted(_entry_keys(entries), _entry_keys(table))] = table.data
    proved = ~_is_doubtful(data)
    proved |= (entries.data == 1) & (recompute(_one_if_float32).data == 1) & (data != 0)
    for grid in GRIDS:
        if not proved.all():
            proved |= recompute(lambda x, grid=grid: _units(x, grid)).data <= BITS  # type: ignore[misc]
    inexact = np.where(data == 0, np.nan, np.nextafter(data, np.copysign(np.inf, data)))
    entries = _with_data(entries, np.where(proved, data, inexact))
    drop_zeros(entries)
    return entries


def _one_if_float32(data: Floats) -> Floats:
    return np.where((data.view(np.int64) & BELOW_SINGLE) == 0, 1.0, np.inf)


def _units(data: Floats, grid: float) -> Floats:
    """Absolute values in units of a grid; infinite off the grid."""
    size = np.abs(data) * grid
    return np.where(np.isnan(size), 1.0, np.where(size == np.rint(size), size, np.inf))


def _entry_keys(table: sparse.csr_array) -> NDArray[np.int64]:
    """Position of each entry in the flattened matrix, ascending."""
    rows = np.repeat(np.arange(table.shape[0], dtype=np.int64), np.diff(table.indptr))
    keys: NDArray[np.int64] = rows * table.shape[1] + table.indices
    return keys


def _with_data(table: sparse.csr_array, data: Floats) -> sparse.csr_array:
    """A table with the same entries and other values."""
    return sparse.csr_array((data, table.indices, table.indptr), shape=table.shape)


def _row_order(rows: Integers, count: int) -> Integers:
    """The stable order by rows: transposing a matrix with one entry per row is a counting sort."""
    starts = np.arange(len(rows) + 1)
    transposed = csr(np.ones(len(rows)), rows, starts, (len(rows), count)).tocsc()
    order: Integers = transposed.indices
    return order
