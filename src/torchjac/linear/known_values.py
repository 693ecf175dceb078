"""What is known of the values that are not linear in the cotangent, before the program runs.

A value is float64 numbers: NaN where it depends on the input, the number itself where it is the
same whatever the input is. Zeros that are certain (a mask, the zeros of `diag_embed(x)`) are what
makes patterns sharp.
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
from torchjac.linear.maps import UNKNOWN, Factors, Numbers, times
from torchjac.ops import Fact, having


def _laid_out(value: Tensor, like: Tensor) -> Tensor:
    """A tensor with the strides of another; one that repeats along an axis stays as it is."""
    if value.stride() == like.stride() or 0 in like.stride():
        return value
    made = torch.empty_strided(like.shape, like.stride(), dtype=value.dtype, device=value.device)
    return made.copy_(value)


_BY_STRIDES = having(Fact.BY_STRIDES)


class Values:
    """Values of the nodes of one derivative, found when they are asked for."""

    def __init__(self, derivative: LinearProgram, linear: set[fx.Node]):
        """Begins with nothing but the constants that the graph reads.

        Args:
            derivative: The traced backward pass.
            linear: Nodes that depend on the cotangent.
        """
        self._module = derivative.module
        self._local = derivative.scope == "local"
        self._linear = linear
        self._constants: dict[fx.Node, Any] = {}
        self._saved: dict[fx.Node, bool] = {}
        self._known: dict[fx.Node, Tensor] = {}

    def constant(self, node: Any) -> Any:
        """The value of a node that is the same whatever the input is, or None.

        On a graph that exists, every value is: the pattern holds for that evaluation.
        """
        if not isinstance(node, fx.Node):
            return node
        if node not in self._constants:
            for needed in before(node, self._constants, self._is_made_of_arguments):
                self._constants[needed] = self._evaluated(needed)
        return self._constants[node]

    def factors(self, node: fx.Node) -> Tensor:
        """Float64 numbers of the node's shape; NaN where they are not known."""
        if node not in self._known:
            for needed in before(node, self._known, self._is_partial):
                found = self._looked_at(needed)
                if bool(found.isnan().all()):  # unknown throughout: costs nothing from here on
                    found = unknown(tuple(found.shape))
                self._known[needed] = found
        return self._known[node]

    def coefficients(self, node: fx.Node) -> Tensor | Numbers:
        """The same as factors of a map; an engine that computes them gives what it computes."""
        return self.factors(node)

    def response(self, node: fx.Node, operand: fx.Node, known: Factors) -> Factors:
        """What elements of an operand are multiplied by: what is known of it, here."""
        return known

    def is_zero(self, node: Any) -> bool:
        """Whether a value is known to be zero everywhere."""
        if not isinstance(node, fx.Node):
            return not isinstance(node, Tensor) and node == 0
        if node in self._linear:
            return False
        return not bool(self.factors(node).any())

    def _evaluated(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            value: Any = self._module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            if not isinstance(value, Tensor) or (is_parameter(value) and not self._local):
                return None  # training changes its values, and the pattern must hold for all
            return value.detach()
        if node.op != "call_function":
            return None
        if node.target in SHAPE_ONLY:
            return self._filled(node)
        if node in self._linear or tracing.is_random(node.target):
            return None
        if node.target in UNINITIALIZED:
            return None
        if any(self.constant(a) is None for a in node.all_input_nodes):
            return None
        operation: Any = node.target
        if not isinstance(operation, tracing.OpOverload) and operation is not operator.getitem:
            return None
        known = self._laid_out if node.target in _BY_STRIDES else self.constant
        args, kwargs = mapped(node, known)
        with real_values():
            return operation(*args, **kwargs)

    def _laid_out(self, node: Any) -> Any:
        """A constant with the strides that the traced tensor had."""
        value = self.constant(node)
        if not isinstance(node, fx.Node) or not isinstance(value, Tensor):
            return value
        return _laid_out(value, node.meta["val"])

    def _filled(self, node: fx.Node) -> Tensor | None:
        """zeros_like and its kin look only at the shape of their argument."""
        like = node.meta["val"]
        fill: Any = SHAPE_ONLY[node.target]
        if fill is None:
            position = 2 if node.target is aten.new_full.default else 1
            fill = node.args[position]
        if isinstance(fill, fx.Node):
            return None
        value = torch.tensor(fill, dtype=like.dtype, device=device_of(node))
        return value.expand(tuple(like.shape))

    def _looked_at(self, node: fx.Node) -> Tensor:
        shape = tuple(node.meta["val"].shape)
        value = self.constant(node)
        if isinstance(value, Tensor) and value.is_complex():
            return torch.where(value == 0, 0.0, UNKNOWN).to(torch.float64).cpu()
        if isinstance(value, Tensor):
            found: Tensor = value.to(torch.float64)
            saved = self._local and self._is_saved(node)
            if saved or value.dtype in HALF:
                # Saved by the graph: which of these numbers belong to the input is not known. In
                # half precision sums of them are rounded too coarsely for zeros to be proved.
                found = torch.where(found == 0, found, UNKNOWN)
            return found.cpu()
        part = PARTIAL.get(node.target)
        if part is not None and node.op == "call_function" and node not in self._linear:
            found = part(self, node)
            assert isinstance(found, Tensor)
            return found
        return unknown(shape)

    def _is_saved(self, node: fx.Node) -> bool:
        """Whether a floating-point tensor that the graph saved is among what it is made of."""
        if node not in self._saved:
            for needed in before(node, self._saved, lambda _: True):
                value = needed.meta.get("val")
                if needed.op == "get_attr":
                    self._saved[needed] = isinstance(value, Tensor) and value.is_floating_point()
                else:
                    self._saved[needed] = any(self._saved[a] for a in needed.all_input_nodes)
        return self._saved[node]

    def _is_made_of_arguments(self, node: fx.Node) -> bool:
        """Whether a node's value could be found from those of its arguments."""
        return not (
            node.op != "call_function"
            or node.target in SHAPE_ONLY
            or node.target in UNINITIALIZED
            or node in self._linear
            or tracing.is_random(node.target)
        )

    def _is_partial(self, node: fx.Node) -> bool:
        """Whether what is known of a node follows from what is known of its arguments."""
        return (
            node.target in PARTIAL
            and node.op == "call_function"
            and node not in self._linear
            and self.constant(node) is None
        )


def before(
    node: fx.Node, done: Container[fx.Node], through: Callable[[fx.Node], bool]
) -> list[fx.Node]:
    """A node and what it is made of, arguments first, without what is done (graphs are deep).

    Args:
        node: The last of them.
        done: Nodes to leave out.
        through: Whether the arguments of a node are needed.
    """
    found: dict[fx.Node, None] = {}
    stack: list[tuple[fx.Node, bool]] = [(node, False)]
    while stack:
        here, ready = stack.pop()
        if ready:
            found[here] = None
        elif here not in done and here not in found:
            stack.append((here, True))
            if through(here):
                stack += [(a, False) for a in here.all_input_nodes]
    return list(found)


def device_of(node: fx.Node) -> torch.device:
    """Where a node's value would be."""
    found: torch.device = node.meta.get("device", node.meta["val"].device)
    return found


def is_parameter(tensor: Tensor) -> bool:
    """Whether a tensor that a function reads is there to be trained."""
    return tensor.requires_grad or isinstance(tensor, torch.nn.Parameter)


def mapped(node: fx.Node, function: Callable[[fx.Node], Any]) -> tuple[Any, Any]:
    """Arguments of a node with values in the place of nodes."""
    args: Any = fx.map_arg(node.args, function)
    kwargs: Any = fx.map_arg(node.kwargs, function)
    return args, kwargs


def unknown(shape: tuple[int, ...]) -> Tensor:
    """Factors of which nothing is known; costs no memory."""
    return torch.tensor(UNKNOWN, dtype=torch.float64).expand(shape)


HALF = frozenset({torch.float16, torch.bfloat16})

# What they fill the result with; None where an argument says so.
SHAPE_ONLY: Mapping[Any, float | None] = MappingProxyType(
    {
        **dict.fromkeys(having(Fact.SHAPE_ONLY)),
        **dict.fromkeys(having(Fact.SHAPE_ONLY | Fact.ZEROS), 0.0),
        **dict.fromkeys(having(Fact.SHAPE_ONLY | Fact.ONES), 1.0),
    }
)
UNINITIALIZED = having(Fact.UNINITIALIZED)


def _moved(values: Values, node: fx.Node) -> Tensor:
    """Movement of elements: run on what is known of each."""

    def look(argument: fx.Node) -> Any:
        like = argument.meta["val"]
        if not like.dtype.is_floating_point:
            return values.constant(argument)
        found = values.factors(argument)
        return _laid_out(found, like) if node.target in _BY_STRIDES else found

    if any(look(argument) is None for argument in node.all_input_nodes):  # an index, perhaps
        return unknown(tuple(node.meta["val"].shape))
    args, kwargs = mapped(node, look)
    operation: Any = node.target
    with real_values():
        found: Tensor = operation(*args, **kwargs)
    return found


def _multiplied(values: Values, node: fx.Node) -> Tensor:
    shape = tuple(node.meta["val"].shape)
    arguments: tuple[Any, ...] = node.args
    found = [
        values.factors(a).expand(shape)
        if isinstance(a, fx.Node)
        else torch.tensor(
            UNKNOWN if isinstance(a, complex) else float(a), dtype=torch.float64
        ).expand(shape)
        for a in arguments[:2]
    ]
    product = times(found[0], found[1])
    assert isinstance(product, Tensor)
    return product


def _chosen(values: Values, node: fx.Node) -> Tensor:
    """`where`: by a condition that is known, or what both branches agree on."""
    shape = tuple(node.meta["val"].shape)
    arguments: tuple[Any, ...] = node.args
    first, second = (values.factors(a).expand(shape) for a in arguments[1:3])
    condition = values.constant(arguments[0])
    if condition is not None:
        return torch.where(condition.cpu(), first, second)
    return torch.where(first == second, first, UNKNOWN)


def _converted(values: Values, node: fx.Node) -> Tensor:
    if not node.meta["val"].dtype.is_floating_point:
        return unknown(tuple(node.meta["val"].shape))
    source: Any = node.args[0]
    return values.factors(source)


def _masked(values: Values, node: fx.Node) -> Tensor:
    """A sum is -inf where a mask says so, if the other summand is finite, as scores are.

    Nothing else is followed. (Where it is not finite, values and gradients are NaN.)
    """
    shape = tuple(node.meta["val"].shape)
    arguments: tuple[Any, ...] = node.args
    if node.kwargs.get("alpha", 1) != 1:
        return unknown(shape)
    found = [values.factors(a).expand(shape) for a in arguments[:2] if isinstance(a, fx.Node)]
    hidden = torch.stack([f == -math.inf for f in found]).any(0)
    return torch.where(hidden, -math.inf, unknown(shape))


def _softened(values: Values, node: fx.Node) -> Tensor:
    """A softmax is zero where its argument is -inf."""
    arguments: tuple[Any, ...] = node.args
    scores = values.factors(arguments[0])
    return torch.where(scores == -math.inf, 0.0, unknown(tuple(scores.shape)))


PARTIAL: dict[Any, Any] = known(
    {
        aten.add.Tensor: _masked,
        aten._softmax.default: _softened,
        aten._safe_softmax.default: _softened,
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
            _moved,
        ),
        **dict.fromkeys(
            [aten.alias.default, aten.detach.default, aten.clone.default, aten._to_copy.default],
            _converted,
        ),
        aten.mul.Tensor: _multiplied,
        aten.mul.Scalar: _multiplied,
        aten.where.self: _chosen,
        aten.copy.default: lambda values, node: values.factors(node.args[1]).expand(
            tuple(node.meta["val"].shape)
        ),
    }
)
