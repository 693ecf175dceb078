"""The registry of rules: one signature, one entry per operation.

A rule takes an `Op` (one node of the linear graph) and returns the local Jacobian by each operand
that is linear in the cotangent: a list of `(operand, map)`, or a tuple of lists for an operation
with several results. A rule reads its node through the `Op` only.
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
    """The result of an operation may be nonzero although the cotangent is zero."""


# The gap in the rules: an operation, one case of the operation, or this version of its schema.
Lack = Literal["operation", "case", "version"]


class NoRule(Exception):
    """The local Jacobian of an operation is unknown.

    Attributes:
        operation: Name of the operation.
        lack: The gap in the rules.
    """

    def __init__(self, operation: str, lack: Lack, reason: str = "there is no rule for it"):
        super().__init__(reason)
        self.operation = operation
        self.lack = lack


@dataclass(frozen=True, slots=True, eq=False)
class Operand:
    """A tensor argument of an operation.

    Attributes:
        node: The node that computes the tensor.
        shape: Shape of the tensor.
        linear: Whether the tensor depends on the cotangent.
    """

    node: fx.Node
    shape: Shape
    linear: bool
    _values: KnownValues = field(repr=False)

    @property
    def factors(self) -> Tensor | ComputedFactors:
        """The elements, as factors of a map. Not for linear operands."""
        return self._values.coefficients(self.node)

    @property
    def known(self) -> Tensor:
        """The known elements: float64, NaN where unknown. Not for linear operands."""
        return self._values.factors(self.node)

    @property
    def constant(self) -> Any:
        """The value if it is equal for every input, else None."""
        return None if self.linear else self._values.constant(self.node)

    @property
    def zero(self) -> bool:
        """Whether every element is a known zero."""
        return not self.linear and self._values.is_zero(self.node)


Local = list[tuple[Operand, LinearMap]]


@dataclass(frozen=True, slots=True, eq=False)
class Concat:
    """A concatenation of many operands. One map per operand would take quadratic time.

    Attributes:
        axis: Axis of the result along which the parts follow each other.
        parts: Operands, each with the shape of its part of the result. An operand that is not
            linear contributes zero.
    """

    axis: int
    parts: tuple[tuple[Operand, Shape], ...]


class ZeroPreserving(list[tuple[Operand, LinearMap]]):
    """The dependence of an operation with f(0) = 0, linear or not, in the form of a `Local`.

    Enough for a pattern, but no derivative: the compiler must not use the maps.
    """


Rule = Callable[["Op"], Local | tuple[Local, ...] | Concat]


class Op:
    """One node of the linear graph: its arguments by their names in the schema."""

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
            self._arguments[name] = self._wrap(value)

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

    def arguments_without(self, *names: str) -> dict[str, Any]:
        """All arguments except the named ones."""
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
        operands: list[Operand] = []
        for value in self._arguments.values():
            for part in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(part, Operand):
                    operands.append(part)
        return operands

    @property
    def linear(self) -> list[Operand]:
        """The operands that depend on the cotangent."""
        return [o for o in self.operands if o.linear]

    def only(self, name: str) -> Operand:
        """The named operand, which must be the only linear one.

        Raises:
            NotLinear: Another operand depends on the cotangent.
        """
        if any(o is not self[name] for o in self.linear):
            raise NotLinear
        operand: Operand = self[name]
        return operand

    def response(self, operand: Operand, known: Factors = UNKNOWN) -> Factors:
        """The diagonal of the local Jacobian of an elementwise operation by one operand.

        The compiler computes the factors: it runs the operation on ones.

        Args:
            operand: The linear operand; all other linear operands count as zero.
            known: The factors that are known before the program runs.
        """
        return self._values.response(self.node, operand.node, known)

    def constants(self) -> dict[str, Any] | None:
        """All arguments but linear ones, tensors as values; None if a value is unknown."""
        constants: dict[str, Any] = {}
        for name, value in self._arguments.items():
            if isinstance(value, Operand):
                if not value.linear:
                    constants[name] = value.constant
                    if constants[name] is None:
                        return None
            elif isinstance(value, list):
                return None
            else:
                constants[name] = value
        return constants

    def _wrap(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            traced = value.meta.get("val")
            if isinstance(traced, Tensor):
                return Operand(value, tuple(traced.shape), value in self._linear, self._values)
            return value
        if isinstance(value, (list, tuple)):
            return [self._wrap(v) for v in value]
        return value


@lru_cache(maxsize=4096)
def _name(target: OpOverload) -> str:
    return str(target._schema.name)


@lru_cache(maxsize=4096)
def _arguments(target: OpOverload) -> tuple[tuple[str, Any], ...]:
    """Names and defaults of arguments, cached: reading a schema is the slowest part of an `Op`."""
    schema = target._schema
    renamed = _RENAMED.get(schema.name, {})
    return tuple(
        (renamed.get(a.name, a.name), a.default_value if a.has_default_value() else None)
        for a in schema.arguments
    )


# Arguments with another name in some version of torch, and their name in the rules.
_RENAMED: dict[str, dict[str, str]] = {
    "aten::_cdist_backward": {"grad": "grad_output"},  # before torch 2.14
    "aten::_pdist_backward": {"grad": "grad_output"},
}


RULES: dict[OpOverload, Rule] = {}


def local_of(op: Op) -> Local | tuple[Local, ...] | Concat:
    """The local Jacobian of a node, by the rule of its operation.

    Raises:
        NoRule: The operation has no rule, or its rule does not cover this case.
        NotLinear: The operation is not linear here.
    """
    function = RULES.get(op.target)
    if function is None:
        raise NoRule(op.name, "operation")
    return function(op)


def rule(*operations: OpOverload) -> Callable[[Rule], Rule]:
    """Registers a rule for operations, except those that this version of torch lacks.

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
