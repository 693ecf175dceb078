"""Batch invariance: a call with few samples has the same operations as one with many samples."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from torchjac._torch.operators import aten
from torchjac._torch.pytree import flatten, unflatten
from torchjac._torch.trace.op_traits import OpOverload
from torchjac.call import Call
from torchjac.ops import Fact, operators_with

# Numbers of few samples: a number that is no size of the arguments, and a prime, so that it divides
# none by accident.
_FEW = (7, 11, 13, 17, 19, 23)
# Samples of a batch, at least, for which planning with few samples pays.
MANY = 32
_UNIFORM = operators_with(Fact.UNIFORM)
_POINTWISE = operators_with(Fact.POINTWISE)
_BY_PLACE = operators_with(Fact.BY_PLACE)
_NORMS = operators_with(Fact.NORM)
_SIZED = operators_with(Fact.SIZED)
_PER_SAMPLE = operators_with(Fact.PER_SAMPLE)
# Names of arguments that are axes.
_AXES = ("dim", "dims", "dim0", "dim1", "dim2", "dimension", "axis", "source", "destination")


def first_samples(call: Call, batch: int) -> tuple[Call, int] | None:
    """The call with the first few samples, and their number; None if the batch is small.

    Args:
        call: A function and its arguments.
        batch: The number of samples, along the leading axes of some arguments.
    """
    return next(few_sample_calls(call, batch), None)


def few_sample_calls(call: Call, batch: int) -> Iterator[tuple[Call, int]]:
    """Yields the call with different numbers of its first samples, the smallest number first."""
    tensors = [x for x in flatten((call.args, call.kwargs))[0] if isinstance(x, Tensor)]
    sizes = {size for x in tensors for size in x.shape}
    if batch >= MANY:
        yield from ((with_samples(call, batch, few), few) for few in _FEW if few not in sizes)


def with_samples(call: Call, batch: int, count: int) -> Call:
    """The call with another number of samples: the first ones, or all of them and again the first.

    Args:
        call: A function and its arguments.
        batch: The number of samples, along the leading axes of some arguments.
        count: The new number of samples, twice as many at most.
    """
    leaves, spec = flatten((call.args, call.kwargs))
    leading = [isinstance(x, Tensor) and bool(x.ndim) and x.shape[0] == batch for x in leaves]
    resized = [
        x if not lead else x[:count] if count <= batch else torch.cat([x, x])[:count]
        for x, lead in zip(leaves, leading, strict=True)
    ]
    args, kwargs = unflatten(resized, spec)
    return Call(call.function, call.argnums, call.has_aux, args, kwargs)


def is_batch_invariant(small: fx.GraphModule, large: fx.GraphModule, few: int, many: int) -> bool:
    """Whether two graphs have the same operations, but for the size of a batch.

    Args:
        small: The graph that was traced with few samples.
        large: The graph that was traced with many samples.
        few: The number of few samples.
        many: The number of many samples.
    """
    return _Comparison(small, large, few, many).holds()


@dataclass(slots=True)
class _Comparison:
    """The comparison of two graphs, node by node.

    Samples are along the first axis, and along no other axis. A number that is the size of the
    batch may only be that size. An operation does the same to all samples, wherever they stand.

    Attributes:
        small: The graph for few samples.
        large: The graph for many samples.
        few: The number of few samples.
        many: The number of many samples.
    """

    small: fx.GraphModule
    large: fx.GraphModule
    few: int
    many: int
    _same: dict[fx.Node, fx.Node] = field(default_factory=dict)
    _sampled: dict[fx.Node, bool] = field(default_factory=dict)

    def holds(self) -> bool:
        """Whether all nodes agree."""
        one, other = list(self.small.graph.nodes), list(self.large.graph.nodes)
        return len(one) == len(other) and all(map(self._node, one, other))

    def _node(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether two nodes are the same operation of the same arguments."""
        self._same[one] = other
        if one.op != other.op:
            return False
        if one.op == "output":
            return self._argument(one.args, other.args, False)
        sampled = self._samples(one.meta.get("val"), other.meta.get("val"))
        if sampled is None:
            return False
        self._sampled[one] = sampled
        if one.op == "get_attr":
            return self._constant(
                getattr(self.small, str(one.target)), getattr(self.large, str(other.target))
            )
        if one.op == "placeholder":
            return True
        if one.target != other.target or list(one.kwargs) != list(other.kwargs):
            return False
        sized = sampled and one.target in _SIZED
        args = zip(one.args, other.args, strict=False)
        return (
            self._is_natural(one, sampled)
            and len(one.args) == len(other.args)
            and all(self._argument(a, b, sized) for a, b in args)
            and all(self._argument(one.kwargs[k], other.kwargs[k], sized) for k in one.kwargs)
        )

    def _is_natural(self, node: fx.Node, sampled: bool) -> bool:
        """Whether an operation does the same to every sample, and to one sample at a time."""
        operands = [n for n in node.all_input_nodes if self._sampled[n]]
        if not operands:
            return not sampled or node.target in _UNIFORM or node.target is aten.expand.default
        if not sampled:
            return False
        if node.target in _POINTWISE or (
            isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags
        ):
            # Operands with fewer axes would have their samples along another axis of the result.
            return all(_ndim(n) == _ndim(node) for n in operands)
        if node.target is operator.getitem:
            return True
        return node.target in _PER_SAMPLE and self._keeps_samples(node, operands)

    def _keeps_samples(self, node: fx.Node, operands: list[fx.Node]) -> bool:
        """Whether an operation leaves the axis of samples alone."""
        target: Any = node.target
        schema = target._schema.arguments
        arguments: dict[str, Any] = {
            a.name: a.default_value for a in schema if a.has_default_value()
        }
        arguments |= dict(zip([a.name for a in schema], node.args, strict=False)) | node.kwargs
        ndim = _ndim(operands[0])
        if node.target in (aten.unsqueeze.default, aten.stack.default):
            ndim += 1  # of the result
        if node.target in (aten.slice_backward.default, aten.select_backward.default):
            ndim = node.meta["val"].ndim
        if node.target is aten.permute.default:
            return arguments["dims"][0] in (0, -ndim)
        for name in _AXES:
            value = arguments.get(name)
            values = value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(v, int) and v in (0, -ndim) for v in values):
                return False
        if node.target in (aten.index.Tensor, aten.index_put.default):
            return bool(arguments["indices"][0] is None)
        if node.target in _BY_PLACE:
            return all(self._sampled[n] for n in node.all_input_nodes)
        if node.target in _NORMS:  # gradients by weights are sums over samples
            shared = any(arguments.get("output_mask", (True, False, False))[1:])
            return len(arguments["normalized_shape"]) < ndim and not shared
        if node.target in (aten.tril.default, aten.triu.default):
            return bool(ndim > 2)  # of each matrix in a stack
        if node.target in (aten.mm.default, aten.addmm.default):
            left, right = (self._sampled[n] for n in node.args[-2:])  # type: ignore[index]
            return left and not right
        if node.target in (aten.bmm.default, aten.baddbmm.default):
            return all(self._sampled[n] for n in node.args[-2:])  # type: ignore[index]
        return node.target is not aten.t.default

    def _argument(self, one: Any, other: Any, sizes: bool) -> bool:
        """Whether arguments are the same; the first of a list of sizes may be that of the batch."""
        if isinstance(one, fx.Node):
            return self._same.get(one) is other
        if isinstance(one, (list, tuple)):
            if not isinstance(other, (list, tuple)) or len(one) != len(other):
                return False
            pairs = zip(one, other, strict=True)
            return all(
                self._argument(a, b, False) or (sizes and not k and self._scaled(a, b))
                for k, (a, b) in enumerate(pairs)
            )
        return type(one) is type(other) and bool(one == other)

    def _scaled(self, one: Any, other: Any) -> bool:
        """Whether two numbers are the same multiple of few and of many samples."""
        if type(one) is not int or type(other) is not int or one % self.few:
            return False
        return one != other and one * self.many == other * self.few

    def _samples(self, one: Any, other: Any) -> bool | None:
        """Whether a value has samples, along its first axis; None if the values do not agree."""
        if isinstance(one, (list, tuple)):
            if not isinstance(other, (list, tuple)) or len(one) != len(other):
                return None
            parts = {self._samples(a, b) for a, b in zip(one, other, strict=True) if a is not None}
            return parts.pop() if len(parts) == 1 else None
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)) or one.dtype != other.dtype:
            return None
        if one.shape == other.shape:
            return False
        same = one.ndim == other.ndim and one.shape[1:] == other.shape[1:]
        return True if same and self._scaled(one.shape[0], other.shape[0]) else None

    def _constant(self, one: Any, other: Any) -> bool:
        """Whether constants are the same: one tensor, or equal numbers outside of training."""
        if one is other:
            return True
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
            return False
        if any(x.requires_grad or isinstance(x, torch.nn.Parameter) for x in (one, other)):
            return False  # equal now, and another number after a step of training
        if one.dtype != other.dtype:
            return False
        if one.shape == other.shape:
            return _equal(one, other)
        first = one[:1]  # the same for every sample
        return _equal(one, first.expand_as(one)) and _equal(other, first.expand_as(other))


def _ndim(node: fx.Node) -> int:
    """The number of axes of a node's value, or of its first value."""
    value = node.meta["val"]
    return int((value[0] if isinstance(value, (list, tuple)) else value).ndim)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether the numbers of two tensors are the same, NaN and the sign of zero included."""
    if one.is_floating_point():
        same = (one == other) & (one.signbit() == other.signbit())
        return bool((same | (one.isnan() & other.isnan())).all())
    return torch.equal(one, other)
