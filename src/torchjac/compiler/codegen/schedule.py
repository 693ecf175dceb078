"""Which expressions are computed together, in one turn of one loop.

Lanes of different expressions that take one another's values are best computed in one turn, where
values are computed once and stay in registers. Such lanes make up a *cell*: a sample with all its
rows, an observation, a pair of bodies. Cells that look alike are the turns of one loop. Where maps
would tie everything to everything (neighbours on a grid, one camera of many observations) values
go through memory instead: a loop before writes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from torchjac.compiler.codegen.fusion import LARGEST, Cells, Edge, Ties, identified
from torchjac.compiler.codegen.granularity import ScalarProgram
from torchjac.compiler.codegen.scalar_ir import ONE, ArrayRef, Places, loaded
from torchjac.errors import PlanRefused

# Kinds of cells, at one level.
_KINDS = 6
# Products up to which a value is computed again rather than kept in memory.
_CHEAP = 4
# Values that loops write from which on threads may be worth it.
_MANY = 8192


class ScheduleKind(Enum):
    """How a target runs the loops of a program.

    Attributes:
        SERIAL: Loop by loop.
        PARALLEL: The same, a call runs a part of the turns of each loop; calls of all parts wait
            for each other where a loop reads what one of another level kept.
        TENSORS: Every expression is a loop of its own over its lanes; products of matrices are
            whole. The loops of the program say what is written.
        BATCH: One loop, each turn is a sample; a call runs some of any number of samples.
        BATCH_TENSORS: The same, the expressions of a sample being run as those of `TENSORS`.
    """

    SERIAL = "serial loops"
    PARALLEL = "parallel loops"
    TENSORS = "tensor loops"
    BATCH = "a batch loop"
    BATCH_TENSORS = "batch tensor loops"


@dataclass(frozen=True, slots=True, eq=False)
class Store:
    """A value that is written.

    Attributes:
        expression: What is written.
        lanes: For each turn of the loop, which lane of it.
        array: Where to.
        positions: For each turn, where in it.
    """

    expression: int
    lanes: Places
    array: ArrayRef
    positions: Places


@dataclass(frozen=True, slots=True, eq=False)
class Loop:
    """Turns that are alike.

    Attributes:
        size: How many.
        stores: What each one writes.
        level: How often what it reads has gone through memory; loops of one level read nothing that
            another one of them writes.
    """

    size: int
    stores: tuple[Store, ...]
    level: int = 0


@dataclass(frozen=True, slots=True)
class LoopProgram:
    """Loops, in order.

    Attributes:
        loops: The loops; what has one lane is computed before them.
        kept: Expressions whose values go through memory, with the array and its size.
        fixed: For each output what it is where it does not vary, by position.
        single: For each output expressions of one lane, and where they go.
        kind: How they are run.
    """

    loops: tuple[Loop, ...]
    kept: dict[int, tuple[ArrayRef, int]]
    fixed: tuple[tuple[Places, np.ndarray], ...]
    single: tuple[tuple[int, ArrayRef, Places], ...]
    kind: ScheduleKind = ScheduleKind.SERIAL


def schedule(scalars: ScalarProgram) -> LoopProgram:
    """Divides a program into loops.

    Where cells are too different from each other only lanes go together that every cell has as many
    of (the local block of a mesh's face, not the entries of J that it is added to); or none, and
    all values that others take go through memory.
    """
    with suppress(_TooManyKinds):
        return _Scheduling(scalars, "all").made()
    with suppress(_TooManyKinds):
        return _Scheduling(scalars, "even").made()
    return _Scheduling(scalars, "none").made()


def each_alone(scalars: ScalarProgram) -> LoopProgram:
    """A loop for each value that is written, and nothing of how it is computed."""
    fixed, single, stores = _Scheduling(scalars, "none").stores()
    loops = tuple([Loop(len(s.lanes), (s,)) for s in stores])
    return LoopProgram(loops, {}, fixed, single, ScheduleKind.TENSORS)


def in_parallel(plan: LoopProgram) -> LoopProgram:
    """The same loops for several threads, where they write so many values that it may be worth it.

    Args:
        plan: Serial loops.
    """
    values = sum(loop.size * len(loop.stores) for loop in plan.loops)
    return replace(plan, kind=ScheduleKind.PARALLEL) if values >= _MANY else plan


class _TooManyKinds(Exception):
    """Every kind of cell would be a loop."""


class _Scheduling:
    def __init__(self, scalars: ScalarProgram, ties: Ties):
        self._ties = ties
        self._scalars = scalars
        self._all = scalars.expressions.all
        self._kept: dict[int, tuple[ArrayRef, int]] = {}
        self._needed = self._reachable()
        self._costs = self._costs_of()
        kinds = [self._all[n].lanes for n in self._needed if self._is_computed(n)]
        self._cells = Cells(kinds, ties)

    def made(self) -> LoopProgram:
        """The loops."""
        edges = self._edges()
        if self._ties == "even":
            edges.sort(key=lambda edge: not edge.is_even)
        for edge in edges:
            if not self._cells.tie(edge):
                self._part(edge)
        for number in self._needed:
            expression = self._all[number]
            if expression.kind == "segments":
                self._keep(expression.arguments[0][0])
        fixed, single, stores = self.stores()
        levels = self._levels()
        loops = []
        for level in sorted(set(levels.values())):
            now = [s for s in stores if levels[s.expression] == level]
            now += [
                self._kept_store(n) for n in self._needed if n in self._kept and levels[n] == level
            ]
            loops += [replace(loop, level=level) for loop in self._loops(now)]
        return LoopProgram(tuple(loops), self._kept, fixed, single)

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

    def _edges(self) -> list[Edge]:
        """The maps, those first behind which most is computed."""
        found: dict[tuple[int, int, int], Edge] = {}
        for number in self._needed:
            expression = self._all[number]
            if expression.kind == "segments":
                continue
            for argument, by in expression.arguments:
                if by is not None and self._is_computed(argument):
                    end = self._all[argument].lanes
                    key = id(expression.lanes), id(end), id(by)
                    edge = found.setdefault(key, Edge(expression.lanes, end, by))
                    edge.arguments.add(argument)
        weight = {k: max(self._costs[a] for a in e.arguments) for k, e in found.items()}
        return [found[k] for k in sorted(found, key=lambda k: -weight[k])]

    def _part(self, edge: Edge) -> None:
        """Values go through memory from one cell to another, or are computed in both."""
        for argument in edge.arguments:
            if self._costs[argument] > _CHEAP:
                self._keep(argument)

    def _keep(self, number: int) -> None:
        if number not in self._kept and self._is_computed(number):
            size = self._all[number].lanes.size
            self._kept[number] = (ArrayRef("kept", len(self._kept)), size)

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

    def stores(self) -> tuple[tuple[tuple[Places, np.ndarray], ...], tuple, list[Store]]:  # type: ignore[type-arg]
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
                    single.append((number, ArrayRef("out", i), part))
                else:
                    stores += list(_ranked(number, lanes[part], ArrayRef("out", i), part))
            empty = np.zeros(0, dtype=np.int64)
            fixed.append((np.concatenate([empty, *places]), np.concatenate([np.zeros(0), *values])))
        return tuple(fixed), tuple(single), stores

    def _loops(self, stores: list[Store]) -> Iterator[Loop]:
        """Loops over cells that are alike, for values that can be computed now."""
        computed = [s for s in stores if self._is_computed(s.expression)]
        yield from (Loop(len(s.lanes), (s,)) for s in stores if not self._is_computed(s.expression))
        if not computed:
            return
        cells = [self._cells.of(self._all[s.expression].lanes, s.lanes) for s in computed]
        slots = self._cells.slots()
        # What a cell looks like: which stores it has, of which of its lanes.
        rows = np.concatenate(cells)
        which = np.concatenate([np.full(len(c), k) for k, c in enumerate(cells)])
        slot = np.concatenate(
            [self._cells.slots_of(self._all[s.expression].lanes, s.lanes, slots) for s in computed]
        )
        item = np.concatenate([np.arange(len(c)) for c in cells])
        order = np.lexsort((slot, which, rows))
        rows, which, slot, item = rows[order], which[order], slot[order], item[order]
        first = np.flatnonzero(np.append(True, np.diff(rows)))
        counts = np.diff(np.append(first, len(rows)))
        looks = self._cells.looks(rows[first])
        stored = identified(np.stack([which, slot], axis=1), np.append(first, len(rows)))
        _, kinds = np.unique(np.stack([stored, looks]), axis=1, return_inverse=True)
        kinds = kinds.reshape(-1)
        found = int(kinds.max()) + 1
        # No more than if each were a loop of its own.
        if found > max(_KINDS, len(computed)) and self._ties != "none":
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


def _ranked(number: int, lanes: Places, array: ArrayRef, positions: Places) -> Iterator[Store]:
    """Stores of a value, none of which writes one lane twice."""
    order = np.argsort(lanes, kind="stable")
    lanes, positions = lanes[order], positions[order]
    starts = np.flatnonzero(np.append(True, np.diff(lanes)))
    sizes = np.diff(np.append(starts, len(lanes)))
    rank = np.arange(len(lanes)) - np.repeat(starts, sizes)
    if sizes.max() > LARGEST:
        raise PlanRefused("a value that varies is written to very many places")
    for k in range(int(sizes.max())):
        chosen = rank == k
        yield Store(number, lanes[chosen], array, positions[chosen])


def schedule_of_samples(scalars: ScalarProgram, count: int) -> LoopProgram:
    """One loop, each turn of which is a sample and looks at nothing of another.

    Args:
        scalars: The program for a few samples, every element of a sample an expression.
        count: How many.

    Raises:
        PlanRefused: There is no such loop.
    """
    _check(scalars, count)
    made = over_samples(scalars, count)
    every, (loop,) = np.arange(count), made.loops
    for store in loop.stores:
        alone = scalars.expressions.all[store.expression].lanes is ONE
        if not alone and not (store.lanes == every).all():
            raise PlanRefused("a sample looks at another")
    return replace(made, kind=ScheduleKind.BATCH)


def over_samples(scalars: ScalarProgram, count: int) -> LoopProgram:
    """One loop, each turn of which writes what a sample gives.

    Raises:
        PlanRefused: Samples are made by different expressions.
    """
    every = np.arange(count)
    stores, fixed = [], []
    for k, (numbers, lanes) in enumerate(scalars.outputs):
        of, where = numbers.reshape(count, -1), lanes.reshape(count, -1)
        width = of.shape[1]
        if not (of == of[0]).all():
            raise PlanRefused("samples are not computed alike")
        values = np.zeros(width)
        for position, number in enumerate(of[0].tolist()):
            value = scalars.expressions.value(number)
            if value is not None:
                values[position] = value
                continue
            stores.append(
                Store(number, where[:, position], ArrayRef("out", k), position + width * every)
            )
        fixed.append((np.arange(width), values))
    loop = Loop(count, tuple(stores))
    return LoopProgram((loop,), {}, tuple(fixed), (), ScheduleKind.BATCH_TENSORS)


def _check(scalars: ScalarProgram, count: int) -> None:
    """Refuses what is not one computation for each sample, on what belongs to it.

    Raises:
        PlanRefused: It is something else.
    """
    every = scalars.expressions.all
    stack = [int(n) for numbers, _ in scalars.outputs for n in np.unique(numbers)]
    seen: set[int] = set()
    while stack:
        number = stack.pop()
        if number in seen:
            continue
        seen.add(number)
        found = every[number]
        if found.lanes is not ONE and found.lanes.size != count:
            raise PlanRefused("samples are not computed one by one")
        if found.kind == "load" and found.lanes is not ONE:
            array, step, start = loaded(found)
            if array.kind != "in" or start >= step:
                raise PlanRefused("samples read different constants")
        for argument, by in found.arguments:
            if by is not None and not (by.places == by.places[0]).all():
                raise PlanRefused("a sample looks at another")
            if by is not None and every[argument].lanes is not ONE:
                raise PlanRefused("all samples look at one")
            stack.append(argument)
