"""Known values: constant propagation through the nodes that do not depend on the cotangent.

The factors of a node are float64 numbers: NaN where the value depends on the input, the number
itself where it is equal for every input. Certain zeros (of a mask, of `diag_embed(x)`) make
patterns sharp.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Container, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from torchjac._torch.modes import real_values
from torchjac._torch.operators import aten, known
from torchjac._torch.trace import trace as tracing
from torchjac.capture.linear_program import LinearProgram
from torchjac.linear.maps import UNKNOWN, ComputedFactors, Factors, times
from torchjac.ops import Fact, operators_with


def _with_strides_of(value: Tensor, like: Tensor) -> Tensor:
    """A copy with the strides of `like`; if `like` is expanded (stride 0), the tensor itself."""
    if value.stride() == like.stride() or 0 in like.stride():
        return value
    copy = torch.empty_strided(like.shape, like.stride(), dtype=value.dtype, device=value.device)
    return copy.copy_(value)


_BY_STRIDES = operators_with(Fact.BY_STRIDES)


class KnownValues:
    """Known values of the nodes of one linear program, computed lazily."""

    def __init__(self, program: LinearProgram, linear: set[fx.Node]):
        """Starts without any known value.

        Args:
            program: The traced backward pass.
            linear: Nodes that depend on the cotangent.
        """
        self._module = program.module
        self._local = program.scope == "local"
        self._linear = linear
        self._constants: dict[fx.Node, Any] = {}
        self._saved: dict[fx.Node, bool] = {}
        self._known: dict[fx.Node, Tensor] = {}

    def constant(self, node: Any) -> Any:
        """The value of a node if it is equal for every input, else None.

        In local scope every value is a constant: the pattern holds for one evaluation only.
        """
        if not isinstance(node, fx.Node):
            return node
        if node not in self._constants:
            for dependency in topological_order(node, self._constants, self._is_computed):
                self._constants[dependency] = self._evaluate(dependency)
        return self._constants[node]

    def factors(self, node: fx.Node) -> Tensor:
        """The factors of a node: float64 of its shape, NaN where unknown."""
        if node not in self._known:
            for dependency in topological_order(node, self._known, self._has_rule):
                factors = self._compute_factors(dependency)
                if bool(factors.isnan().all()):  # all unknown: later operations cost nothing
                    factors = unknown_factors(tuple(factors.shape))
                self._known[dependency] = factors
        return self._known[node]

    def coefficients(self, node: fx.Node) -> Tensor | ComputedFactors:
        """The factors of a node, for a map; the compiler overrides them by computed factors."""
        return self.factors(node)

    def response(self, node: fx.Node, operand: fx.Node, known: Factors) -> Factors:
        """Factors of an elementwise operation by one operand; the compiler overrides them.

        Args:
            node: The operation.
            operand: A linear operand.
            known: The factors that are known before the program runs.
        """
        return known

    def is_zero(self, node: Any) -> bool:
        """Whether every element of a value is a known zero."""
        if not isinstance(node, fx.Node):
            return not isinstance(node, Tensor) and node == 0
        if node in self._linear:
            return False
        return not bool(self.factors(node).any())

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            value: Any = self._module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            if not isinstance(value, Tensor) or (is_parameter(value) and not self._local):
                return None  # training changes parameters, and the pattern must stay valid
            return value.detach()
        if node.op != "call_function":
            return None
        if node.target in SHAPE_ONLY:
            return self._fill_value(node)
        if node in self._linear or tracing.is_random(node.target):
            return None
        if node.target in UNINITIALIZED:
            return None
        if any(self.constant(a) is None for a in node.all_input_nodes):
            return None
        operation: Any = node.target
        if not isinstance(operation, tracing.OpOverload) and operation is not operator.getitem:
            return None
        constant = self._constant_with_strides if node.target in _BY_STRIDES else self.constant
        args, kwargs = map_arguments(node, constant)
        with real_values():
            return operation(*args, **kwargs)

    def _constant_with_strides(self, node: Any) -> Any:
        """The value of a constant node, with the strides of the traced tensor."""
        value = self.constant(node)
        if not isinstance(node, fx.Node) or not isinstance(value, Tensor):
            return value
        return _with_strides_of(value, node.meta["val"])

    def _fill_value(self, node: fx.Node) -> Tensor | None:
        """The result of a factory function (zeros_like): only the shape of its argument counts."""
        meta = node.meta["val"]
        fill: Any = SHAPE_ONLY[node.target]
        if fill is None:
            position = 2 if node.target is aten.new_full.default else 1
            fill = node.args[position]
        if isinstance(fill, fx.Node):
            return None
        value = torch.tensor(fill, dtype=meta.dtype, device=device_of(node))
        return value.expand(tuple(meta.shape))

    def _compute_factors(self, node: fx.Node) -> Tensor:
        shape = tuple(node.meta["val"].shape)
        value = self.constant(node)
        if isinstance(value, Tensor) and value.is_complex():
            return torch.where(value == 0, 0.0, UNKNOWN).to(torch.float64).cpu()
        if isinstance(value, Tensor):
            factors: Tensor = value.to(torch.float64)
            saved = self._local and self._depends_on_saved(node)
            if saved or value.dtype in HALF:
                # A saved tensor may depend on the input. In half precision rounding is too coarse
                # for a proof of zeros.
                factors = torch.where(factors == 0, factors, UNKNOWN)
            return factors.cpu()
        rule = FACTOR_RULES.get(node.target)
        if rule is not None and node.op == "call_function" and node not in self._linear:
            factors = rule(self, node)
            assert isinstance(factors, Tensor)
            return factors
        return unknown_factors(shape)

    def _depends_on_saved(self, node: fx.Node) -> bool:
        """Whether a node depends on a floating-point tensor that the autograd graph saved."""
        if node not in self._saved:
            for dependency in topological_order(node, self._saved, lambda _: True):
                value = dependency.meta.get("val")
                if dependency.op == "get_attr":
                    self._saved[dependency] = (
                        isinstance(value, Tensor) and value.is_floating_point()
                    )
                else:
                    self._saved[dependency] = any(
                        self._saved[a] for a in dependency.all_input_nodes
                    )
        return self._saved[node]

    def _is_computed(self, node: fx.Node) -> bool:
        """Whether the constant value of a node follows from the values of its arguments."""
        return not (
            node.op != "call_function"
            or node.target in SHAPE_ONLY
            or node.target in UNINITIALIZED
            or node in self._linear
            or tracing.is_random(node.target)
        )

    def _has_rule(self, node: fx.Node) -> bool:
        """Whether a rule computes the factors of a node from the factors of its arguments."""
        return (
            node.target in FACTOR_RULES
            and node.op == "call_function"
            and node not in self._linear
            and self.constant(node) is None
        )


def topological_order(
    node: fx.Node, done: Container[fx.Node], expands: Callable[[fx.Node], bool]
) -> list[fx.Node]:
    """A node and its dependencies in topological order, by an explicit stack (graphs are deep).

    Args:
        node: The last node of the order.
        done: Nodes to leave out.
        expands: Whether the arguments of a node are needed.
    """
    order: dict[fx.Node, None] = {}
    stack: list[tuple[fx.Node, bool]] = [(node, False)]
    while stack:
        current, ready = stack.pop()
        if ready:
            order[current] = None
        elif current not in done and current not in order:
            stack.append((current, True))
            if expands(current):
                stack += [(a, False) for a in current.all_input_nodes]
    return list(order)


def device_of(node: fx.Node) -> torch.device:
    """The device of a node's value."""
    device: torch.device = node.meta.get("device", node.meta["val"].device)
    return device


def is_parameter(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter that training may change."""
    return tensor.requires_grad or isinstance(tensor, torch.nn.Parameter)


def map_arguments(node: fx.Node, function: Callable[[fx.Node], Any]) -> tuple[Any, Any]:
    """Positional and keyword arguments of a node, with each node replaced by a value."""
    args: Any = fx.map_arg(node.args, function)
    kwargs: Any = fx.map_arg(node.kwargs, function)
    return args, kwargs


def unknown_factors(shape: tuple[int, ...]) -> Tensor:
    """Factors that are all unknown, expanded from one number."""
    return torch.tensor(UNKNOWN, dtype=torch.float64).expand(shape)


HALF = frozenset({torch.float16, torch.bfloat16})

# Factory functions, and the number that fills their result; None where an argument holds it.
SHAPE_ONLY: Mapping[Any, float | None] = MappingProxyType(
    {
        **dict.fromkeys(operators_with(Fact.SHAPE_ONLY)),
        **dict.fromkeys(operators_with(Fact.SHAPE_ONLY | Fact.ZEROS), 0.0),
        **dict.fromkeys(operators_with(Fact.SHAPE_ONLY | Fact.ONES), 1.0),
    }
)
UNINITIALIZED = operators_with(Fact.UNINITIALIZED)


def _move_factors(values: KnownValues, node: fx.Node) -> Tensor:
    """Movement of elements: the operation, run on the factors of its arguments."""

    def argument_factors(argument: fx.Node) -> Any:
        meta = argument.meta["val"]
        if not meta.dtype.is_floating_point:
            return values.constant(argument)
        factors = values.factors(argument)
        return _with_strides_of(factors, meta) if node.target in _BY_STRIDES else factors

    if any(
        argument_factors(argument) is None for argument in node.all_input_nodes
    ):  # an index, perhaps
        return unknown_factors(tuple(node.meta["val"].shape))
    args, kwargs = map_arguments(node, argument_factors)
    operation: Any = node.target
    with real_values():
        factors: Tensor = operation(*args, **kwargs)
    return factors


def _mul_factors(values: KnownValues, node: fx.Node) -> Tensor:
    shape = tuple(node.meta["val"].shape)
    arguments: tuple[Any, ...] = node.args
    operands = [
        values.factors(a).expand(shape)
        if isinstance(a, fx.Node)
        else torch.tensor(
            UNKNOWN if isinstance(a, complex) else float(a), dtype=torch.float64
        ).expand(shape)
        for a in arguments[:2]
    ]
    product = times(operands[0], operands[1])
    assert isinstance(product, Tensor)
    return product


def _where_factors(values: KnownValues, node: fx.Node) -> Tensor:
    """`where`: selected by a known condition; otherwise known where both branches are equal."""
    shape = tuple(node.meta["val"].shape)
    arguments: tuple[Any, ...] = node.args
    first, second = (values.factors(a).expand(shape) for a in arguments[1:3])
    condition = values.constant(arguments[0])
    if condition is not None:
        return torch.where(condition.cpu(), first, second)
    return torch.where(first == second, first, UNKNOWN)


def _cast_factors(values: KnownValues, node: fx.Node) -> Tensor:
    if not node.meta["val"].dtype.is_floating_point:
        return unknown_factors(tuple(node.meta["val"].shape))
    source: Any = node.args[0]
    return values.factors(source)


def _add_factors(values: KnownValues, node: fx.Node) -> Tensor:
    """A sum is -inf where one summand is (an attention mask), if the other one is finite.

    All other elements are unknown. If a summand is not finite, values and gradients are NaN.
    """
    shape = tuple(node.meta["val"].shape)
    arguments: tuple[Any, ...] = node.args
    if node.kwargs.get("alpha", 1) != 1:
        return unknown_factors(shape)
    summands = [values.factors(a).expand(shape) for a in arguments[:2] if isinstance(a, fx.Node)]
    masked = torch.stack([f == -math.inf for f in summands]).any(0)
    return torch.where(masked, -math.inf, unknown_factors(shape))


def _softmax_factors(values: KnownValues, node: fx.Node) -> Tensor:
    """A softmax is zero where its argument is -inf."""
    arguments: tuple[Any, ...] = node.args
    scores = values.factors(arguments[0])
    return torch.where(scores == -math.inf, 0.0, unknown_factors(tuple(scores.shape)))


FACTOR_RULES: dict[Any, Any] = known(
    {
        aten.add.Tensor: _add_factors,
        aten._softmax.default: _softmax_factors,
        aten._safe_softmax.default: _softmax_factors,
        **dict.fromkeys(
            [
                aten.view.default,
                aten._unsafe_view.default,
                aten.reshape.default,
                aten.t.default,
                aten.transpose.int,
                aten.permute.default,
                aten.expand.default,
                aten.unsqueeze.default,
                aten.squeeze.dim,
                aten.squeeze.dims,
                aten.squeeze.default,
                aten.slice.Tensor,
                aten.select.int,
                aten.diagonal.default,
                aten.flip.default,
                aten.roll.default,
                aten.cat.default,
                aten.stack.default,
                aten.repeat.default,
                aten.tril.default,
                aten.triu.default,
                aten.slice_scatter.default,
                aten.select_scatter.default,
                aten.diagonal_scatter.default,
                aten.diag_embed.default,
                aten.index.Tensor,
                aten.neg.default,
                aten.index_select.default,
                aten.constant_pad_nd.default,
            ],
            _move_factors,
        ),
        **dict.fromkeys(
            [aten.alias.default, aten.detach.default, aten.clone.default, aten._to_copy.default],
            _cast_factors,
        ),
        aten.mul.Tensor: _mul_factors,
        aten.mul.Scalar: _mul_factors,
        aten.where.self: _where_factors,
        aten.copy.default: lambda values, node: values.factors(node.args[1]).expand(
            tuple(node.meta["val"].shape)
        ),
    }
)
