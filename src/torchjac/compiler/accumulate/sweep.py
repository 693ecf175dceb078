"""The walk over the linear graph: rules give local Jacobians, adjoints are multiplied by them."""

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
from torchjac.compiler.accumulate.apply import NoNumbers, apply, joined
from torchjac.compiler.accumulate.apply_opaque import operated
from torchjac.compiler.accumulate.bottleneck import closed, is_dense, narrowed, opened, resolved
from torchjac.compiler.accumulate.matrix_chain import Point, points
from torchjac.compiler.accumulate.merge import merged
from torchjac.errors import NotKnownLinear, PlanRefused
from torchjac.host.clock import now
from torchjac.linear.graph import linear_nodes, needed_nodes
from torchjac.linear.known_values import SHAPE_ONLY, KnownValues, topological_order
from torchjac.linear.maps import ComputedFactors, Factors, LinearMap, Shape
from torchjac.linear.maps.factors import is_unknown
from torchjac.linear.rules import Concat, NoRule, NotLinear, Op, ZeroPreserving, local_of
from torchjac.ops import Fact, having

Record = Callable[[Callable[[], Any]], Any]


class Running(KnownValues):
    """Values of the running program, for the factors of maps."""

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
            record: Runs something so that its operations become part of the program.
        """
        super().__init__(derivative, linear)
        self._run: dict[fx.Node, Any] = dict(inputs)
        self._record = record

    def running(self, node: fx.Node) -> Any:
        """The tensor of a node; its operations are run if they have not been."""
        if node not in self._run:
            for needed in topological_order(node, self._run, _has_arguments):
                self._run[needed] = self._record(partial(self._executed, needed))
        return self._run[node]

    def _executed(self, node: fx.Node) -> Any:
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
        args = fx.node.map_arg(node.args, self._run.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, self._run.__getitem__)
        target: Any = node.target
        return target(*args, **kwargs)

    def coefficients(self, node: fx.Node) -> Tensor | ComputedFactors:
        """What is known beforehand where all of it is, else the running tensor."""
        known = self.factors(node)
        if not is_unknown(known):
            return known
        return ComputedFactors(tuple(known.shape), lambda: self.running(node))

    def response(self, node: fx.Node, operand: fx.Node, known: Factors) -> Factors:
        """What an elementwise operation makes of ones."""
        if not isinstance(known, ComputedFactors) and not is_unknown(known):
            return known
        shape = tuple(node.meta["val"].shape)
        like = operand.meta["val"]

        def made() -> Tensor:
            ones = torch.ones((), dtype=like.dtype).expand(like.shape)
            found: Tensor = self.operate(node, operand, ones)
            return found

        return ComputedFactors(shape, lambda: self._record(made))

    def operate(self, node: fx.Node, operand: fx.Node, given: Tensor) -> Any:
        """Runs an operation on something in the place of one linear operand, zeros for others."""

        def argument(one: fx.Node) -> Any:
            if one is operand:
                return given
            if one in self._linear:
                like = one.meta["val"]
                return torch.zeros((), dtype=like.dtype).expand(like.shape)
            return self.running(one)

        args = fx.node.map_arg(node.args, argument)
        kwargs = fx.node.map_arg(node.kwargs, argument)
        target: Any = node.target
        return target(*args, **kwargs)


def _has_arguments(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target not in SHAPE_ONLY


def _below(nodes: list[fx.Node]) -> dict[fx.Node, int]:
    """How many operations that cost something are still to come after each node, in order."""
    sets: dict[fx.Node, int] = {}
    for number, node in reversed(list(enumerate(nodes))):
        sets[node] = 0
        for user in node.users:
            if user in sets:
                sets[node] |= sets[user]
        if not _is_cheap(node.target):
            sets[node] |= 1 << number
    below = {}
    for node in nodes:
        own = [sets[user] for user in node.users if user in sets]
        below[node] = reduce(operator.or_, own, 0).bit_count()
    return below


def _last_uses(
    nodes: list[fx.Node], kept: Sequence[fx.Node | None]
) -> dict[fx.Node, list[fx.Node]]:
    """Values that each node is the last one to need."""
    position = {node: i for i, node in enumerate(nodes)}
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        users = [position[user] for user in node.users if user in position]
        if users and node not in kept:
            found.setdefault(nodes[max(users)], []).append(node)
    return found


@lru_cache(maxsize=4096)
def _is_cheap(target: Any) -> bool:
    return isinstance(target, OpOverload) and target._schema.name.split("::")[1] in _CHEAP


# Names, so that every overload of an operator counts.
_CHEAP = frozenset(op._schema.name.split("::")[1] for op in having(Fact.CHEAP))


class Sweep:
    """From the cotangents to the gradients, in the order of the graph (reverse accumulation)."""

    def __init__(
        self,
        derivative: LinearProgram,
        inputs: dict[fx.Node, Tensor],
        record: Record,
        most: int,
        limit: float,
        samples: int = 1,
    ):
        """Binds a program and the tensors to run it on.

        Args:
            derivative: The traced backward pass.
            inputs: A tensor for each placeholder that is not a cotangent.
            record: Runs something so that its operations become part of the program.
            most: Numbers that intermediate adjoints may have, all together.
            limit: Seconds that it may take.
            samples: Independent samples.
        """
        self._deadline = now() + limit
        self._derivative = derivative
        self._linear = linear_nodes(derivative)
        self._values = Running(derivative, self._linear, inputs, record)
        self._record = record
        self._left = most
        self._below: dict[fx.Node, int] = {}
        self._found: dict[fx.Node, Any] = {}
        self._reached = 0  # values so far, by which waists are numbered
        self._waists: list[str] = []
        self._points: dict[fx.Node, Point] = {}
        self._opened: dict[fx.Node, int] = {}
        self._samples = samples

    @property
    def waists(self) -> tuple[str, ...]:
        """Values that took the place of rows: their size, and the operation that made them."""
        return tuple(self._waists)

    def gradients(self) -> tuple[Adjoint | None, ...]:
        """The adjoint of each input leaf; None where it is zero.

        Raises:
            PlanRefused: It cannot be done this way, or would take too much.
        """
        derivative = self._derivative
        first = 0
        for cotangent, shape in zip(derivative.cotangents, derivative.row_shapes, strict=True):
            if cotangent is not None:
                self._found[cotangent] = seed(tuple(shape), first, cotangent.meta["val"].dtype)
            first += shape.numel()
        needed = needed_nodes(derivative, self._linear) & self._linear
        order = [n for n in derivative.module.graph.nodes if n in needed]
        self._below = _below(order)
        inner = [n for n in order if n not in self._found]
        last = _last_uses(order, derivative.gradients)
        m, n = derivative.m, derivative.n
        self._points = points(inner, list(self._found), m, n, self._samples)
        for node in derivative.module.graph.nodes:
            if node in needed and node not in self._found:
                try:
                    self._found[node] = self._of(node)
                except PlanRefused as refusal:
                    raise type(refusal)(f"{refusal} (at {self._named(node)})") from refusal
                self._reached += 1
                for operand in last.get(node, ()):  # nobody needs them any more
                    del self._found[operand]
        gradients: list[Adjoint | None] = []
        for node in derivative.gradients:
            if node is None or node in self._found:
                gradients.append(None if node is None else self._whole(self._found[node]))
            elif self._values.is_zero(node):
                gradients.append(None)
            else:
                raise PlanRefused("a gradient does not depend on the cotangent")
        return tuple(gradients)

    def _whole(self, adjoint: Adjoint) -> Adjoint:
        made: Adjoint = self._record(lambda: resolved(adjoint, self._left))
        self._count(made)
        return made

    def _of(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            source, position = node.args
            assert isinstance(source, fx.Node)
            return self._found[source][position]
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
                None if v is None else self._summed(node, part, tuple(v.shape), item)
                for item, (part, v) in enumerate(zip(local, value, strict=True))
            ]
        if isinstance(local, Concat):
            raise PlanRefused(f"{node.target} of many operands")
        return self._summed(node, local, tuple(node.meta["val"].shape), None)

    def _summed(self, node: fx.Node, local: Any, shape: Shape, item: int | None) -> Adjoint:
        found: list[Term] = []
        for operand, map_ in local:
            found += self._applied(node, operand.node, map_, item).terms
        below = self._below[node]
        m = self._derivative.m
        n = self._derivative.n

        def gathered() -> Adjoint:
            made = merged(joined(shape, found), m, below)
            if node in self._points:
                made = self._product(node, made)
                if is_dense(made, self._samples, m):
                    return self._split(node, made)
            block = m // self._samples, n // self._samples
            return narrowed(made, self._reached, block, n, below, self._left) if below else made

        made: Adjoint = self._record(gathered)
        self._count(made)
        if any(x.table is not None and x.table.number == self._reached for x in made.terms):
            self._waists.append(f"{math.prod(shape)} at {self._named(node)}")
        return made

    def _product(self, node: fx.Node, adjoint: Adjoint) -> Adjoint:
        """Takes the products that end at a value of the chain."""
        for waist in self._points[node].closed:
            adjoint = closed(adjoint, self._opened.get(waist, -1), self._left)
        return adjoint

    def _split(self, node: fx.Node, adjoint: Adjoint) -> Adjoint:
        """Splits the chain, if that is to be done at this value."""
        made = opened(adjoint, self._reached) if self._points[node].opened else None
        if made is None:
            return adjoint
        self._opened[node] = self._reached
        return made

    def _applied(
        self, node: fx.Node, operand: fx.Node, map_: LinearMap, item: int | None
    ) -> Adjoint:
        adjoint = self._found[operand]

        def run(given: Tensor) -> Tensor:
            found: Tensor = self._values.operate(node, operand, given)
            return found if item is None else found[item]

        made: Adjoint
        try:
            made = self._record(lambda: apply(map_, adjoint))
        except NoNumbers:
            dtype = operand.meta["val"].dtype
            made = self._record(lambda: operated(map_, adjoint, run, dtype, self._left))
        return made

    def _named(self, node: fx.Node) -> str:
        """An operation, and the line of the user's that it comes from, if that is known."""
        line = self._derivative.lines.get(sequence_of(node) or -1)
        return f"{node.target}, {line}" if line else str(node.target)

    def _count(self, made: Adjoint) -> None:
        self._left -= sum(max(term.size, math.prod(term.loop) // 8) for term in made.terms)
        if self._left < 0:
            raise PlanRefused("intermediate adjoints would take too much memory")
        if now() > self._deadline:
            raise PlanRefused("it takes too long to plan")
