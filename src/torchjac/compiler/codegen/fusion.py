"""Cells: lanes of different expressions that are computed in one turn of a loop."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from torchjac.compiler.codegen.scalar_ir import Lanes, Map, Places

# Lanes that a cell may have, of one kind; lanes that may take one value, for each value taken.
LARGEST, _SHARED = 64, 4
# Which lanes go together: all that one of them takes or is taken by, those that each cell has as
# many of, or none.
Ties = Literal["all", "even", "none"]


@dataclass(slots=True)
class Edge:
    """A map from the lanes of expressions to those of their arguments.

    Attributes:
        start: Whence.
        end: Whereto.
        by: The map.
        arguments: The arguments that are reached by it.
    """

    start: Lanes
    end: Lanes
    by: Map
    arguments: set[int] = field(default_factory=set)

    @property
    def is_even(self) -> bool:
        """Whether each lane at its end belongs to as many at its start, more than one."""
        counts = np.bincount(self.by.places, minlength=self.end.size)
        return bool(counts[0] > 1 and (counts == counts[0]).all())


class Cells:
    """Which lanes go together: at first none.

    Args:
        kinds: All lanes.
        ties: Which of them may.
    """

    def __init__(self, kinds: Iterable[Lanes], ties: Ties):
        """Begins with a cell for each lane."""
        self._ties = ties
        self._starts: dict[int, int] = {}  # of the lanes of a kind, among all lanes
        self._kinds: dict[int, Lanes] = {}
        total = 0
        for lanes in kinds:
            if id(lanes) not in self._starts:
                self._starts[id(lanes)], self._kinds[id(lanes)] = total, lanes
                total += lanes.size
        self._cells = np.arange(total)
        self._tied: list[Edge] = []

    def of(self, lanes: Lanes, places: Places) -> Places:
        """The cells of some lanes."""
        return np.asarray(self._cells[self._starts[id(lanes)] + places])

    def slots_of(self, lanes: Lanes, places: Places, slots: Places) -> Places:
        """The numbers of some lanes in their cells.

        Args:
            lanes: Their kind.
            places: Which ones.
            slots: Those of all lanes, as `slots` gives them.
        """
        return np.asarray(slots[self._starts[id(lanes)] + places])

    def tie(self, edge: Edge) -> bool:
        """Puts lanes into one cell; false where cells would get large, or all different."""
        shared = int(np.bincount(edge.by.places).max())
        if self._ties == "none" or shared > _SHARED * len(edge.arguments):
            return False
        start, end = self._starts[id(edge.start)], self._starts[id(edge.end)]
        one = self._cells[start : start + edge.start.size]
        other = self._cells[end : end + edge.end.size][edge.by.places]
        if np.array_equal(one, other):
            self._tied.append(edge)
            return True
        if self._ties == "even" and not edge.is_even:
            if not self._joins_evenly(edge, one, other):
                return False
            self._cells[start : start + edge.start.size] = other
            self._tied.append(edge)
            return True
        count = int(self._cells.max()) + 1
        links = coo_array((np.ones(len(one), dtype=np.int8), (one, other)), shape=(count, count))
        found, merged = connected_components(links, directed=False)
        # Cells that were merged: only these have got larger. They get numbers of their own.
        larger = np.bincount(merged, minlength=found) > 1
        number = np.where(larger, np.cumsum(larger) - 1, -1)[merged]
        for kind, lanes in self._kinds.items():
            begin, stop = self._starts[kind], self._starts[kind] + lanes.size
            of = number[self._cells[begin:stop]]
            of = of[of >= 0]
            if len(of) and np.bincount(of).max() > LARGEST:
                return False
        self._cells = merged[self._cells]
        self._tied.append(edge)
        return True

    def _joins_evenly(self, edge: Edge, one: Places, other: Places) -> bool:
        """Whether lanes that are in no cell yet come to cells that get as many each.

        Args:
            edge: From these lanes.
            one: Their cells.
            other: The cells that they would come to.
        """
        sizes = np.bincount(self._cells)
        if (sizes[one] > 1).any():
            return False
        end = self._starts[id(edge.end)]
        counts = np.bincount(other, minlength=len(sizes))
        counts = counts[np.unique(self._cells[end : end + edge.end.size])]
        return 0 < counts[0] <= LARGEST and bool((counts == counts[0]).all())

    def slots(self) -> Places:
        """For each lane its number among those of its kind in its cell."""
        slots = np.zeros(len(self._cells), dtype=np.int64)
        for kind, lanes in self._kinds.items():
            begin = self._starts[kind]
            of = self._cells[begin : begin + lanes.size]
            order = np.argsort(of, kind="stable")
            sorted_ = of[order]
            starts = np.flatnonzero(np.append(True, np.diff(sorted_)))
            sizes = np.diff(np.append(starts, len(sorted_)))
            slots[begin + order] = np.arange(len(sorted_)) - np.repeat(starts, sizes)
        return slots

    def looks(self, cells: Places) -> Places:
        """For each cell a number that says which of its lanes take the values of which."""
        slots = self.slots()
        position = np.full(int(self._cells.max()) + 1, -1)
        position[cells] = np.arange(len(cells))
        facts: list[Places] = []
        owners: list[Places] = []
        for k, edge in enumerate(self._tied):
            start = self._starts[id(edge.start)]
            end = self._starts[id(edge.end)]
            here = np.arange(start, start + edge.start.size)
            owner = position[self._cells[here]]
            there = slots[end + edge.by.places]
            kept = owner >= 0
            facts.append(np.stack([np.full(kept.sum(), k), slots[here][kept], there[kept]], axis=1))
            owners.append(owner[kept])
        if not facts:
            return np.zeros(len(cells), dtype=np.int64)
        every, owner = np.concatenate(facts), np.concatenate(owners)
        order = np.argsort(owner, kind="stable")  # edge by edge, and slot by slot, as they are
        starts = np.searchsorted(owner[order], np.arange(len(cells) + 1))
        return identified(every[order], starts)


def identified(facts: Places, starts: Places) -> Places:
    """A number for each part of an array, the same for parts that hold the same.

    Args:
        facts: Rows.
        starts: Where each part begins, and the end.
    """
    sizes = np.diff(starts)
    numbers = np.zeros(len(sizes), dtype=np.int64)
    for size in np.unique(sizes).tolist():
        members = np.flatnonzero(sizes == size)
        rows = facts[starts[members][:, None] + np.arange(size)].reshape(len(members), -1)
        if not rows.shape[1]:
            continue
        numbers[members] = numbers.max() + 1 + _alike(rows)
    return numbers


def _alike(rows: Places) -> Places:
    """A number for each row, the same for rows that are equal.

    Sums of products with random numbers are nearly always different where rows are; that is looked
    at. To sort rows themselves takes twenty times as long.
    """
    weights = np.random.default_rng(0).integers(1, 2**62, rows.shape[1])
    _, first, which = np.unique(rows @ weights, return_index=True, return_inverse=True)
    if np.array_equal(rows[first][which], rows):
        return np.asarray(which)
    _, which = np.unique(rows, axis=0, return_inverse=True)
    return np.asarray(which).reshape(-1)
