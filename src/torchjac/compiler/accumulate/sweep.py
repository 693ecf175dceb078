"""The sweep over the linear graph: rules give local Jacobians, adjoints are multiplied by them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import lru_cache, partial, reduce
from typing import Any

import torch
from torch import Tensor, fx

from torchjac._torch.modes import real_values
from torchjac._torch.trace.op_traits import HigherOrderOperator, OpOverload
from torchjac._torch.trace.trace import is_random, sequence_of
from torchjac._torch.vmap import WRONGLY_BATCHED
from torchjac.capture.linear_program import LinearProgram
from torchjac.compiler.accumulate.adjoint import Adjoint, Term, seed
from torchjac.compiler.accumulate.apply import UnknownFactors, apply, sum_terms
from torchjac.compiler.accumulate.apply_opaque import apply_opaque
from torchjac.compiler.accumulate.bottleneck import (
    eliminate,
    eliminate_all,
    is_dense,
    split,
    split_if_narrow,
)
from torchjac.compiler.accumulate.matrix_chain import Cut, cuts
from torchjac.compiler.accumulate.merge import merge_terms
from torchjac.errors import NotKnownLinear, PlanRefused
from torchjac.host.clock import now
from torchjac.linear.graph import linear_nodes, needed_nodes
from torchjac.linear.known_values import SHAPE_ONLY, KnownValues, topological_order
from torchjac.linear.maps import ComputedFactors, Factors, LinearMap, Shape
from torchjac.linear.maps.factors import is_unknown
from torchjac.linear.rules import Concat, NoRule, NotLinear, Op, ZeroPreserving, local_of
from torchjac.ops import Fact, operators_with

Record = Callable[[Callable[[], Any]], Any]


class RunningValues(KnownValues):
    """Values of the nodes as tensors of the running program, for the factors of maps."""

    def __init__(
        self,
        derivative: LinearProgram,
        linear: set[fx.Node],
        inputs: dict[fx.Node, Tensor],
        record: Record,
    ):
        """Takes the tensors that the program is run on.

        Args:
            derivative: The traced backward pass.
            linear: Nodes that depend on the cotangent.
            inputs: A tensor for each placeholder that is not a cotangent.
            record: Runs a function so that its operations become part of the program.
        """
        super().__init__(derivative, linear)
        self._tensors: dict[fx.Node, Any] = dict(inputs)
        self._record = record

    def running(self, node: fx.Node) -> Any:
        """The tensor of a node; its operations run at the first request."""
        if node not in self._tensors:
            for needed in topological_order(node, self._tensors, _has_arguments):
                self._tensors[needed] = self._record(partial(self._compute, needed))
        return self._tensors[node]

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            value: Any = self._module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            return value
        if node.target in SHAPE_ONLY:
            return self.constant(node)
        if node in self._linear or node.op != "call_function":
            raise PlanRefused("the derivative of an operation depends on the cotangent")
        if isinstance(node.target, HigherOrderOperator) or is_random(node.target):
            raise PlanRefused(f"it runs {node.target}")
        args = fx.node.map_arg(node.args, self._tensors.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, self._tensors.__getitem__)
        target: Any = node.target
        return target(*args, **kwargs)

    def coefficients(self, node: fx.Node) -> Tensor | ComputedFactors:
        """Constant factors if all are known beforehand, else the running tensor."""
        known = self.factors(node)
        if not is_unknown(known):
            return known
        return ComputedFactors(tuple(known.shape), lambda: self.running(node))

    def response(self, node: fx.Node, operand: fx.Node, known: Factors) -> Factors:
        """The diagonal of an elementwise operation: its result for an operand of ones."""
        if not isinstance(known, ComputedFactors) and not is_unknown(known):
            return known
        shape = tuple(node.meta["val"].shape)
        like = operand.meta["val"]

        def diagonal() -> Tensor:
            ones = torch.ones((), dtype=like.dtype).expand(like.shape)
            result: Tensor = self.run_linear(node, operand, ones)
            return result

        return ComputedFactors(shape, lambda: self._record(diagonal))

    def run_linear(self, node: fx.Node, operand: fx.Node, value: Tensor) -> Any:
        """Runs an operation on a value of one linear operand, and zeros for all other ones."""

        def argument(source: fx.Node) -> Any:
            if source is operand:
                return value
            if source in self._linear:
                like = source.meta["val"]
                return torch.zeros((), dtype=like.dtype).expand(like.shape)
            return self.running(source)

        args = fx.node.map_arg(node.args, argument)
        kwargs = fx.node.map_arg(node.kwargs, argument)
        target: Any = node.target
        return target(*args, **kwargs)


def _has_arguments(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target not in SHAPE_ONLY


def _remaining_operations(nodes: list[fx.Node]) -> dict[fx.Node, int]:
    """Number of operations that depend on each node and are not cheap.

    Args:
        nodes: Linear nodes, in order.
    """
    sets: dict[fx.Node, int] = {}  # bit sets: the node itself and all its dependents
    for number, node in reversed(list(enumerate(nodes))):
        sets[node] = 0
        for user in node.users:
            if user in sets:
                sets[node] |= sets[user]
        if not _is_cheap(node.target):
            sets[node] |= 1 << number
    remaining = {}
    for node in nodes:
        users = [sets[user] for user in node.users if user in sets]
        remaining[node] = reduce(operator.or_, users, 0).bit_count()
    return remaining


def _last_uses(
    nodes: list[fx.Node], results: Sequence[fx.Node | None]
) -> dict[fx.Node, list[fx.Node]]:
    """Values, without results, of which each node is the last user."""
    position = {node: i for i, node in enumerate(nodes)}
    last: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        users = [position[user] for user in node.users if user in position]
        if users and node not in results:
            last.setdefault(nodes[max(users)], []).append(node)
    return last


@lru_cache(maxsize=4096)
def _is_cheap(target: Any) -> bool:
    return isinstance(target, OpOverload) and target._schema.name.split("::")[1] in _CHEAP


# Names, so that every overload of an operator counts.
_CHEAP = frozenset(op._schema.name.split("::")[1] for op in operators_with(Fact.CHEAP))


class Sweep:
    """Reverse accumulation: from the cotangents to the gradients, in the order of the graph."""

    def __init__(
        self,
        derivative: LinearProgram,
        inputs: dict[fx.Node, Tensor],
        record: Record,
        most: int,
        limit: float,
        samples: int = 1,
    ):
        """Binds a program and its inputs.

        Args:
            derivative: The traced backward pass.
            inputs: A tensor for each placeholder that is not a cotangent.
            record: Runs a function so that its operations become part of the program.
            most: Largest number of elements of all intermediate adjoints together.
            limit: Seconds after which the sweep is refused.
            samples: Number of independent samples.
        """
        self._deadline = now() + limit
        self._derivative = derivative
        self._linear = linear_nodes(derivative)
        self._values = RunningValues(derivative, self._linear, inputs, record)
        self._record = record
        self._budget = most
        self._samples = samples
        self._remaining: dict[fx.Node, int] = {}
        self._adjoints: dict[fx.Node, Any] = {}
        self._position = 0  # values accumulated so far: the number of a bottleneck
        self._bottlenecks: list[str] = []
        self._cuts: dict[fx.Node, Cut] = {}
        self._split_at: dict[fx.Node, int] = {}  # numbers of the bottlenecks of the chain

    @property
    def bottlenecks(self) -> tuple[str, ...]:
        """Values whose elements took the place of rows: size and operation of each."""
        return tuple(self._bottlenecks)

    def gradients(self) -> tuple[Adjoint | None, ...]:
        """The adjoint of each input leaf; None where it is zero.

        Raises:
            PlanRefused: The program cannot be accumulated, or only beyond a limit.
        """
        derivative = self._derivative
        self._seed()
        needed = needed_nodes(derivative, self._linear) & self._linear
        order = [n for n in derivative.module.graph.nodes if n in needed]
        self._remaining = _remaining_operations(order)
        inner = [n for n in order if n not in self._adjoints]
        last_uses = _last_uses(order, derivative.gradients)
        m, n = derivative.m, derivative.n
        self._cuts = cuts(inner, list(self._adjoints), m, n, self._samples)
        for node in derivative.module.graph.nodes:
            if node in needed and node not in self._adjoints:
                try:
                    self._adjoints[node] = self._accumulate(node)
                except PlanRefused as refusal:
                    raise type(refusal)(f"{refusal} (at {self._location(node)})") from refusal
                self._position += 1
                for operand in last_uses.get(node, ()):
                    del self._adjoints[operand]
        gradients: list[Adjoint | None] = []
        for node in derivative.gradients:
            if node is None or node in self._adjoints:
                gradients.append(None if node is None else self._by_rows(self._adjoints[node]))
            elif self._values.is_zero(node):
                gradients.append(None)
            else:
                raise PlanRefused("a gradient does not depend on the cotangent")
        return tuple(gradients)

    def _seed(self) -> None:
        """Sets the adjoints of the cotangents."""
        derivative = self._derivative
        first = 0
        for cotangent, shape in zip(derivative.cotangents, derivative.row_shapes, strict=True):
            if cotangent is not None:
                self._adjoints[cotangent] = seed(tuple(shape), first, cotangent.meta["val"].dtype)
            first += shape.numel()

    def _by_rows(self, adjoint: Adjoint) -> Adjoint:
        """The same adjoint in terms of rows of J."""
        by_rows: Adjoint = self._record(lambda: eliminate_all(adjoint, self._budget))
        self._charge(by_rows)
        return by_rows

    def _accumulate(self, node: fx.Node) -> Any:
        """The adjoint of a node's value; a list of them for a tuple."""
        if node.target is operator.getitem:
            source, position = node.args
            assert isinstance(source, fx.Node)
            return self._adjoints[source][position]
        if not isinstance(node.target, OpOverload):
            raise PlanRefused(f"it runs {node.target}")
        with real_values():
            try:
                local = local_of(Op(node, self._linear, self._values))
            except (NotLinear, NoRule) as missing:
                raise PlanRefused(f"{node.target}: no local Jacobian") from missing
        parts = local if isinstance(local, tuple) else (local,)
        if node.target in WRONGLY_BATCHED or any(
            isinstance(part, ZeroPreserving) for part in parts
        ):
            raise NotKnownLinear(f"{node.target} in the backward pass need not be linear")
        if isinstance(local, tuple):
            value = node.meta["val"]
            return [
                None if v is None else self._sum_over_operands(node, part, tuple(v.shape), item)
                for item, (part, v) in enumerate(zip(local, value, strict=True))
            ]
        if isinstance(local, Concat):
            raise PlanRefused(f"{node.target} of many operands")
        return self._sum_over_operands(node, local, tuple(node.meta["val"].shape), None)

    def _sum_over_operands(
        self, node: fx.Node, local: Any, shape: Shape, item: int | None
    ) -> Adjoint:
        """The adjoint of a value: the sum of local Jacobians times adjoints of operands.

        Args:
            node: The operation.
            local: Operands, each with the local Jacobian.
            shape: Shape of the value.
            item: Position of the value in the operation's result; None if it is the result.
        """
        terms: list[Term] = []
        for operand, map_ in local:
            terms += self._apply(node, operand.node, map_, item).terms
        adjoint: Adjoint = self._record(lambda: self._combine(node, shape, terms))
        self._charge(adjoint)
        bottlenecks = [x.bottleneck for x in adjoint.terms if x.bottleneck is not None]
        if any(bottleneck.number == self._position for bottleneck in bottlenecks):
            self._bottlenecks.append(f"{math.prod(shape)} at {self._location(node)}")
        return adjoint

    def _combine(self, node: fx.Node, shape: Shape, terms: list[Term]) -> Adjoint:
        """The adjoint of a value from its terms, split where that pays."""
        remaining = self._remaining[node]
        m, n = self._derivative.m, self._derivative.n
        adjoint = merge_terms(sum_terms(shape, terms), m, remaining)
        if node in self._cuts:
            adjoint = self._multiply_chain(node, adjoint)
            if is_dense(adjoint, self._samples, m):
                return self._split_chain(node, adjoint)
        if not remaining:
            return adjoint
        block = m // self._samples, n // self._samples
        return split_if_narrow(adjoint, self._position, block, n, remaining, self._budget)

    def _multiply_chain(self, node: fx.Node, adjoint: Adjoint) -> Adjoint:
        """Takes the products of the chain that end at a value."""
        for source in self._cuts[node].products:
            adjoint = eliminate(adjoint, self._split_at.get(source, -1), self._budget)
        return adjoint

    def _split_chain(self, node: fx.Node, adjoint: Adjoint) -> Adjoint:
        """Splits the chain at a value, if the cheapest order does."""
        identity = split(adjoint, self._position) if self._cuts[node].splits else None
        if identity is None:
            return adjoint
        self._split_at[node] = self._position
        return identity

    def _apply(self, node: fx.Node, operand: fx.Node, map_: LinearMap, item: int | None) -> Adjoint:
        """The local Jacobian of one operand, times the operand's adjoint."""
        adjoint = self._adjoints[operand]

        def run(value: Tensor) -> Tensor:
            result: Tensor = self._values.run_linear(node, operand, value)
            return result if item is None else result[item]

        product: Adjoint
        try:
            product = self._record(lambda: apply(map_, adjoint))
        except UnknownFactors:
            dtype = operand.meta["val"].dtype
            product = self._record(lambda: apply_opaque(map_, adjoint, run, dtype, self._budget))
        return product

    def _location(self, node: fx.Node) -> str:
        """An operation, and the line of the user's code, if known."""
        line = self._derivative.lines.get(sequence_of(node) or -1)
        return f"{node.target}, {line}" if line else str(node.target)

    def _charge(self, adjoint: Adjoint) -> None:
        """Takes an adjoint's elements off the budget.

        Raises:
            PlanRefused: Elements or time are used up.
        """
        self._budget -= sum(max(term.size, math.prod(term.loop) // 8) for term in adjoint.terms)
        if self._budget < 0:
            raise PlanRefused("intermediate adjoints would take too much memory")
        if now() > self._deadline:
            raise PlanRefused("it takes too long to plan")
