"""Control flow that is kept in the graph: `cond`, `map` and `scan`, by the maps of their bodies.

A body is interpreted once, on its own. What comes out is the local Jacobian of each of its results
by each of its operands, as a matrix of fixed sparsity. Branches are joined: an entry is there if
any branch has it, and known if all of them have the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, fx

from torchjac.capture.linear_program import LinearProgram
from torchjac.linear.known_values import KnownValues, unknown_factors
from torchjac.linear.maps import (
    UNKNOWN,
    LinearMap,
    Shape,
    broadcast,
    dense,
    product,
    reshape,
    sparse_matrix,
)
from torchjac.linear.rules import NotLinear
from torchjac.sparsity import csr as tables
from torchjac.sparsity.dependence import Dependence, matrix

# Runs a body, given what its other placeholders stand for: the dependence of each result.
Run = Callable[[LinearProgram, dict[fx.Node, Any]], Sequence[Dependence | None]]
# For each result of an operation: the nodes that it depends on, and how.
Parts = list[list[tuple[fx.Node, LinearMap]]]


class BodyValues(KnownValues):
    """Values inside a body, where placeholders stand for nodes of the graph around it."""

    def __init__(
        self,
        body: LinearProgram,
        linear: set[fx.Node],
        outer: KnownValues,
        given: dict[fx.Node, Any],
    ):
        """Binds placeholders.

        Args:
            body: The body, as the derivative of its results by its linear operands.
            linear: Its linear nodes.
            outer: Values of the graph around it.
            given: The node or value that each placeholder stands for; None if it is not known.
        """
        super().__init__(body, linear)
        self._outer = outer
        self._given = given

    def constant(self, node: Any) -> Any:
        """As for every graph; a placeholder has the value of what it stands for."""
        if isinstance(node, fx.Node) and node in self._given:
            return self._outer.constant(self._given[node])
        return super().constant(node)

    def factors(self, node: fx.Node) -> Tensor:
        """As for every graph; a placeholder has the factors of what it stands for."""
        if node not in self._given:
            return super().factors(node)
        around = self._given[node]
        if isinstance(around, fx.Node):
            return self._outer.factors(around)
        return unknown_factors(tuple(node.meta["val"].shape))

    def _depends_on_saved(self, node: fx.Node) -> bool:
        if node not in self._given:
            return super()._depends_on_saved(node)
        around = self._given[node]
        return isinstance(around, fx.Node) and self._outer._depends_on_saved(around)


@dataclass(frozen=True, slots=True, eq=False)
class Body:
    """The local Jacobian of a body.

    Attributes:
        tables: For each result a row per element, a column per element of all linear operands.
        columns: For each operand its columns; None if it is not linear.
    """

    tables: list[sparse.csr_array]
    columns: list[slice | None]


class Control:
    """The control flow of one graph."""

    def __init__(
        self, derivative: LinearProgram, linear: set[fx.Node], values: KnownValues, run: Run
    ):
        """Binds the graph.

        Args:
            derivative: The graph.
            linear: Its linear nodes.
            values: Values of the others.
            run: Interprets a body.
        """
        self._around = derivative
        self._linear = linear
        self._values = values
        self._run = run

    def parts(self, node: fx.Node) -> Parts:
        """What each result of a control flow operation depends on, and how.

        Raises:
            NotLinear: A result need not be zero where the cotangent is, or nothing is known of the
                operation.
        """
        arguments: tuple[Any, ...] = node.args
        shapes = [_shape(v) for v in node.meta["val"]]
        name = str(node.target)
        if name == "cond":
            return self._cond(shapes, *arguments)
        if name == "map_impl":
            return self._map(shapes, *arguments)
        if name == "scan":
            return self._scan(shapes, *arguments)
        raise NotLinear

    def _cond(
        self,
        shapes: Sequence[Shape],
        condition: Any,
        first: fx.Node,
        second: fx.Node,
        operands: Any,
    ) -> Parts:
        """Any branch may run, unless it is known which."""
        if condition in self._linear:
            raise NotLinear
        taken = self._values.constant(condition)
        branches = [first, second] if taken is None else [first if bool(taken) else second]
        flags = [o in self._linear for o in operands]
        bodies = [self._body(branch, operands, operands, flags) for branch in branches]
        return [
            _whole(_agreed([b.tables[k] for b in bodies]), shape, operands, bodies[0].columns)
            for k, shape in enumerate(shapes)
        ]

    def _map(self, shapes: Sequence[Shape], place: fx.Node, mapped: Any, shared: Any) -> Parts:
        """The body runs on each slice of some operands and on all of others; slices are lanes."""
        operands = [*mapped, *shared]
        # The values of one slice are not looked at: what is found must hold for every slice.
        known = [*(None for _ in mapped), *shared]
        body = self._body(place, operands, known, [o in self._linear for o in operands])
        parts: Parts = []
        for table, shape in zip(body.tables, shapes, strict=True):
            parts.append([])
            for k, (operand, columns) in enumerate(zip(operands, body.columns, strict=True)):
                if columns is None:
                    continue
                out = (shape[0], table.shape[0])
                lanes = shape[0] if k < len(mapped) else 1
                size = columns.stop - columns.start
                given = _shape(operand.meta["val"])
                map_ = product(
                    reshape(shape, out),
                    _fixed(out, (shape[0], size), table[:, columns]),
                    broadcast((shape[0], size), (lanes, size)),
                    reshape((lanes, size), given),
                )
                parts[-1].append((operand, map_))
        return parts

    def _scan(
        self, shapes: Sequence[Shape], place: fx.Node, init: Any, mapped: Any, shared: Any
    ) -> Parts:
        """One slice after the other, with values that are carried on: unrolled, as matrices."""
        operands = [*init, *mapped, *shared]
        known = [*(None for _ in (*init, *mapped)), *shared]
        flags = [o in self._linear for o in operands]
        while True:  # what is carried depends on the cotangent after some steps, if not at first
            body = self._body(place, operands, known, flags)
            grown = [f or t.nnz > 0 for f, t in zip(flags, body.tables[: len(init)], strict=False)]
            if grown == flags[: len(init)]:
                break
            flags[: len(init)] = grown
        if any(f and not self._vanishes(o) for f, o in zip(flags, init, strict=False)):
            raise NotLinear
        steps = _shape(mapped[0].meta["val"])[0]
        columns, start = [], 0
        for operand in operands:
            size = _shape(operand.meta["val"]).numel() if operand in self._linear else None
            columns.append(None if size is None else slice(start, start + size))
            start += size or 0
        if steps * start * sum(t.shape[0] for t in body.tables) > _UNROLLED:
            return [
                [(o, dense(s, _shape(o.meta["val"]))) for o in operands if o in self._linear]
                for s in shapes
            ]
        tables = _unrolled(body, columns, len(init), len(mapped), steps, start)
        return [_whole(t, s, operands, columns) for t, s in zip(tables, shapes, strict=True)]

    def _vanishes(self, node: fx.Node) -> bool:
        return node in self._linear or self._values.is_zero(node)

    def _body(
        self, place: fx.Node, operands: Sequence[Any], known: Sequence[Any], flags: Sequence[bool]
    ) -> Body:
        """The local Jacobian of a body.

        Args:
            place: Where it is kept.
            operands: What its placeholders stand for.
            known: The same, None for those whose values are not to be used.
            flags: Which of them are linear.
        """
        module: fx.GraphModule = getattr(self._around.module, str(place.target))
        holes = [n for n in module.graph.nodes if n.op == "placeholder"]
        inner = [hole for hole, flag in zip(holes, flags, strict=True) if flag]
        given = {h: k for h, k, flag in zip(holes, known, flags, strict=True) if not flag}
        (end,) = (n for n in module.graph.nodes if n.op == "output")
        results: list[fx.Node | None] = list(end.args[0])
        if any(r is None for r in results):
            raise NotLinear
        body = LinearProgram(
            module,
            tuple(inner),
            tuple(results),
            tuple(_shape(hole.meta["val"]) for hole in inner),
            tuple(_shape(r.meta["val"]) for r in results if r is not None),
            self._around.scope,
            self._around.lines,
        )
        tables = [matrix(found) for found in self._run(body, given) if found is not None]
        columns: list[slice | None] = []
        start = 0
        for hole, flag in zip(holes, flags, strict=True):
            size = _shape(hole.meta["val"]).numel() if flag else 0
            columns.append(slice(start, start + size) if flag else None)
            start += size
        return Body(tables, columns)


# Entries that the matrices of an unrolled scan may have; a longer one is all to all.
_UNROLLED = 2**26


def _unrolled(
    body: Body, columns: list[slice | None], carried: int, mapped: int, steps: int, width: int
) -> list[sparse.csr_array]:
    """Each result by all linear operands.

    Args:
        body: One step.
        columns: Of each linear operand among all of them.
        carried: Number of operands (and of results, the first ones) that are carried on.
        mapped: Number of operands after those of which each step takes a slice.
        steps: Number of steps.
        width: Number of columns.
    """
    step = sparse.vstack(body.tables, format="csr")
    ends = np.cumsum([0, *(t.shape[0] for t in body.tables)])
    everything = sparse.eye_array(width, format="csr")
    state: list[sparse.csr_array | None] = []
    for place, mine in list(zip(columns, body.columns, strict=True))[:carried]:
        size = 0 if mine is None else mine.stop - mine.start
        state.append(everything[place] if place else sparse.csr_array((size, width)))
    results: list[list[sparse.csr_array]] = [[] for _ in body.tables]
    for k in range(steps):
        inputs = [s for s, mine in zip(state, body.columns, strict=False) if mine is not None]
        for which, place in list(enumerate(columns))[carried:]:
            if place is None:
                continue
            size = (place.stop - place.start) // steps if which < carried + mapped else 0
            first = place.start + k * size
            inputs.append(everything[first : first + size] if size else everything[place])
        made = tables.times(step, sparse.vstack(inputs, format="csr"))
        each = [made[ends[i] : ends[i + 1]] for i in range(len(results))]
        state = each[:carried]
        for found, part in zip(results[carried:], each[carried:], strict=True):
            found.append(part)
    stacked = [sparse.vstack(r, format="csr") for r in results[carried:]]
    return [*state, *stacked]


def _shape(value: Any) -> torch.Size:
    if not isinstance(value, Tensor):
        raise NotLinear
    return value.shape


def _whole(
    table: sparse.csr_array, shape: Shape, operands: Sequence[Any], columns: list[slice | None]
) -> list[tuple[fx.Node, LinearMap]]:
    """A matrix as maps of the operands that its columns belong to."""
    found: list[tuple[fx.Node, LinearMap]] = []
    for operand, mine in zip(operands, columns, strict=True):
        if mine is None:
            continue
        given = _shape(operand.meta["val"])
        map_ = _fixed((table.shape[0],), (given.numel(),), table[:, mine])
        map_ = product(reshape(shape, (table.shape[0],)), map_, reshape((given.numel(),), given))
        found.append((operand, map_))
    return found


def _agreed(found: list[sparse.csr_array]) -> sparse.csr_array:
    """Entries that any has; known where all have the same."""
    if len(found) == 1:
        return found[0]
    parts = [f.tocoo() for f in found]
    pairs = np.concatenate([np.stack([p.row, p.col]) for p in parts], axis=1)
    data = np.concatenate([p.data for p in parts])
    pairs, where = np.unique(pairs, axis=1, return_inverse=True)
    where = where.reshape(-1)
    low, high = np.full(pairs.shape[1], np.inf), np.full(pairs.shape[1], -np.inf)
    with np.errstate(invalid="ignore"):  # NaN stays NaN
        np.minimum.at(low, where, data)
        np.maximum.at(high, where, data)
    everywhere = np.bincount(where, minlength=pairs.shape[1]) == len(found)
    data = np.where(everywhere & (low == high), low, UNKNOWN)
    return sparse.csr_array((data, (pairs[0], pairs[1])), shape=found[0].shape)


def _fixed(shape_out: Shape, shape_in: Shape, table: sparse.csr_array) -> LinearMap:
    entries = table.tocoo()
    rows, columns = (torch.from_numpy(x.astype(np.int64)) for x in (entries.row, entries.col))
    return sparse_matrix(shape_out, shape_in, rows, columns, torch.from_numpy(entries.data))
