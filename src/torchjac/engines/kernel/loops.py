"""Which expressions are computed together, in one turn of one loop.

Lanes of different expressions that take one another's values are best computed in one turn, where
values are computed once and stay in registers. Such lanes make up a *cell*: a sample with all its
rows, an observation, a pair of bodies. Cells that look alike are the turns of one loop. Where maps
would tie everything to everything (neighbours on a grid, one camera of many observations) values
go through memory instead: a loop before writes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from torchjac.engines.kernel.expand import Scalars
from torchjac.engines.kernel.expressions import ONE, Lanes, Map, Places
from torchjac.errors import PlanRefused

# Lanes that a cell may have, of one kind; a few values that more take than this go through memory.
_LARGEST, _SHARED = 64, 4
# Kinds of cells, at one level.
_KINDS = 6
# Products up to which a value is computed again rather than kept in memory.
_CHEAP = 4


@dataclass(frozen=True, slots=True, eq=False)
class Store:
    """A value that is written.

    Attributes:
        expression: What is written.
        lanes: For each turn of the loop, which lane of it.
        array: Where to: the name of an array.
        positions: For each turn, where in it.
    """

    expression: int
    lanes: Places
    array: str
    positions: Places


@dataclass(frozen=True, slots=True, eq=False)
class Loop:
    """Turns that are alike.

    Attributes:
        size: How many.
        stores: What each one writes.
    """

    size: int
    stores: tuple[Store, ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Loops, in order.

    Attributes:
        loops: The loops; what has one lane is computed before them.
        kept: Expressions whose values go through memory, with the name and size of the array.
        fixed: For each output what it is where it does not vary, by position.
        single: For each output expressions of one lane, and where they go.
    """

    loops: tuple[Loop, ...]
    kept: dict[int, tuple[str, int]]
    fixed: tuple[tuple[Places, np.ndarray], ...]
    single: tuple[tuple[int, str, Places], ...]


def schedule(scalars: Scalars) -> Schedule:
    """Divides a program into loops.

    Where cells are too different from each other lanes stay apart, and all values that others take
    go through memory.
    """
    try:
        return _Scheduling(scalars, _SHARED).made()
    except _TooManyKinds:
        return _Scheduling(scalars, 0).made()


class _TooManyKinds(Exception):
    """Every kind of cell would be a loop."""


@dataclass(slots=True)
class _Edge:
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


class _Scheduling:
    def __init__(self, scalars: Scalars, shared: int):
        self._shared = shared
        self._scalars = scalars
        self._all = scalars.expressions.all
        self._kept: dict[int, tuple[str, int]] = {}
        self._needed = self._reachable()
        self._costs = self._costs_of()
        self._starts: dict[int, int] = {}  # of the lanes of a kind, among all lanes
        self._kinds: dict[int, Lanes] = {}
        for number in self._needed:
            lanes = self._all[number].lanes
            if self._is_computed(number) and id(lanes) not in self._starts:
                self._starts[id(lanes)] = sum(x.size for x in self._kinds.values())
                self._kinds[id(lanes)] = lanes
        self._total = sum(x.size for x in self._kinds.values())
        self._cells = np.arange(self._total)
        self._tied: list[_Edge] = []

    def made(self) -> Schedule:
        """The loops."""
        for edge in self._edges():
            self._tie(edge)
        for number in self._needed:
            expression = self._all[number]
            if expression.kind == "segments":
                self._keep(expression.arguments[0][0])
        fixed, single, stores = self._stores()
        levels = self._levels()
        loops = []
        for level in sorted(set(levels.values())):
            now = [s for s in stores if levels[s.expression] == level]
            now += [
                self._kept_store(n) for n in self._needed if n in self._kept and levels[n] == level
            ]
            loops += list(self._loops(now))
        return Schedule(tuple(loops), self._kept, fixed, single)

    def _reachable(self) -> list[int]:
        """Expressions that the outputs need, arguments first."""
        seen: set[int] = set()
        stack = [int(n) for numbers, _ in self._scalars.outputs for n in np.unique(numbers)]
        while stack:
            number = stack.pop()
            if number not in seen:
                seen.add(number)
                stack += [a for a, _ in self._all[number].arguments]
        return sorted(seen)  # arguments are made before what takes them

    def _is_computed(self, number: int) -> bool:
        """Whether it is computed in a loop."""
        expression = self._all[number]
        return expression.kind not in ("load", "constant") and expression.lanes is not ONE

    def _costs_of(self) -> dict[int, int]:
        """Products that it takes to compute each, from loads (what is shared counts again)."""
        costs: dict[int, int] = {}
        for number in self._needed:
            expression = self._all[number]
            inner = sum(costs[a] for a, _ in expression.arguments)
            if expression.kind == "segments":
                inner = 1000
            costs[number] = 0 if expression.lanes is ONE else min(inner + expression.cost, 10**6)
        return costs

    def _edges(self) -> list[_Edge]:
        """The maps, those first behind which most is computed."""
        found: dict[tuple[int, int, int], _Edge] = {}
        for number in self._needed:
            expression = self._all[number]
            if expression.kind == "segments":
                continue
            for argument, by in expression.arguments:
                if by is not None and self._is_computed(argument):
                    end = self._all[argument].lanes
                    key = id(expression.lanes), id(end), id(by)
                    edge = found.setdefault(key, _Edge(expression.lanes, end, by))
                    edge.arguments.add(argument)
        weight = {k: max(self._costs[a] for a in e.arguments) for k, e in found.items()}
        return [found[k] for k in sorted(found, key=lambda k: -weight[k])]

    def _tie(self, edge: _Edge) -> None:
        """Puts lanes into one cell, or values into memory where cells would get large."""
        shared = int(np.bincount(edge.by.places).max())
        if shared > self._shared * len(edge.arguments):
            self._part(edge)
            return
        start, end = self._starts[id(edge.start)], self._starts[id(edge.end)]
        one = self._cells[start : start + edge.start.size]
        other = self._cells[end : end + edge.end.size][edge.by.places]
        if np.array_equal(one, other):
            self._tied.append(edge)
            return
        count = int(self._cells.max()) + 1
        links = coo_array((np.ones(len(one), dtype=np.int8), (one, other)), shape=(count, count))
        found, merged = connected_components(links, directed=False)
        # Cells that were merged: only these have got larger.
        larger = np.bincount(merged, minlength=found)[merged] > 1
        cells = merged[self._cells]
        for kind, lanes in self._kinds.items():
            begin, stop = self._starts[kind], self._starts[kind] + lanes.size
            of = cells[begin:stop][larger[self._cells[begin:stop]]]
            if len(of) and np.bincount(of).max() > _LARGEST:
                self._part(edge)
                return
        self._cells = cells
        self._tied.append(edge)

    def _part(self, edge: _Edge) -> None:
        """Values go through memory from one cell to another, or are computed in both."""
        for argument in edge.arguments:
            if self._costs[argument] > _CHEAP:
                self._keep(argument)

    def _keep(self, number: int) -> None:
        if number not in self._kept and self._is_computed(number):
            size = self._all[number].lanes.size
            self._kept[number] = (f"kept{len(self._kept)}", size)

    def _levels(self) -> dict[int, int]:
        """How often values go through memory before each expression."""
        levels: dict[int, int] = {}
        for number in self._needed:
            levels[number] = max(
                (
                    levels[a] + (a in self._kept and self._is_computed(number))
                    for a, _ in self._all[number].arguments
                ),
                default=0,
            )
        return levels

    def _kept_store(self, number: int) -> Store:
        every = np.arange(self._all[number].lanes.size)
        return Store(number, every, self._kept[number][0], every)

    def _stores(self) -> tuple[tuple[tuple[Places, np.ndarray], ...], tuple, list[Store]]:  # type: ignore[type-arg]
        """What outputs are: fixed numbers, expressions of one lane, and values of loops."""
        fixed, single, stores = [], [], []
        for i, (numbers, lanes) in enumerate(self._scalars.outputs):
            order = np.argsort(numbers, kind="stable")
            cuts = np.flatnonzero(np.diff(numbers[order])) + 1
            places: list[Places] = []
            values: list[np.ndarray] = []
            for part in np.split(order, cuts) if len(order) else []:
                number = int(numbers[part[0]])
                value = self._scalars.expressions.value(number)
                if value is not None:
                    places.append(part)
                    values.append(np.full(len(part), value))
                elif self._all[number].lanes is ONE:
                    single.append((number, f"out{i}", part))
                else:
                    stores += list(_ranked(number, lanes[part], f"out{i}", part))
            empty = np.zeros(0, dtype=np.int64)
            fixed.append((np.concatenate([empty, *places]), np.concatenate([np.zeros(0), *values])))
        return tuple(fixed), tuple(single), stores

    def _loops(self, stores: list[Store]) -> Iterator[Loop]:
        """Loops over cells that are alike, for values that can be computed now."""
        computed = [s for s in stores if self._is_computed(s.expression)]
        yield from (Loop(len(s.lanes), (s,)) for s in stores if not self._is_computed(s.expression))
        if not computed:
            return
        cells = [
            self._cells[self._starts[id(self._all[s.expression].lanes)] + s.lanes] for s in computed
        ]
        slots = self._slots()
        # What a cell looks like: which stores it has, of which of its lanes.
        rows = np.concatenate(cells)
        which = np.concatenate([np.full(len(c), k) for k, c in enumerate(cells)])
        slot = np.concatenate(
            [slots[self._starts[id(self._all[s.expression].lanes)] + s.lanes] for s in computed]
        )
        item = np.concatenate([np.arange(len(c)) for c in cells])
        order = np.lexsort((slot, which, rows))
        rows, which, slot, item = rows[order], which[order], slot[order], item[order]
        first = np.flatnonzero(np.append(True, np.diff(rows)))
        counts = np.diff(np.append(first, len(rows)))
        looks = self._looks(rows[first])
        stored = _identified(np.stack([which, slot], axis=1), np.append(first, len(rows)))
        _, kinds = np.unique(np.stack([stored, looks]), axis=1, return_inverse=True)
        kinds = kinds.reshape(-1)
        found = int(kinds.max()) + 1
        if found > _KINDS and self._shared:
            raise _TooManyKinds
        order = np.argsort(kinds, kind="stable")
        for members in np.split(order, np.cumsum(np.bincount(kinds, minlength=found))[:-1]):
            begin = first[members]
            stores_of = []
            for k in range(int(counts[members[0]])):
                store = computed[int(which[begin[0] + k])]
                chosen = item[begin + k]
                stores_of.append(
                    Store(
                        store.expression, store.lanes[chosen], store.array, store.positions[chosen]
                    )
                )
            yield Loop(len(members), tuple(stores_of))

    def _slots(self) -> Places:
        """For each lane its number among those of its kind in its cell."""
        slots = np.zeros(self._total, dtype=np.int64)
        for kind, lanes in self._kinds.items():
            begin = self._starts[kind]
            of = self._cells[begin : begin + lanes.size]
            order = np.argsort(of, kind="stable")
            sorted_ = of[order]
            starts = np.flatnonzero(np.append(True, np.diff(sorted_)))
            sizes = np.diff(np.append(starts, len(sorted_)))
            slots[begin + order] = np.arange(len(sorted_)) - np.repeat(starts, sizes)
        return slots

    def _looks(self, cells: Places) -> Places:
        """For each cell a number that says which of its lanes take the values of which."""
        slots = self._slots()
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
        order = np.lexsort((every[:, 1], every[:, 0], owner))
        starts = np.searchsorted(owner[order], np.arange(len(cells) + 1))
        return _identified(every[order], starts)


def _identified(facts: Places, starts: Places) -> Places:
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
        whole = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.itemsize * rows.shape[1])))
        _, which = np.unique(whole, return_inverse=True)
        numbers[members] = numbers.max() + 1 + which.reshape(-1)
    return numbers


def _ranked(number: int, lanes: Places, array: str, positions: Places) -> Iterator[Store]:
    """Stores of a value, none of which writes one lane twice."""
    order = np.argsort(lanes, kind="stable")
    lanes, positions = lanes[order], positions[order]
    starts = np.flatnonzero(np.append(True, np.diff(lanes)))
    sizes = np.diff(np.append(starts, len(lanes)))
    rank = np.arange(len(lanes)) - np.repeat(starts, sizes)
    if sizes.max() > _LARGEST:
        raise PlanRefused("a value that varies is written to very many places")
    for k in range(int(sizes.max())):
        chosen = rank == k
        yield Store(number, lanes[chosen], array, positions[chosen])
