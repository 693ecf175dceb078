"""Groups of structurally orthogonal rows (or columns): the rows of a group share a pass.

Rows are structurally orthogonal if no column has entries in two of them. The groups are a greedy
partial distance-2 coloring of the pattern, in a random order of the vertices. In each round every
uncolored vertex picks the smallest color that no neighbor has. Of two neighbors that pick the same
color, the vertex that comes first in the order keeps the color. The algorithm is the parallel
greedy coloring of M. T. Jones and P. E. Plassmann, "A parallel graph coloring heuristic", 1993, and
takes about log m rounds of array operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from torchjac.sparsity.pattern import Pattern

# Rows per group: below this ratio coloring saves too few passes, and each row is a group.
_MIN_ROWS_PER_GROUP = 1.2
# Bits of a word in the bit sets of colors.
_WORD_BITS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Grouping:
    """Groups of rows (or columns).

    Attributes:
        group_of: Group of each row; -1 for a row without entries.
        count: Number of groups.
        lower_bound: Least number of groups that any grouping has.
    """

    group_of: NDArray[Any]
    count: int
    lower_bound: int


_row_groups: WeakKeyDictionary[Pattern, Grouping] = WeakKeyDictionary()
_column_groups: WeakKeyDictionary[Pattern, Grouping] = WeakKeyDictionary()


def row_groups(pattern: Pattern) -> Grouping:
    """Groups of rows of which each column has at most one entry."""
    if pattern not in _row_groups:
        counts = pattern.column_counts
        _row_groups[pattern] = _color(pattern.starts, pattern.columns, pattern.shape[1], counts)
    return _row_groups[pattern]


def column_groups(pattern: Pattern) -> Grouping:
    """Groups of columns of which each row has at most one entry."""
    if pattern not in _column_groups:
        csc = pattern.to_scipy().T.tocsr()
        counts = pattern.row_counts
        _column_groups[pattern] = _color(csc.indptr, csc.indices, pattern.shape[0], counts)
    return _column_groups[pattern]


def _color(
    starts: NDArray[Any], elements: NDArray[Any], width: int, counts: NDArray[Any]
) -> Grouping:
    """Colors vertices so that vertices with a common element have different colors.

    Args:
        starts: First position of each vertex in `elements`, and the total at the end.
        elements: Elements of all vertices, vertex by vertex.
        width: Number of different elements.
        counts: Number of vertices of each element.
    """
    size = np.diff(starts)
    lower_bound = int(counts.max(initial=0))
    filled = np.flatnonzero(size)
    if len(filled) <= _MIN_ROWS_PER_GROUP * lower_bound:
        group_of = np.full(len(size), -1)
        group_of[filled] = np.arange(len(filled))
        return Grouping(group_of, len(filled), lower_bound)
    cyclic = _cyclic_groups(size, elements, lower_bound)
    if cyclic is not None:
        return Grouping(cyclic, lower_bound, lower_bound)
    group_of = np.full(len(size), -1)
    order = np.random.default_rng(0).permutation(filled)
    # The first vertices of the order are stored last: NumPy keeps the last of repeated assignments.
    uncolored = order[::-1].copy()
    used_colors = np.zeros((width, 1), dtype=np.uint64)
    while len(uncolored):
        entries, begin = _elements_of(uncolored, starts, size, elements)
        choice, used_colors = _smallest_free(used_colors, entries, begin)
        entry_color = np.repeat(choice, size[uncolored])
        key = entries.astype(np.int64) * (_WORD_BITS * used_colors.shape[1]) + entry_color
        first_in_order = _is_last_of_key(key)
        wins = np.logical_and.reduceat(first_in_order, begin)
        group_of[uncolored[wins]] = choice[wins]
        entry_wins = np.repeat(wins, size[uncolored])
        color = entry_color[entry_wins]
        bit = np.uint64(1) << (color % _WORD_BITS).astype(np.uint64)
        np.bitwise_or.at(used_colors, (entries[entry_wins], color // _WORD_BITS), bit)
        uncolored = uncolored[~wins]
    return Grouping(group_of, int(group_of.max()) + 1, lower_bound)


def _cyclic_groups(size: NDArray[Any], elements: NDArray[Any], count: int) -> NDArray[Any] | None:
    """Groups of every `count`-th vertex, valid for bands and blocks; None if two vertices clash."""
    group_of = np.arange(len(size)) % count
    keys = np.sort(elements.astype(np.int64) * count + np.repeat(group_of, size))
    if (keys[1:] == keys[:-1]).any():
        return None
    group_of[size == 0] = -1
    return group_of


def _elements_of(
    vertices: NDArray[Any], starts: NDArray[Any], size: NDArray[Any], elements: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Elements of some vertices, vertex by vertex, and the first position of each vertex."""
    sizes = size[vertices]
    begin = np.cumsum(sizes) - sizes
    positions = np.arange(sizes.sum()) + np.repeat(starts[vertices] - begin, sizes)
    return elements[positions], begin


def _smallest_free(
    used_colors: NDArray[np.uint64], entries: NDArray[Any], begin: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[np.uint64]]:
    """Smallest color free at all elements of each vertex, and the bit sets, widened if full."""
    used = np.bitwise_or.reduceat(used_colors[entries], begin, axis=0)
    free = ~used
    full = free == 0
    if full.all(1).any():
        empty = np.zeros((len(used_colors), 1), np.uint64)
        return _smallest_free(np.concatenate([used_colors, empty], axis=1), entries, begin)
    word = np.argmin(full, axis=1)
    bits = free[np.arange(len(free)), word]
    lowest = bits & (~bits + np.uint64(1))
    color = word * _WORD_BITS + np.log2(lowest.astype(np.float64)).astype(np.int64)
    return color, used_colors


def _is_last_of_key(keys: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each entry is the last one with its key."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    last = np.ones(len(keys), dtype=bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    is_last = np.empty(len(keys), dtype=bool)
    is_last[order] = last
    return is_last
