"""Scheduling: the loops that compute a scalar program.

Points of different expressions that read each other are best computed in one iteration, where
values stay in registers. They make up a *fusion group*: a sample with all its rows, an
observation, a pair of bodies. Groups with equal signatures are the iterations of one loop. Where
index maps would fuse everything (neighbors on a grid, one camera of many observations) values go
through a buffer instead, which an earlier loop writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from torchjac.compiler.codegen.fusion import (
    MAX_GROUP,
    Edge,
    FusionGroups,
    FusionPolicy,
    number_parts,
)
from torchjac.compiler.codegen.granularity import ScalarProgram
from torchjac.compiler.codegen.scalar_ir import SCALAR, ArrayRef, Indices
from torchjac.errors import PlanRefused

_MAX_KINDS = 6  # signatures of groups at one level: with more, less is fused
_RECOMPUTED_COST = 4  # scalar products: up to this cost a value is computed twice, not buffered
_PARALLEL_VALUES = 8192  # stored values: with fewer, loops stay serial


class ScheduleKind(Enum):
    """The way in which a target runs the loops of a program.

    Attributes:
        SERIAL: Loop by loop.
        PARALLEL: Each call runs a part of the iterations of each loop; the calls of all parts wait
            for each other before a loop that reads buffers of another level.
        TENSORS: Each expression is a loop over its domain; matrix products are whole. The loops of
            the program name the values that are written.
        BATCH: One loop, each iteration computes a sample; a call runs a range of the samples.
        BATCH_TENSORS: As BATCH, and the expressions of a sample run as those of `TENSORS`.
    """

    SERIAL = "serial loops"
    PARALLEL = "parallel loops"
    TENSORS = "tensor loops"
    BATCH = "a batch loop"
    BATCH_TENSORS = "batch tensor loops"


@dataclass(frozen=True, slots=True, eq=False)
class Store:
    """A value that is written to an array.

    Attributes:
        expression: The value.
        points: For each iteration the point of the expression.
        array: The array.
        positions: For each iteration the position in the array.
    """

    expression: int
    points: Indices
    array: ArrayRef
    positions: Indices


@dataclass(frozen=True, slots=True, eq=False)
class Loop:
    """A loop over iterations with equal signatures.

    Attributes:
        size: The number of iterations.
        stores: The values that each iteration writes.
        level: The number of buffers between inputs and this loop; loops of one level read no value
            that another loop of the level writes.
    """

    size: int
    stores: tuple[Store, ...]
    level: int = 0


@dataclass(frozen=True, slots=True)
class LoopProgram:
    """Loops, in order.

    Attributes:
        loops: The loops; scalar statements come before them.
        buffers: The expressions whose values go through memory, with the array and its size.
        fixed: For each output the positions and values that do not vary.
        scalar_stores: The scalar expressions that are written, with array and positions.
        kind: The way in which the loops run.
    """

    loops: tuple[Loop, ...]
    buffers: dict[int, tuple[ArrayRef, int]]
    fixed: tuple[tuple[Indices, np.ndarray], ...]
    scalar_stores: tuple[tuple[int, ArrayRef, Indices], ...]
    kind: ScheduleKind = ScheduleKind.SERIAL


def schedule(scalars: ScalarProgram) -> LoopProgram:
    """Divides a program into loops.

    Where groups are too different, only points with even counts are fused (the local block of a
    mesh's face, not the entries of J that the block is added to); else none, and all values that
    are shared go through buffers.
    """
    with suppress(_TooManyKinds):
        return _Scheduler(scalars, "all").program()
    with suppress(_TooManyKinds):
        return _Scheduler(scalars, "even").program()
    return _Scheduler(scalars, "none").program()


def tensor_loops(scalars: ScalarProgram) -> LoopProgram:
    """One loop for each value that is written, and none for intermediate values."""
    fixed, single, stores = _Scheduler(scalars, "none").stores()
    loops = tuple([Loop(len(s.points), (s,)) for s in stores])
    return LoopProgram(loops, {}, fixed, single, ScheduleKind.TENSORS)


def parallelize(program: LoopProgram) -> LoopProgram:
    """The loops as parallel loops, if they write enough values for threads.

    Args:
        program: Serial loops.
    """
    values = sum(loop.size * len(loop.stores) for loop in program.loops)
    return replace(program, kind=ScheduleKind.PARALLEL) if values >= _PARALLEL_VALUES else program


class _TooManyKinds(Exception):
    """Every fusion group would be a loop."""


class _Scheduler:
    def __init__(self, scalars: ScalarProgram, policy: FusionPolicy):
        self._policy = policy
        self._scalars = scalars
        self._all = scalars.expressions.all
        self._buffers: dict[int, tuple[ArrayRef, int]] = {}
        self._needed = self._reachable()
        self._costs = self._costs_of()
        kinds = [self._all[n].domain for n in self._needed if self._is_computed(n)]
        self._groups = FusionGroups(kinds, policy)

    def program(self) -> LoopProgram:
        """The loops."""
        edges = self._edges()
        if self._policy == "even":
            edges.sort(key=lambda edge: not edge.is_even)
        for edge in edges:
            if not self._groups.fuse(edge):
                self._cut(edge)
        for number in self._needed:
            expression = self._all[number]
            if expression.kind == "segments":
                self._buffer(expression.arguments[0][0])
        fixed, single, stores = self.stores()
        levels = self._levels()
        loops = []
        for level in sorted(set(levels.values())):
            now = [s for s in stores if levels[s.expression] == level]
            now += [
                self._buffer_store(n)
                for n in self._needed
                if n in self._buffers and levels[n] == level
            ]
            loops += [replace(loop, level=level) for loop in self._loops(now)]
        return LoopProgram(tuple(loops), self._buffers, fixed, single)

    def _reachable(self) -> list[int]:
        """The expressions that the outputs need, arguments first."""
        seen: set[int] = set()
        stack = [int(n) for numbers, _ in self._scalars.outputs for n in np.unique(numbers)]
        while stack:
            number = stack.pop()
            if number not in seen:
                seen.add(number)
                stack += [a for a, _ in self._all[number].arguments]
        return sorted(seen)  # arguments are created first

    def _is_computed(self, number: int) -> bool:
        """Whether a loop computes the expression."""
        expression = self._all[number]
        return expression.kind not in ("load", "constant") and expression.domain is not SCALAR

    def _costs_of(self) -> dict[int, int]:
        """The cost of each value, from loads on; shared values count again."""
        costs: dict[int, int] = {}
        for number in self._needed:
            expression = self._all[number]
            inner = sum(costs[a] for a, _ in expression.arguments)
            if expression.kind == "segments":
                inner = 1000
            costs[number] = (
                0 if expression.domain is SCALAR else min(inner + expression.cost, 10**6)
            )
        return costs

    def _edges(self) -> list[Edge]:
        """The edges, the most expensive arguments first."""
        edges: dict[tuple[int, int, int], Edge] = {}
        for number in self._needed:
            expression = self._all[number]
            if expression.kind == "segments":
                continue
            for argument, by in expression.arguments:
                if by is not None and self._is_computed(argument):
                    end = self._all[argument].domain
                    key = id(expression.domain), id(end), id(by)
                    edge = edges.setdefault(key, Edge(expression.domain, end, by))
                    edge.arguments.add(argument)
        weight = {k: max(self._costs[a] for a in e.arguments) for k, e in edges.items()}
        return [edges[k] for k in sorted(edges, key=lambda k: -weight[k])]

    def _cut(self, edge: Edge) -> None:
        """Cuts an edge: its arguments go through buffers, or are computed twice."""
        for argument in edge.arguments:
            if self._costs[argument] > _RECOMPUTED_COST:
                self._buffer(argument)

    def _buffer(self, number: int) -> None:
        if number not in self._buffers and self._is_computed(number):
            size = self._all[number].domain.size
            self._buffers[number] = (ArrayRef("buffer", len(self._buffers)), size)

    def _levels(self) -> dict[int, int]:
        """The number of buffers before each expression."""
        levels: dict[int, int] = {}
        for number in self._needed:
            levels[number] = max(
                (
                    levels[a] + (a in self._buffers and self._is_computed(number))
                    for a, _ in self._all[number].arguments
                ),
                default=0,
            )
        return levels

    def _buffer_store(self, number: int) -> Store:
        every = np.arange(self._all[number].domain.size)
        return Store(number, every, self._buffers[number][0], every)

    def stores(self) -> tuple[tuple[tuple[Indices, np.ndarray], ...], tuple, list[Store]]:  # type: ignore[type-arg]
        """The outputs: fixed values, scalar expressions, and values of loops."""
        fixed, single, stores = [], [], []
        for i, (numbers, points) in enumerate(self._scalars.outputs):
            order = np.argsort(numbers, kind="stable")
            cuts = np.flatnonzero(np.diff(numbers[order])) + 1
            positions: list[Indices] = []
            values: list[np.ndarray] = []
            for part in np.split(order, cuts) if len(order) else []:
                number = int(numbers[part[0]])
                value = self._scalars.expressions.constant_value(number)
                if value is not None:
                    positions.append(part)
                    values.append(np.full(len(part), value))
                elif self._all[number].domain is SCALAR:
                    single.append((number, ArrayRef("out", i), part))
                else:
                    stores += list(_ranked(number, points[part], ArrayRef("out", i), part))
            empty = np.zeros(0, dtype=np.int64)
            fixed.append(
                (np.concatenate([empty, *positions]), np.concatenate([np.zeros(0), *values]))
            )
        return tuple(fixed), tuple(single), stores

    def _loops(self, stores: list[Store]) -> Iterator[Loop]:
        """Loops over groups with equal signatures, for stores of one level."""
        computed = [s for s in stores if self._is_computed(s.expression)]
        yield from (
            Loop(len(s.points), (s,)) for s in stores if not self._is_computed(s.expression)
        )
        if not computed:
            return
        groups = [self._groups.of(self._all[s.expression].domain, s.points) for s in computed]
        slots = self._groups.slots()
        # The signature of a group: its stores, and the slots of their points.
        rows = np.concatenate(groups)
        which = np.concatenate([np.full(len(c), k) for k, c in enumerate(groups)])
        slot = np.concatenate(
            [
                self._groups.slots_of(self._all[s.expression].domain, s.points, slots)
                for s in computed
            ]
        )
        item = np.concatenate([np.arange(len(c)) for c in groups])
        order = np.lexsort((slot, which, rows))
        rows, which, slot, item = rows[order], which[order], slot[order], item[order]
        first = np.flatnonzero(np.append(True, np.diff(rows)))
        counts = np.diff(np.append(first, len(rows)))
        signatures = self._groups.signatures(rows[first])
        stored = number_parts(np.stack([which, slot], axis=1), np.append(first, len(rows)))
        _, kinds = np.unique(np.stack([stored, signatures]), axis=1, return_inverse=True)
        kinds = kinds.reshape(-1)
        count = int(kinds.max()) + 1
        # A loop for each store is the limit.
        if count > max(_MAX_KINDS, len(computed)) and self._policy != "none":
            raise _TooManyKinds
        order = np.argsort(kinds, kind="stable")
        for members in np.split(order, np.cumsum(np.bincount(kinds, minlength=count))[:-1]):
            begin = first[members]
            stores_of = []
            for k in range(int(counts[members[0]])):
                store = computed[int(which[begin[0] + k])]
                chosen = item[begin + k]
                stores_of.append(
                    Store(
                        store.expression, store.points[chosen], store.array, store.positions[chosen]
                    )
                )
            yield Loop(len(members), tuple(stores_of))


def _ranked(number: int, points: Indices, array: ArrayRef, positions: Indices) -> Iterator[Store]:
    """Stores of a value, each with different points."""
    order = np.argsort(points, kind="stable")
    points, positions = points[order], positions[order]
    starts = np.flatnonzero(np.append(True, np.diff(points)))
    sizes = np.diff(np.append(starts, len(points)))
    rank = np.arange(len(points)) - np.repeat(starts, sizes)
    if sizes.max() > MAX_GROUP:
        raise PlanRefused("a value that varies is written to very many places")
    for k in range(int(sizes.max())):
        chosen = rank == k
        yield Store(number, points[chosen], array, positions[chosen])
