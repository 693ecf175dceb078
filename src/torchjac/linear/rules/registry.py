"""The registry of rules: one signature, one entry an operation.

A rule takes an `Op` (one node of the linear graph) and says how its result depends on each operand
that is linear in the cotangent: a list of `(operand, map)`; for an operation with several results
a tuple of such lists. Everything a rule needs to know of its node it asks of the `Op`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal, cast

from torch import Tensor, fx

from torchjac._torch.operators import known
from torchjac._torch.trace.op_traits import OpOverload
from torchjac.linear.known_values import KnownValues
from torchjac.linear.maps import UNKNOWN, ComputedFactors, Factors, LinearMap, Shape


class NotLinear(Exception):
    """The result of an operation need not be zero where the cotangent is."""


# What rules do not cover: an operation, one case of it, or this version of its schema.
Lack = Literal["operation", "case", "version"]


class NoRule(Exception):
    """There is no local Jacobian of an operation.

    Attributes:
        operation: Its name.
        lack: What the rules do not cover.
    """

    def __init__(self, operation: str, lack: Lack, reason: str = "there is no rule for it"):
        super().__init__(reason)
        self.operation = operation
        self.lack = lack


@dataclass(frozen=True, slots=True, eq=False)
class Operand:
    """A tensor argument of an operation.

    Attributes:
        node: The node that makes it.
        shape: Its shape.
        linear: Whether it depends on the cotangent.
    """

    node: fx.Node
    shape: Shape
    linear: bool
    _values: KnownValues = field(repr=False)

    @property
    def factors(self) -> Tensor | ComputedFactors:
        """Its numbers, as factors of a map. Not for linear operands."""
        return self._values.coefficients(self.node)

    @property
    def known(self) -> Tensor:
        """Float64 numbers of its shape; NaN where they are not known. Not for linear operands."""
        return self._values.factors(self.node)

    @property
    def constant(self) -> Any:
        """Its value if that is the same for every input, else None."""
        return None if self.linear else self._values.constant(self.node)

    @property
    def zero(self) -> bool:
        """Whether it is known to be zero everywhere."""
        return not self.linear and self._values.is_zero(self.node)


Local = list[tuple[Operand, LinearMap]]


@dataclass(frozen=True, slots=True, eq=False)
class Concat:
    """A concatenation of many operands. One map per operand would cost their number squared.

    Attributes:
        axis: Axis of the result along which the parts follow each other.
        parts: Operands, each with the shape of its part of the result. An operand that is not
            linear contributes zero.
    """

    axis: int
    parts: tuple[tuple[Operand, Shape], ...]


class Vanishing(list[tuple[Operand, LinearMap]]):
    """A `Local` of an operation that need not be linear: its result is zero where operands are.

    That is enough for a pattern; an engine must not take it for a derivative.
    """


Rule = Callable[["Op"], Local | tuple[Local, ...] | Concat]


class Op:
    """One node of the linear graph, as rules see it: arguments by their names in the schema."""

    def __init__(self, node: fx.Node, linear: set[fx.Node], values: KnownValues):
        """Binds the arguments of a node."""
        self.node = node
        self.target = cast(Any, node.target)
        self._linear = linear
        self._values = values
        self._arguments: dict[str, Any] = {}
        args, kwargs = node.args, node.kwargs
        for position, (name, default) in enumerate(_arguments(self.target)):
            value = args[position] if position < len(args) else kwargs.get(name, default)
            self._arguments[name] = self._wrapped(value)

    def __getitem__(self, name: str) -> Any:
        """An argument: an `Operand` (or a list of them) for tensors, else the Python value.

        Raises:
            NoRule: This version of torch has no argument of that name.
        """
        if name not in self._arguments:
            reason = f"its rule expects an argument {name!r}, which this torch has not"
            raise NoRule(self.name, "version", reason)
        return self._arguments[name]

    def __contains__(self, name: str) -> bool:
        """Whether the operation has an argument of that name."""
        return name in self._arguments

    @property
    def arguments(self) -> Mapping[str, Any]:
        """All arguments by name, in the order of the schema."""
        return self._arguments

    def others(self, *names: str) -> dict[str, Any]:
        """The arguments that have other names."""
        return {k: v for k, v in self._arguments.items() if k not in names}

    @property
    def name(self) -> str:
        """Name of the operation without its overload, such as `aten::add`."""
        return _name(self.target)

    @cached_property
    def shape(self) -> Shape:
        """Shape of the (first) result."""
        value = self.node.meta["val"]
        first = value[0] if isinstance(value, (tuple, list)) else value
        return tuple(first.shape)

    @property
    def operands(self) -> list[Operand]:
        """Every tensor argument, in order."""
        found: list[Operand] = []
        for value in self._arguments.values():
            for part in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(part, Operand):
                    found.append(part)
        return found

    @property
    def linear(self) -> list[Operand]:
        """The operands that depend on the cotangent."""
        return [o for o in self.operands if o.linear]

    def only(self, name: str) -> Operand:
        """The one linear operand, which must be this one.

        Raises:
            NotLinear: Another operand depends on the cotangent as well.
        """
        if any(o is not self[name] for o in self.linear):
            raise NotLinear
        operand: Operand = self[name]
        return operand

    def response(self, operand: Operand, known: Factors = UNKNOWN) -> Factors:
        """What each element of a linear operand is multiplied by, in an elementwise operation.

        An engine that needs the numbers runs the operation on ones.

        Args:
            operand: The operand; others that are linear count as zero.
            known: What is known of the factors beforehand.
        """
        return self._values.response(self.node, operand.node, known)

    def constants(self) -> dict[str, Any] | None:
        """All arguments with values for tensors, linear ones left out; None if one is unknown."""
        found: dict[str, Any] = {}
        for name, value in self._arguments.items():
            if isinstance(value, Operand):
                if not value.linear:
                    found[name] = value.constant
                    if found[name] is None:
                        return None
            elif isinstance(value, list):
                return None
            else:
                found[name] = value
        return found

    def _wrapped(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            made = value.meta.get("val")
            if isinstance(made, Tensor):
                return Operand(value, tuple(made.shape), value in self._linear, self._values)
            return value
        if isinstance(value, (list, tuple)):
            return [self._wrapped(v) for v in value]
        return value


@lru_cache(maxsize=4096)
def _name(target: OpOverload) -> str:
    return str(target._schema.name)


@lru_cache(maxsize=4096)
def _arguments(target: OpOverload) -> tuple[tuple[str, Any], ...]:
    """Names and defaults (asking a schema takes longer than anything else about a node)."""
    schema = target._schema
    renamed = _RENAMED.get(schema.name, {})
    return tuple(
        (renamed.get(a.name, a.name), a.default_value if a.has_default_value() else None)
        for a in schema.arguments
    )


# Arguments that have another name in some version of torch, and the name that rules use.
_RENAMED: dict[str, dict[str, str]] = {
    "aten::_cdist_backward": {"grad": "grad_output"},  # before torch 2.14
    "aten::_pdist_backward": {"grad": "grad_output"},
}


RULES: dict[OpOverload, Rule] = {}


def local_of(op: Op) -> Local | tuple[Local, ...] | Concat:
    """What the rule of an operation says.

    Raises:
        NoRule: There is none, or it does not cover this case.
        NotLinear: The operation is not linear here.
    """
    found = RULES.get(op.target)
    if found is None:
        raise NoRule(op.name, "operation")
    return found(op)


def rule(*operations: OpOverload) -> Callable[[Rule], Rule]:
    """Registers a rule for operations; those that this torch lacks are left out.

    Raises:
        ValueError: An operation has a rule already.
    """

    def register(function: Rule) -> Rule:
        for operation in known(operations):
            if operation in RULES:
                raise ValueError(f"{operation} has a rule already: {RULES[operation].__name__}")
            RULES[operation] = function
        return function

    return register
