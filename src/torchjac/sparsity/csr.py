"""CSR tables of factors: NaN is a factor that is not known, no entry is ever a stored zero.

Sums follow the rules of `maps.factors`: an entry is gone only where exact numbers cancel, and a
number that was rounded never looks exact.
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

# From this many rows on, entries are put in the order of most rows first, so that few need sorting
# (heat equation, n = 10**6: 28 ms without, 13 ms with; below, finding that order costs more).
_LARGE = 2**14

Floats = NDArray[np.float64]
Integers = NDArray[np.integer]


def csr(
    data: Floats, indices: Integers, starts: Integers, shape: tuple[int, int]
) -> sparse.csr_array:
    """A CSR matrix with 32-bit indices where they fit; it may share memory with the arrays."""
    kind = np.int32 if max(len(indices), *shape) < 2**31 else np.int64
    parts = data, indices.astype(kind, copy=False), starts.astype(kind, copy=False)
    return sparse.csr_array(parts, shape=shape)


def numbered(shape: tuple[int, ...]) -> Tensor:
    """The rows of a new table, one for each element."""
    size = math.prod(shape)
    return torch.arange(size, dtype=torch.int32 if size < 2**31 else torch.int64).reshape(shape)


def first_row(shape: tuple[int, ...]) -> Tensor:
    """The row of a table that has one, for every element."""
    return torch.zeros((), dtype=torch.int32).expand(shape)


def of_same_rows(one: Known, other: Known, table: sparse.csr_array | None) -> Known:
    """The sum of factors of the same rows of a table, which cancel only if the rows are known.

    Elements that share a row whose entries are not known depend on the same rows of J, by numbers
    that need not be the same.
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


def of_rows(data: Floats, rows: Integers, table: sparse.csr_array | None) -> Floats:
    """Factors of rows of a table, to be added up: unknown where they might cancel and must not."""
    if table is None or not (np.any(data < 0) and np.any(data > 0)):
        return data
    unknown = np.isnan(table.data)
    if not unknown.any():
        return data
    hidden = np.zeros(table.shape[0], dtype=bool)
    hidden[np.repeat(np.arange(table.shape[0]), np.diff(table.indptr))[unknown]] = True
    return np.where((data != 0) & hidden[rows], UNKNOWN, data)


def by_rows(
    rows: Integers, columns: Integers, data: Floats, shape: tuple[int, int]
) -> sparse.csr_array:
    """A CSR matrix from entries in any order; repeated ones are added."""
    kept = data != 0
    if not kept.all():
        rows, columns, data = rows[kept], columns[kept], data[kept]
    starts = np.zeros(shape[0] + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=shape[0]), out=starts[1:])
    order = _sorting(rows, shape[0])
    return summed(csr(data[order], columns[order], starts, shape))


def summed(table: sparse.csr_array) -> sparse.csr_array:
    """Repeated entries added; those that cancel exactly are gone. The argument is used up."""
    table.sort_indices()
    if table.has_canonical_format:
        return table
    data = table.data
    if np.isnan(data).all():
        table.sum_duplicates()
        return table
    terms = int(np.diff(table.indptr).max(initial=0))
    exact = is_exact(data, terms)
    before = None if exact else table.copy()
    table.sum_duplicates()
    if before is not None and _is_doubtful(table.data).any():

        def again(count: Callable[[Floats], Floats]) -> sparse.csr_array:
            same = _with(before.copy(), count(before.data))
            same.sum_duplicates()
            return same

        return _settled(table, again)
    drop_zeros(table)
    return table


def stacked(
    columns: Sequence[Integers], factors: Sequence[float | Floats], width: int
) -> sparse.csr_array:
    """A matrix with a row per element and the sum of one entry per array in it."""
    shape, size, count = columns[0].shape, columns[0].size, len(columns)
    order = list(range(count))
    if size >= _LARGE and count > 1:
        order = sorted(order, key=lambda k: _offset(columns[k], factors[k]))
    indices = np.empty((*shape, count), dtype=np.int32 if width < 2**31 else np.int64)
    data = np.empty((*shape, count))
    for place, k in enumerate(order):
        indices[..., place] = columns[k]
        data[..., place] = factors[k]
    starts = np.arange(0, data.size + 1, count)
    made = csr(data.reshape(-1), indices.reshape(-1), starts, (size, width))
    drop_zeros(made)
    return ordered(made)


def laid_out(
    columns: Sequence[Integers],
    factors: Sequence[Floats],
    parts: Sequence[sparse.csr_array | None],
    width: int,
) -> tuple[sparse.csr_array, sparse.csr_array | None]:
    """A sum over tables as a product of two: `factors[k][i, j]` times row `columns[k][i, j]`.

    Args:
        columns: For each table numbers of its rows; all have as many rows.
        factors: For each of them a factor.
        parts: The tables; None everywhere for the identity.
        width: Columns of the identity.

    Returns:
        The left factor, with repeated entries, and the tables, one beneath the other.
    """
    stack = list({id(p): p for p in parts if p is not None}.values())
    first = dict(
        zip(map(id, stack), accumulate((p.shape[0] for p in stack), initial=0), strict=False)
    )
    right = sparse.vstack(stack, format="csr") if len(stack) > 1 else next(iter(stack), None)
    height = width if right is None else right.shape[0]
    kind = np.dtype(np.int32 if height < 2**31 else np.int64)
    moved = [
        np.add(column, first.get(id(part), 0), dtype=kind)
        for column, part in zip(columns, parts, strict=True)
    ]
    wide, data = np.concatenate(moved, 1), np.concatenate(factors, 1)
    starts = np.arange(0, wide.size + 1, wide.shape[1])
    left = csr(data.ravel(), wide.ravel(), starts, (len(wide), height))
    drop_zeros(left)
    return left, right


def _offset(columns: Integers, factors: float | Floats) -> float:
    """How far right of the diagonal entries are: most rows of a stencil are in that order."""
    some = np.linspace(0, columns.size - 1, 13, dtype=np.int64)[1:-1]
    at = np.unravel_index(some, columns.shape)
    offsets = columns[at] - some
    if not isinstance(factors, float):
        offsets = offsets[factors[at] != 0]
    return float(np.median(offsets)) if len(offsets) else 0.0


def ordered(table: sparse.csr_array) -> sparse.csr_array:
    """The same as `summed`, for rows of which most are sorted. The argument is used up."""
    indices, starts = table.indices, table.indptr
    falls = indices[1:] <= indices[:-1]
    ends = starts[1:-1]
    falls[ends[(ends > 0) & (ends < len(indices))] - 1] = False
    found = falls.nonzero()[0]
    if not len(found):
        return table
    if 4 * len(found) > table.shape[0]:
        return summed(table)
    rows = np.unique(np.searchsorted(starts, found, side="right") - 1)
    part = table[rows]
    count = part.nnz
    part.sum_duplicates()
    if part.nnz < count:
        return summed(table)
    slots = np.repeat(starts[rows] - part.indptr[:-1], np.diff(part.indptr)) + np.arange(count)
    indices[slots] = part.indices
    table.data[slots] = part.data
    return csr(table.data, indices, starts, table.shape)


def drop_zeros(table: sparse.csr_array) -> None:
    """Removes stored zeros, in place."""
    if not table.data.all():
        table.eliminate_zeros()


def times(left: sparse.csr_array, right: sparse.csr_array) -> sparse.csr_array:
    """The product."""
    made = left @ right
    made.sort_indices()
    if np.isnan(left.data).all() or np.isnan(right.data).all():
        return made
    terms = int(np.diff(left.indptr).max(initial=0))
    if _span(left.data) * _span(right.data) * terms <= BITS:
        drop_zeros(made)
        return made

    def again(count: Callable[[Floats], Floats]) -> sparse.csr_array:
        same = _with(left, count(left.data)) @ _with(right, count(right.data))
        same.sort_indices()
        return same

    return _settled(made, again)


def added(a: sparse.csr_array, b: sparse.csr_array) -> sparse.csr_array:
    """The sum."""
    made = a + b
    if is_exact(a.data, 2) and is_exact(b.data, 2):
        return made
    return _settled(made, lambda count: _with(a, count(a.data)) + _with(b, count(b.data)))


def columns_used(table: sparse.csr_array) -> NDArray[np.bool_]:
    """Whether each column has an entry."""
    used = np.zeros(table.shape[1], dtype=bool)
    used[table.indices] = True
    return used


def is_exact(data: Floats, terms: int = 1) -> bool:
    """Whether sums of this many of the known numbers carry no rounding, even in float32."""
    return _span(data) * terms <= BITS


def _span(data: Floats) -> float:
    """The largest known number in units of a grid that all of them are on; infinite without one."""
    # Most often a few numbers tell that there is none; and often nothing is known.
    some = np.abs(data[:: len(data) // 256 + 1])
    grids = [g for g in GRIDS if _is_on(some * g)]
    unknown = np.isnan(data) if grids else None
    if unknown is None or unknown.all():
        return np.inf if unknown is None else 0.0
    size = np.abs(data)
    for grid in grids:
        scaled = size * grid
        if _is_on(scaled):
            return float(np.max(scaled, initial=0.0, where=~unknown))
    return np.inf


def _is_on(scaled: Floats) -> bool:
    return bool(((scaled == np.rint(scaled)) | np.isnan(scaled)).all())


def _is_doubtful(data: Floats) -> NDArray[np.bool_]:
    """Whether a sum is zero or looks exact."""
    found: NDArray[np.bool_] = ((data.view(np.int64) & BELOW_SINGLE) == 0) & ~np.isnan(data)
    return found


def _settled(
    made: sparse.csr_array, again: Callable[[Callable[[Floats], Floats]], sparse.csr_array]
) -> sparse.csr_array:
    """A sum of numbers of which some were rounded, with what that says of its entries.

    Args:
        made: The sum. Entries that cancel may be missing.
        again: The same sum of other numbers, all positive, on the entries of the same operands.
    """
    entries = again(np.ones_like)
    if made.nnz == entries.nnz and not _is_doubtful(made.data).any():
        return made
    data = np.zeros(entries.nnz)
    data[np.searchsorted(_keys(entries), _keys(made))] = made.data
    proved = ~_is_doubtful(data)
    proved |= (entries.data == 1) & (again(_one_if_single).data == 1) & (data != 0)
    for grid in GRIDS:
        if not proved.all():
            proved |= again(lambda x, grid=grid: _units(x, grid)).data <= BITS  # type: ignore[misc]
    moved = np.where(data == 0, np.nan, np.nextafter(data, np.copysign(np.inf, data)))
    entries = _with(entries, np.where(proved, data, moved))
    drop_zeros(entries)
    return entries


def _one_if_single(data: Floats) -> Floats:
    return np.where((data.view(np.int64) & BELOW_SINGLE) == 0, 1.0, np.inf)


def _units(data: Floats, grid: float) -> Floats:
    """Absolute values in units of a grid; infinite off the grid."""
    size = np.abs(data) * grid
    return np.where(np.isnan(size), 1.0, np.where(size == np.rint(size), size, np.inf))


def _keys(table: sparse.csr_array) -> NDArray[np.int64]:
    """A number for each entry, ascending."""
    rows = np.repeat(np.arange(table.shape[0], dtype=np.int64), np.diff(table.indptr))
    keys: NDArray[np.int64] = rows * table.shape[1] + table.indices
    return keys


def _with(table: sparse.csr_array, data: Floats) -> sparse.csr_array:
    """The same entries with other numbers."""
    return sparse.csr_array((data, table.indices, table.indptr), shape=table.shape)


def _sorting(rows: Integers, count: int) -> Integers:
    """The stable order by rows: turning a matrix with an entry a row around sorts by counting."""
    starts = np.arange(len(rows) + 1)
    turned = csr(np.ones(len(rows)), rows, starts, (len(rows), count)).tocsc()
    order: Integers = turned.indices
    return order
