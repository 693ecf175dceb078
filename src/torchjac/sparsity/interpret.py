"""Abstract interpretation of the linear graph: rules give local maps, maps act on dependences."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from torchjac._torch.modes import real_values
from torchjac._torch.trace.op_traits import HigherOrderOperator, OpOverload
from torchjac._torch.trace.trace import sequence_of
from torchjac.capture.linear_program import LinearProgram
from torchjac.linear.graph import linear_nodes, needed_nodes
from torchjac.linear.known_values import HALF, KnownValues
from torchjac.linear.maps import dense, reshape
from torchjac.linear.rules import RULES, Concat, NoRule, NotLinear, Op, Operand, local_of
from torchjac.sparsity.concat import concat
from torchjac.sparsity.control_flow import BodyValues, ControlFlow
from torchjac.sparsity.dependence import (
    Dependence,
    apply,
    full_dependence,
    no_dependence,
    seed,
    sum_dependences,
)
from torchjac.sparsity.precision import round_to_half


@dataclass(frozen=True, slots=True)
class Spread:
    """An operation after which elements depend on more rows than before.

    Attributes:
        operation: Name of the operation.
        where: Line of the user's code, or the autograd node that ran the operation.
        before: Mean number of rows that an element of its argument depends on.
        after: Mean number of rows that an element of its result depends on.
        why: Reason why a denser pattern was assumed than the rule gives, or None.
    """

    operation: str
    where: str | None
    before: float
    after: float
    why: str | None

    @property
    def growth(self) -> float:
        """Ratio of the row counts after and before the operation."""
        return self.after / max(self.before, 1.0)

    def __str__(self) -> str:
        """Operation, line, and row counts before and after."""
        place = f" at {self.where}" if self.where else ""
        reason = f" ({self.why})" if self.why else ""
        return f"{self.operation}{place}: {self.before:.4g} -> {self.after:.4g} rows{reason}"


@dataclass(frozen=True, slots=True, eq=False)
class Interpretation:
    """The result of an abstract interpretation of a linear graph.

    Attributes:
        gradients: Dependence of the gradient of each input leaf; None for a leaf without gradient.
        spreads: Operations that destroyed sparsity, in the order of the graph.
        assumed: Operations without a rule of their own, each with the assumption.
    """

    gradients: tuple[Dependence | None, ...]
    spreads: tuple[Spread, ...]
    assumed: tuple[str, ...]


def interpret(program: LinearProgram) -> Interpretation:
    """Interprets a linear graph: runs it on dependences instead of values."""
    with real_values():
        return _Interpreter(program).result()


class _Interpreter:
    def __init__(self, program: LinearProgram, values: KnownValues | None = None):
        """Binds a graph; with `values`, the graph is a body of control flow."""
        self._program = program
        self._linear = linear_nodes(program)
        self._is_body = values is not None
        self._values = KnownValues(program, self._linear) if values is None else values
        self._control = ControlFlow(program, self._linear, self._values, self._body)
        self._m = program.m
        self._dependences: dict[fx.Node, Any] = {}
        self._row_counts: dict[fx.Node, float] = {}
        self._spreads: list[Spread] = []
        self._assumed: dict[str, None] = {}

    def result(self) -> Interpretation:
        program = self._program
        first = 0
        for cotangent, shape in zip(program.cotangents, program.row_shapes, strict=True):
            if cotangent is not None:
                self._dependences[cotangent] = seed(tuple(shape), first, self._m)
                self._row_counts[cotangent] = 1.0
            first += shape.numel()
        needed = needed_nodes(program, self._linear)
        for node in program.module.graph.nodes:
            if node in self._linear and node in needed and node not in self._dependences:
                self._dependences[node] = self._dependence_of(node)
        gradients: list[Dependence | None] = []
        for node, shape in zip(program.gradients, program.column_shapes, strict=True):
            if node is None:
                gradients.append(None)
            elif node in self._dependences:
                gradients.append(self._dependences[node])
            else:  # independent of the cotangent: zero, or no derivative
                zero = self._values.is_zero(node)
                if self._is_body and not zero:
                    raise NotLinear
                constructor = no_dependence if zero else full_dependence
                gradients.append(constructor(tuple(shape), self._m))
        return Interpretation(tuple(gradients), tuple(self._spreads), tuple(self._assumed))

    def _dependence_of(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            source, position = node.args
            assert isinstance(source, fx.Node)
            dependence = self._dependences[source][position]
            self._row_counts[node] = max(
                map(_mean_row_count, _dependences_in(dependence)), default=0.0
            )
            return dependence
        why = None
        try:
            dependence = self._by_rule(node)
        except NotLinear as reason:
            if self._is_body:
                raise
            why = str(reason) or "its result need not be zero where the cotangent is"
            dependence = self._for_each(node, lambda s: full_dependence(s, self._m))
        except NoRule as missing:
            why = str(missing) if missing.lack == "version" else "there is no rule for it"
            dependence = self._for_each(node, lambda s: self._all_to_all(node, s))
        dependence = self._round(node, dependence)
        if why is not None:
            self._assumed[f"{_name(node)}: {why}"] = None
        self._record_spread(node, dependence, why)
        return dependence

    def _round(self, node: fx.Node, dependence: Any) -> Any:
        value = node.meta["val"]
        if isinstance(value, Tensor):
            return round_to_half(dependence) if value.dtype in HALF else dependence
        return [
            round_to_half(part) if isinstance(v, Tensor) and v.dtype in HALF and part else part
            for part, v in zip(dependence, value, strict=True)
        ]

    def _by_rule(self, node: fx.Node) -> Any:
        target = node.target
        if isinstance(target, HigherOrderOperator):
            return self._by_control_flow(node)
        if not isinstance(target, OpOverload):
            raise NoRule(str(target), "operation")
        if target not in RULES and "backward" not in target._schema.name:
            raise NotLinear("there is no rule for it")  # f(0) may be nonzero
        local = local_of(Op(node, self._linear, self._values))
        if isinstance(local, tuple):
            return [
                None if value is None else self._apply_local(part, tuple(value.shape))
                for part, value in zip(local, node.meta["val"], strict=True)
            ]
        if isinstance(local, Concat):
            return concat([self._reshape_operand(*part) for part in local.parts], local.axis)
        return self._apply_local(local, tuple(node.meta["val"].shape))

    def _reshape_operand(self, operand: Operand, shape: tuple[int, ...]) -> Dependence:
        if not operand.linear:
            return no_dependence(shape, self._m)
        return apply(reshape(shape, operand.shape), self._dependences[operand.node])

    def _by_control_flow(self, node: fx.Node) -> list[Dependence]:
        results: list[Dependence] = []
        for part, value in zip(self._control.local_maps(node), node.meta["val"], strict=True):
            summands = [apply(map_, self._dependences[operand]) for operand, map_ in part]
            results.append(
                sum_dependences(summands)
                if summands
                else no_dependence(tuple(value.shape), self._m)
            )
        return results

    def _body(
        self, body: LinearProgram, bindings: dict[fx.Node, Any]
    ) -> tuple[Dependence | None, ...]:
        """Interprets the body of a control flow operator, and records its assumptions."""
        run = _Interpreter(body, BodyValues(body, linear_nodes(body), self._values, bindings))
        result = run.result()
        self._assumed |= run._assumed
        return result.gradients

    def _apply_local(self, local: Any, shape: tuple[int, ...]) -> Dependence:
        parts = [apply(map_, self._dependences[operand.node]) for operand, map_ in local]
        return sum_dependences(parts) if parts else no_dependence(shape, self._m)

    def _for_each(self, node: fx.Node, make: Any) -> Any:
        value = node.meta["val"]
        if isinstance(value, (tuple, list)):
            return [make(tuple(v.shape)) if isinstance(v, Tensor) else None for v in value]
        return make(tuple(value.shape))

    def _all_to_all(self, node: fx.Node, shape: tuple[int, ...]) -> Dependence:
        """The dependence of every element of the result on every element of every argument."""
        parts = []
        for argument in node.all_input_nodes:
            for value in _dependences_in(self._dependences.get(argument)):
                total = apply(dense((), value.shape), value)
                parts.append(apply(dense(shape, ()), total))
        return sum_dependences(parts) if parts else no_dependence(shape, self._m)

    def _record_spread(self, node: fx.Node, dependence: Any, why: str | None) -> None:
        self._row_counts[node] = after = max(
            map(_mean_row_count, _dependences_in(dependence)), default=0.0
        )
        if after <= 1.5:
            return
        before = max((self._row_counts.get(a, 0.0) for a in node.all_input_nodes), default=0.0)
        if after > 1.5 * max(before, 1.0):
            number = sequence_of(node)
            where = self._program.lines.get(number) if number is not None else None
            self._spreads.append(Spread(_name(node), where, before, after, why))


def _dependences_in(value: Any) -> list[Dependence]:
    if value is None:
        return []
    return [v for v in value if v is not None] if isinstance(value, list) else [value]


def _mean_row_count(value: Dependence) -> float:
    """Mean number of rows of J that an element depends on, averaged over the rows of tables."""
    return sum(
        1.0 if t.table is None else t.table.nnz / max(t.table.shape[0], 1) for t in value.terms
    )


def _name(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").removesuffix(".default")
