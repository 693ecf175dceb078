"""Groups of rows (or columns) that no column (row) has two entries of: they share a pass.

A greedy partial distance-2 coloring of the pattern. Vertices are taken in a random order, all that
can be decided at once together: in each round every vertex left picks the smallest color that no
neighbor has, and where two neighbors pick the same one, the one that comes first in the order
keeps it. The result is the one of the sequential greedy algorithm with conflicts resolved by that
order (M. T. Jones and P. E. Plassmann, "A parallel graph coloring heuristic", 1993), in about
log m rounds of array operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from torchjac.sparsity.pattern import Pattern

# Fewer rows than this many times the number of groups: groups would not save enough passes.
_WORTH = 1.2
_WORD = 64


@dataclass(frozen=True, slots=True, eq=False)
class Grouping:
    """Rows (or columns) in groups.

    Attributes:
        of: Group of each row; -1 for a row without entries.
        count: Number of groups.
        bound: No grouping has fewer.
    """

    of: NDArray[Any]
    count: int
    bound: int


_rows: WeakKeyDictionary[Pattern, Grouping] = WeakKeyDictionary()
_columns: WeakKeyDictionary[Pattern, Grouping] = WeakKeyDictionary()


def row_groups(pattern: Pattern) -> Grouping:
    """Groups of rows of which each column has at most one entry."""
    if pattern not in _rows:
        counts = pattern.column_counts
        _rows[pattern] = _grouped(pattern.starts, pattern.columns, pattern.shape[1], counts)
    return _rows[pattern]


def column_groups(pattern: Pattern) -> Grouping:
    """Groups of columns of which each row has at most one entry."""
    if pattern not in _columns:
        turned = pattern.to_scipy().T.tocsr()
        counts = pattern.row_counts
        _columns[pattern] = _grouped(turned.indptr, turned.indices, pattern.shape[0], counts)
    return _columns[pattern]


def _grouped(
    starts: NDArray[Any], others: NDArray[Any], width: int, counts: NDArray[Any]
) -> Grouping:
    """Colors the vertices that `starts` delimits; vertices with a common element of `others`.

    Args:
        starts: Where the elements of each vertex begin, and their number at the end.
        others: The elements.
        width: How many different ones there are.
        counts: Vertices that each of them belongs to.
    """
    size = np.diff(starts)
    bound = int(counts.max(initial=0))
    filled = np.flatnonzero(size)
    if len(filled) <= _WORTH * bound:  # about as many groups as vertices: each its own
        of = np.full(len(size), -1)
        of[filled] = np.arange(len(filled))
        return Grouping(of, len(filled), bound)
    cyclic = _cyclic(size, others, bound)
    if cyclic is not None:
        return Grouping(cyclic, bound, bound)
    of = np.full(len(size), -1)
    order = np.random.default_rng(0).permutation(filled)
    # Vertices that come first are stored last: they then win in an assignment with repetitions.
    left = order[::-1].copy()
    taken = np.zeros((width, 1), dtype=np.uint64)
    while len(left):
        entries, begin = _entries(left, starts, size, others)
        choice, taken = _smallest_free(taken, entries, begin)
        each = np.repeat(choice, size[left])
        word = entries.astype(np.int64) * (_WORD * taken.shape[1]) + each
        winner = _last_of(word)
        wins = np.logical_and.reduceat(winner, begin)
        of[left[wins]] = choice[wins]
        mine = np.repeat(wins, size[left])
        color = each[mine]
        bit = np.uint64(1) << (color % _WORD).astype(np.uint64)
        np.bitwise_or.at(taken, (entries[mine], color // _WORD), bit)
        left = left[~wins]
    return Grouping(of, int(of.max()) + 1, bound)


def _cyclic(size: NDArray[Any], others: NDArray[Any], bound: int) -> NDArray[Any] | None:
    """Every `bound`-th vertex in one group, if that will do: it does for bands and blocks."""
    of = np.arange(len(size)) % bound
    keys = np.sort(others.astype(np.int64) * bound + np.repeat(of, size))
    if (keys[1:] == keys[:-1]).any():
        return None
    of[size == 0] = -1
    return of


def _entries(
    vertices: NDArray[Any], starts: NDArray[Any], size: NDArray[Any], others: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Elements of some vertices one after the other, and where those of each begin."""
    mine = size[vertices]
    begin = np.cumsum(mine) - mine
    where = np.arange(mine.sum()) + np.repeat(starts[vertices] - begin, mine)
    return others[where], begin


def _smallest_free(
    taken: NDArray[np.uint64], entries: NDArray[Any], begin: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[np.uint64]]:
    """Smallest color free at all elements of each vertex; more room for colors if need be."""
    used = np.bitwise_or.reduceat(taken[entries], begin, axis=0)
    free = ~used
    full = free == 0
    if full.all(1).any():
        taken = np.concatenate([taken, np.zeros((len(taken), 1), np.uint64)], axis=1)
        return _smallest_free(taken, entries, begin)
    word = np.argmin(full, axis=1)
    bits = free[np.arange(len(free)), word]
    lowest = bits & (~bits + np.uint64(1))
    return word * _WORD + np.log2(lowest.astype(np.float64)).astype(np.int64), taken


def _last_of(keys: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each entry is the last one with its key."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    last = np.ones(len(keys), dtype=bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    found = np.empty(len(keys), dtype=bool)
    found[order] = last
    return found
