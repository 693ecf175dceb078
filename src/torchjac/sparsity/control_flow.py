"""Control flow operators of the graph (`cond`, `map`, `scan`), by the maps of their bodies.

A body is interpreted once, on its own, which gives the local Jacobian of each result by each
operand as a sparse matrix. The pattern of `cond` is the union over branches: an entry is known if
all branches have the same number.
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
from torchjac.sparsity.dependence import Dependence, to_csr

# Interprets a body, with bindings of its nonlinear placeholders: the dependence of each result.
Run = Callable[[LinearProgram, dict[fx.Node, Any]], Sequence[Dependence | None]]
# For each result of an operation: pairs of an operand and the local Jacobian by the operand.
LocalMaps = list[list[tuple[fx.Node, LinearMap]]]


class BodyValues(KnownValues):
    """Known values inside a body, whose placeholders stand for nodes of the outer graph."""

    def __init__(
        self,
        body: LinearProgram,
        linear: set[fx.Node],
        outer: KnownValues,
        bindings: dict[fx.Node, Any],
    ):
        """Binds placeholders.

        Args:
            body: The body, as a linear program of its linear operands.
            linear: Linear nodes of the body.
            outer: Known values of the outer graph.
            bindings: Node or value of each nonlinear placeholder; None if unknown.
        """
        super().__init__(body, linear)
        self._outer = outer
        self._bindings = bindings

    def constant(self, node: Any) -> Any:
        """The constant value of a node; a placeholder has the value of its binding."""
        if isinstance(node, fx.Node) and node in self._bindings:
            return self._outer.constant(self._bindings[node])
        return super().constant(node)

    def factors(self, node: fx.Node) -> Tensor:
        """The factors of a node; a placeholder has the factors of its binding."""
        if node not in self._bindings:
            return super().factors(node)
        outer_node = self._bindings[node]
        if isinstance(outer_node, fx.Node):
            return self._outer.factors(outer_node)
        return unknown_factors(tuple(node.meta["val"].shape))

    def _depends_on_saved(self, node: fx.Node) -> bool:
        if node not in self._bindings:
            return super()._depends_on_saved(node)
        outer_node = self._bindings[node]
        return isinstance(outer_node, fx.Node) and self._outer._depends_on_saved(outer_node)


@dataclass(frozen=True, slots=True, eq=False)
class Body:
    """The local Jacobian of a body.

    Attributes:
        tables: For each result a matrix: a row per element, a column per element of all linear
            operands.
        columns: For each operand its columns of the matrices; None if it is not linear.
    """

    tables: list[sparse.csr_array]
    columns: list[slice | None]


class ControlFlow:
    """The local Jacobians of the control flow operators of one graph."""

    def __init__(self, program: LinearProgram, linear: set[fx.Node], values: KnownValues, run: Run):
        """Binds the graph.

        Args:
            program: The graph.
            linear: Linear nodes of the graph.
            values: Known values of all other nodes.
            run: Interprets a body.
        """
        self._program = program
        self._linear = linear
        self._values = values
        self._run = run

    def local_maps(self, node: fx.Node) -> LocalMaps:
        """The local Jacobian of each result of a control flow operation.

        Raises:
            NotLinear: A result may be nonzero although the cotangent is zero, or the operation is
                unknown.
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
    ) -> LocalMaps:
        """The union of both branches, or one branch if the condition is known."""
        if condition in self._linear:
            raise NotLinear
        condition_value = self._values.constant(condition)
        branches = (
            [first, second]
            if condition_value is None
            else [first if bool(condition_value) else second]
        )
        flags = [o in self._linear for o in operands]
        bodies = [self._body(branch, operands, operands, flags) for branch in branches]
        return [
            _split_by_operand(
                _join_branches([b.tables[k] for b in bodies]), shape, operands, bodies[0].columns
            )
            for k, shape in enumerate(shapes)
        ]

    def _map(
        self, shapes: Sequence[Shape], body_node: fx.Node, mapped: Any, shared: Any
    ) -> LocalMaps:
        """The body runs on each slice of the mapped operands; slices are lanes."""
        operands = [*mapped, *shared]
        # Values of single slices stay unknown, as the map must hold for every slice.
        known = [*(None for _ in mapped), *shared]
        body = self._body(body_node, operands, known, [o in self._linear for o in operands])
        parts: LocalMaps = []
        for table, shape in zip(body.tables, shapes, strict=True):
            parts.append([])
            for k, (operand, columns) in enumerate(zip(operands, body.columns, strict=True)):
                if columns is None:
                    continue
                out = (shape[0], table.shape[0])
                lanes = shape[0] if k < len(mapped) else 1
                size = columns.stop - columns.start
                operand_shape = _shape(operand.meta["val"])
                map_ = product(
                    reshape(shape, out),
                    _sparse_map(out, (shape[0], size), table[:, columns]),
                    broadcast((shape[0], size), (lanes, size)),
                    reshape((lanes, size), operand_shape),
                )
                parts[-1].append((operand, map_))
        return parts

    def _scan(
        self, shapes: Sequence[Shape], body_node: fx.Node, init: Any, mapped: Any, shared: Any
    ) -> LocalMaps:
        """The recurrence over slices, unrolled as products of sparse matrices."""
        operands = [*init, *mapped, *shared]
        known = [*(None for _ in (*init, *mapped)), *shared]
        flags = [o in self._linear for o in operands]
        while True:  # fixed point: a carry may depend on the cotangent only after some steps
            body = self._body(body_node, operands, known, flags)
            grown = [f or t.nnz > 0 for f, t in zip(flags, body.tables[: len(init)], strict=False)]
            if grown == flags[: len(init)]:
                break
            flags[: len(init)] = grown
        if any(f and not self._is_linear_or_zero(o) for f, o in zip(flags, init, strict=False)):
            raise NotLinear
        steps = _shape(mapped[0].meta["val"])[0]
        columns, start = [], 0
        for operand in operands:
            size = _shape(operand.meta["val"]).numel() if operand in self._linear else None
            columns.append(None if size is None else slice(start, start + size))
            start += size or 0
        if steps * start * sum(t.shape[0] for t in body.tables) > _MAX_UNROLLED:
            return [
                [(o, dense(s, _shape(o.meta["val"]))) for o in operands if o in self._linear]
                for s in shapes
            ]
        tables = _unroll(body, columns, len(init), len(mapped), steps, start)
        return [
            _split_by_operand(t, s, operands, columns) for t, s in zip(tables, shapes, strict=True)
        ]

    def _is_linear_or_zero(self, node: fx.Node) -> bool:
        return node in self._linear or self._values.is_zero(node)

    def _body(
        self,
        body_node: fx.Node,
        operands: Sequence[Any],
        known: Sequence[Any],
        flags: Sequence[bool],
    ) -> Body:
        """The local Jacobian of a body.

        Args:
            body_node: The node that names the body's module.
            operands: The operands that the placeholders stand for.
            known: The operands, or None where values must stay unknown.
            flags: For each operand, whether it is linear.
        """
        module: fx.GraphModule = getattr(self._program.module, str(body_node.target))
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        inner = [placeholder for placeholder, flag in zip(placeholders, flags, strict=True) if flag]
        bindings = {h: k for h, k, flag in zip(placeholders, known, flags, strict=True) if not flag}
        (end,) = (n for n in module.graph.nodes if n.op == "output")
        results: list[fx.Node | None] = list(end.args[0])
        if any(r is None for r in results):
            raise NotLinear
        body = LinearProgram(
            module,
            tuple(inner),
            tuple(results),
            tuple(_shape(placeholder.meta["val"]) for placeholder in inner),
            tuple(_shape(r.meta["val"]) for r in results if r is not None),
            self._program.scope,
            self._program.lines,
        )
        tables = [
            to_csr(dependence) for dependence in self._run(body, bindings) if dependence is not None
        ]
        columns: list[slice | None] = []
        start = 0
        for placeholder, flag in zip(placeholders, flags, strict=True):
            size = _shape(placeholder.meta["val"]).numel() if flag else 0
            columns.append(slice(start, start + size) if flag else None)
            start += size
        return Body(tables, columns)


# Entries of the matrices of an unrolled scan; above this, the scan is dense.
_MAX_UNROLLED = 2**26


def _unroll(
    body: Body, columns: list[slice | None], carried: int, mapped: int, steps: int, width: int
) -> list[sparse.csr_array]:
    """The Jacobian of each result of a scan by all linear operands.

    Args:
        body: The body of one step.
        columns: Columns of each operand; None if it is not linear.
        carried: Number of carries: the first operands, and the first results.
        mapped: Number of operands after the carries that are read slice by slice.
        steps: Number of steps.
        width: Number of columns.
    """
    step = sparse.vstack(body.tables, format="csr")
    ends = np.cumsum([0, *(t.shape[0] for t in body.tables)])
    everything = sparse.eye_array(width, format="csr")
    state: list[sparse.csr_array | None] = []
    for operand_columns, body_columns in list(zip(columns, body.columns, strict=True))[:carried]:
        size = 0 if body_columns is None else body_columns.stop - body_columns.start
        state.append(
            everything[operand_columns] if operand_columns else sparse.csr_array((size, width))
        )
    results: list[list[sparse.csr_array]] = [[] for _ in body.tables]
    for k in range(steps):
        inputs = [
            s
            for s, body_columns in zip(state, body.columns, strict=False)
            if body_columns is not None
        ]
        for which, operand_columns in list(enumerate(columns))[carried:]:
            if operand_columns is None:
                continue
            size = (
                (operand_columns.stop - operand_columns.start) // steps
                if which < carried + mapped
                else 0
            )
            first = operand_columns.start + k * size
            inputs.append(everything[first : first + size] if size else everything[operand_columns])
        next_values = tables.multiply(step, sparse.vstack(inputs, format="csr"))
        each = [next_values[ends[i] : ends[i + 1]] for i in range(len(results))]
        state = each[:carried]
        for slices, part in zip(results[carried:], each[carried:], strict=True):
            slices.append(part)
    stacked = [sparse.vstack(r, format="csr") for r in results[carried:]]
    return [*state, *stacked]


def _shape(value: Any) -> torch.Size:
    if not isinstance(value, Tensor):
        raise NotLinear
    return value.shape


def _split_by_operand(
    table: sparse.csr_array, shape: Shape, operands: Sequence[Any], columns: list[slice | None]
) -> list[tuple[fx.Node, LinearMap]]:
    """A matrix, split by columns into one map per operand."""
    maps: list[tuple[fx.Node, LinearMap]] = []
    for operand, operand_columns in zip(operands, columns, strict=True):
        if operand_columns is None:
            continue
        operand_shape = _shape(operand.meta["val"])
        map_ = _sparse_map((table.shape[0],), (operand_shape.numel(),), table[:, operand_columns])
        map_ = product(
            reshape(shape, (table.shape[0],)),
            map_,
            reshape((operand_shape.numel(),), operand_shape),
        )
        maps.append((operand, map_))
    return maps


def _join_branches(tables_: list[sparse.csr_array]) -> sparse.csr_array:
    """The union of the entries of all tables; an entry is known if all tables agree on it."""
    if len(tables_) == 1:
        return tables_[0]
    parts = [f.tocoo() for f in tables_]
    pairs = np.concatenate([np.stack([p.row, p.col]) for p in parts], axis=1)
    data = np.concatenate([p.data for p in parts])
    pairs, entry_numbers = np.unique(pairs, axis=1, return_inverse=True)
    entry_numbers = entry_numbers.reshape(-1)
    low, high = np.full(pairs.shape[1], np.inf), np.full(pairs.shape[1], -np.inf)
    with np.errstate(invalid="ignore"):  # NaN stays NaN
        np.minimum.at(low, entry_numbers, data)
        np.maximum.at(high, entry_numbers, data)
    everywhere = np.bincount(entry_numbers, minlength=pairs.shape[1]) == len(tables_)
    data = np.where(everywhere & (low == high), low, UNKNOWN)
    return sparse.csr_array((data, (pairs[0], pairs[1])), shape=tables_[0].shape)


def _sparse_map(shape_out: Shape, shape_in: Shape, table: sparse.csr_array) -> LinearMap:
    entries = table.tocoo()
    rows, columns = (torch.from_numpy(x.astype(np.int64)) for x in (entries.row, entries.col))
    return sparse_matrix(shape_out, shape_in, rows, columns, torch.from_numpy(entries.data))
