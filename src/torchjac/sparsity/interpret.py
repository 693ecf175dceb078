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
from torchjac.sparsity.control_flow import BodyValues, Control
from torchjac.sparsity.dependence import Dependence, apply, everything, joined, nothing, seed
from torchjac.sparsity.precision import coarse


@dataclass(frozen=True, slots=True)
class Spread:
    """An operation after which elements depend on more rows than before.

    Attributes:
        operation: Its name.
        where: Line of the user's code, or the autograd node that ran it.
        before: Rows that an element of its argument depends on, on average.
        after: Rows that an element of its result depends on.
        why: Why more than its own rule says was assumed, if so.
    """

    operation: str
    where: str | None
    before: float
    after: float
    why: str | None

    @property
    def growth(self) -> float:
        """How many times more rows an element depends on afterwards."""
        return self.after / max(self.before, 1.0)

    def __str__(self) -> str:
        """Operation, place, and how much it spread."""
        place = f" at {self.where}" if self.where else ""
        note = f" ({self.why})" if self.why else ""
        return f"{self.operation}{place}: {self.before:.4g} -> {self.after:.4g} rows{note}"


@dataclass(frozen=True, slots=True, eq=False)
class Interpretation:
    """What the linear graph says.

    Attributes:
        gradients: Dependence of the gradient of each input leaf; None where there is none.
        spreads: Operations that destroyed sparsity, in the order of the graph.
        assumed: Operations without a rule of their own, and what was assumed.
    """

    gradients: tuple[Dependence | None, ...]
    spreads: tuple[Spread, ...]
    assumed: tuple[str, ...]


def interpret(derivative: LinearProgram) -> Interpretation:
    """Runs the linear graph on what each value depends on."""
    with real_values():
        return _Run(derivative).result()


class _Run:
    def __init__(self, derivative: LinearProgram, values: KnownValues | None = None):
        """Binds a graph; with values of its own, it is a body of control flow."""
        self._derivative = derivative
        self._linear = linear_nodes(derivative)
        self._is_body = values is not None
        self._values = KnownValues(derivative, self._linear) if values is None else values
        self._control = Control(derivative, self._linear, self._values, self._body)
        self._m = derivative.m
        self._found: dict[fx.Node, Any] = {}
        self._fills: dict[fx.Node, float] = {}
        self._spreads: list[Spread] = []
        self._assumed: dict[str, None] = {}

    def result(self) -> Interpretation:
        derivative = self._derivative
        first = 0
        for cotangent, shape in zip(derivative.cotangents, derivative.row_shapes, strict=True):
            if cotangent is not None:
                self._found[cotangent] = seed(tuple(shape), first, self._m)
                self._fills[cotangent] = 1.0
            first += shape.numel()
        needed = needed_nodes(derivative, self._linear)
        for node in derivative.module.graph.nodes:
            if node in self._linear and node in needed and node not in self._found:
                self._found[node] = self._of(node)
        gradients: list[Dependence | None] = []
        for node, shape in zip(derivative.gradients, derivative.column_shapes, strict=True):
            if node is None:
                gradients.append(None)
            elif node in self._found:
                gradients.append(self._found[node])
            else:  # it does not depend on the cotangent: zero, or not a derivative at all
                zero = self._values.is_zero(node)
                if self._is_body and not zero:
                    raise NotLinear
                made = nothing if zero else everything
                gradients.append(made(tuple(shape), self._m))
        return Interpretation(tuple(gradients), tuple(self._spreads), tuple(self._assumed))

    def _of(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            source, position = node.args
            assert isinstance(source, fx.Node)
            made = self._found[source][position]
            self._fills[node] = max(map(_fill, _each(made)), default=0.0)
            return made
        why = None
        try:
            made = self._by_rule(node)
        except NotLinear as reason:
            if self._is_body:
                raise
            why = str(reason) or "its result need not be zero where the cotangent is"
            made = self._for_each(node, lambda s: everything(s, self._m))
        except NoRule as missing:
            why = str(missing) if missing.lack == "version" else "there is no rule for it"
            made = self._for_each(node, lambda s: self._all_to_all(node, s))
        made = self._rounded(node, made)
        if why is not None:
            self._assumed[f"{_name(node)}: {why}"] = None
        self._look(node, made, why)
        return made

    def _rounded(self, node: fx.Node, made: Any) -> Any:
        value = node.meta["val"]
        if isinstance(value, Tensor):
            return coarse(made) if value.dtype in HALF else made
        return [
            coarse(part) if isinstance(v, Tensor) and v.dtype in HALF and part else part
            for part, v in zip(made, value, strict=True)
        ]

    def _by_rule(self, node: fx.Node) -> Any:
        target = node.target
        if isinstance(target, HigherOrderOperator):
            return self._by_body(node)
        if not isinstance(target, OpOverload):
            raise NoRule(str(target), "operation")
        if target not in RULES and "backward" not in target._schema.name:
            raise NotLinear("there is no rule for it")  # nor does it have to vanish with u
        local = local_of(Op(node, self._linear, self._values))
        if isinstance(local, tuple):
            return [
                None if value is None else self._summed(part, tuple(value.shape))
                for part, value in zip(local, node.meta["val"], strict=True)
            ]
        if isinstance(local, Concat):
            return concat([self._placed(*part) for part in local.parts], local.axis)
        return self._summed(local, tuple(node.meta["val"].shape))

    def _placed(self, operand: Operand, shape: tuple[int, ...]) -> Dependence:
        if not operand.linear:
            return nothing(shape, self._m)
        return apply(reshape(shape, operand.shape), self._found[operand.node])

    def _by_body(self, node: fx.Node) -> list[Dependence]:
        made: list[Dependence] = []
        for part, value in zip(self._control.parts(node), node.meta["val"], strict=True):
            found = [apply(map_, self._found[operand]) for operand, map_ in part]
            made.append(joined(found) if found else nothing(tuple(value.shape), self._m))
        return made

    def _body(
        self, body: LinearProgram, given: dict[fx.Node, Any]
    ) -> tuple[Dependence | None, ...]:
        """Runs the body of control flow, and notes what had to be assumed in it."""
        run = _Run(body, BodyValues(body, linear_nodes(body), self._values, given))
        result = run.result()
        self._assumed |= run._assumed
        return result.gradients

    def _summed(self, local: Any, shape: tuple[int, ...]) -> Dependence:
        parts = [apply(map_, self._found[operand.node]) for operand, map_ in local]
        return joined(parts) if parts else nothing(shape, self._m)

    def _for_each(self, node: fx.Node, make: Any) -> Any:
        value = node.meta["val"]
        if isinstance(value, (tuple, list)):
            return [make(tuple(v.shape)) if isinstance(v, Tensor) else None for v in value]
        return make(tuple(value.shape))

    def _all_to_all(self, node: fx.Node, shape: tuple[int, ...]) -> Dependence:
        """Every element of the result depends on every element of every argument."""
        parts = []
        for argument in node.all_input_nodes:
            for value in _each(self._found.get(argument)):
                total = apply(dense((), value.shape), value)
                parts.append(apply(dense(shape, ()), total))
        return joined(parts) if parts else nothing(shape, self._m)

    def _look(self, node: fx.Node, made: Any, why: str | None) -> None:
        self._fills[node] = after = max(map(_fill, _each(made)), default=0.0)
        if after <= 1.5:
            return
        before = max((self._fills.get(a, 0.0) for a in node.all_input_nodes), default=0.0)
        if after > 1.5 * max(before, 1.0):
            number = sequence_of(node)
            where = self._derivative.lines.get(number) if number is not None else None
            self._spreads.append(Spread(_name(node), where, before, after, why))


def _each(value: Any) -> list[Dependence]:
    if value is None:
        return []
    return [v for v in value if v is not None] if isinstance(value, list) else [value]


def _fill(value: Dependence) -> float:
    """Rows that an element depends on, on average over the rows of the tables."""
    return sum(
        1.0 if t.table is None else t.table.nnz / max(t.table.shape[0], 1) for t in value.terms
    )


def _name(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").removesuffix(".default")
