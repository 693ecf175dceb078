"""A batch of few samples in the place of one of many, and whether both are computed alike."""

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
from torchjac.ops import Fact, having

# How many samples are few: what is no other size of the arguments, and divides none by accident.
_FEW = (7, 11, 13, 17, 19, 23)
# A batch of fewer is not worth it.
MANY = 32
_UNIFORM = having(Fact.UNIFORM)
_POINTWISE = having(Fact.POINTWISE)
_BY_PLACE = having(Fact.BY_PLACE)
_NORMS = having(Fact.NORM)
_SIZED = having(Fact.SIZED)
_PER_SAMPLE = having(Fact.PER_SAMPLE)
# What axes are called among their arguments.
_AXES = ("dim", "dims", "dim0", "dim1", "dim2", "dimension", "axis", "source", "destination")


def fewer(call: Call, batch: int) -> tuple[Call, int] | None:
    """The call with the first few samples of its arguments, and how many; None if it has no more.

    Args:
        call: A function and its arguments.
        batch: How many samples they hold, along the leading axes of some.
    """
    return next(several_fewer(call, batch), None)


def several_fewer(call: Call, batch: int) -> Iterator[tuple[Call, int]]:
    """The same for different numbers of samples, the smallest first."""
    tensors = [x for x in flatten((call.args, call.kwargs))[0] if isinstance(x, Tensor)]
    sizes = {size for x in tensors for size in x.shape}
    if batch >= MANY:
        yield from ((with_samples(call, batch, few), few) for few in _FEW if few not in sizes)


def with_samples(call: Call, batch: int, count: int) -> Call:
    """The call with another number of samples: the first ones, or all of them and again the first.

    Args:
        call: A function and its arguments.
        batch: How many samples they hold, along the leading axes of some.
        count: How many there are to be, twice as many at most.
    """
    leaves, spec = flatten((call.args, call.kwargs))
    leading = [isinstance(x, Tensor) and bool(x.ndim) and x.shape[0] == batch for x in leaves]
    taken = [
        x if not lead else x[:count] if count <= batch else torch.cat([x, x])[:count]
        for x, lead in zip(leaves, leading, strict=True)
    ]
    args, kwargs = unflatten(taken, spec)
    return Call(call.function, call.argnums, call.has_aux, args, kwargs)


def alike(less: fx.GraphModule, more: fx.GraphModule, few: int, many: int) -> bool:
    """Whether two graphs are the same operations, but for the size of a batch.

    Args:
        less: What was traced with a batch of few samples.
        more: What was traced with many.
        few: How many are few.
        many: How many are many.
    """
    return _Comparison(less, more, few, many).holds()


@dataclass(slots=True)
class _Comparison:
    """Node by node.

    Samples are along the first axis, and along no other; a number that is the size of the batch may
    only be that size; what is done to one sample is done to all, wherever they stand.

    Attributes:
        less: The graph for few samples.
        more: That for many.
        few: How many samples.
        many: How many.
    """

    less: fx.GraphModule
    more: fx.GraphModule
    few: int
    many: int
    _same: dict[fx.Node, fx.Node] = field(default_factory=dict)
    _sampled: dict[fx.Node, bool] = field(default_factory=dict)

    def holds(self) -> bool:
        """Whether they are."""
        one, other = list(self.less.graph.nodes), list(self.more.graph.nodes)
        return len(one) == len(other) and all(map(self._node, one, other))

    def _node(self, one: fx.Node, other: fx.Node) -> bool:
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
                getattr(self.less, str(one.target)), getattr(self.more, str(other.target))
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
        """Whether an operation does the same to every sample, and to nothing but one sample."""
        taken = [n for n in node.all_input_nodes if self._sampled[n]]
        if not taken:
            return not sampled or node.target in _UNIFORM or node.target is aten.expand.default
        if not sampled:
            return False
        if node.target in _POINTWISE or (
            isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags
        ):
            # With as many axes: or samples would be along another one of the result.
            return all(_ndim(n) == _ndim(node) for n in taken)
        if node.target is operator.getitem:
            return True
        return node.target in _PER_SAMPLE and self._keeps_samples(node, taken)

    def _keeps_samples(self, node: fx.Node, taken: list[fx.Node]) -> bool:
        """Whether the axis of samples is not what is operated on."""
        target: Any = node.target
        schema = target._schema.arguments
        given: dict[str, Any] = {a.name: a.default_value for a in schema if a.has_default_value()}
        given |= dict(zip([a.name for a in schema], node.args, strict=False)) | node.kwargs
        ndim = _ndim(taken[0])
        if node.target in (aten.unsqueeze.default, aten.stack.default):
            ndim += 1  # of the result
        if node.target in (aten.slice_backward.default, aten.select_backward.default):
            ndim = node.meta["val"].ndim
        if node.target is aten.permute.default:
            return given["dims"][0] in (0, -ndim)
        for name in _AXES:
            value = given.get(name)
            values = value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(v, int) and v in (0, -ndim) for v in values):
                return False
        if node.target in (aten.index.Tensor, aten.index_put.default):
            return bool(given["indices"][0] is None)
        if node.target in _BY_PLACE:
            return all(self._sampled[n] for n in node.all_input_nodes)
        if node.target in _NORMS:  # gradients by weights are sums over samples
            shared = any(given.get("output_mask", (True, False, False))[1:])
            return len(given["normalized_shape"]) < ndim and not shared
        if node.target in (aten.tril.default, aten.triu.default):
            return bool(ndim > 2)  # of each matrix in a stack
        if node.target in (aten.mm.default, aten.addmm.default):
            left, right = (self._sampled[n] for n in node.args[-2:])  # type: ignore[index]
            return left and not right
        if node.target in (aten.bmm.default, aten.baddbmm.default):
            return all(self._sampled[n] for n in node.args[-2:])  # type: ignore[index]
        return node.target is not aten.t.default

    def _argument(self, one: Any, other: Any, sizes: bool) -> bool:
        """Whether arguments are the same; in lists of sizes the first may be that of the batch."""
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
        if type(one) is not int or type(other) is not int or one % self.few:
            return False
        return one != other and one * self.many == other * self.few

    def _samples(self, one: Any, other: Any) -> bool | None:
        """Whether a value has samples, along its first axis; None if it is not alike."""
        if isinstance(one, (list, tuple)):
            if not isinstance(other, (list, tuple)) or len(one) != len(other):
                return None
            parts = {self._samples(a, b) for a, b in zip(one, other, strict=True) if a is not None}
            return parts.pop() if len(parts) == 1 else None
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)) or one.dtype != other.dtype:
            return None
        if one.shape == other.shape:
            return False
        alike = one.ndim == other.ndim and one.shape[1:] == other.shape[1:]
        return True if alike and self._scaled(one.shape[0], other.shape[0]) else None

    def _constant(self, one: Any, other: Any) -> bool:
        """Whether what is read is the same: the same tensor, or equal numbers that do not vary."""
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
    """Axes of what a node gives, or of the first thing that it gives."""
    value = node.meta["val"]
    return int((value[0] if isinstance(value, (list, tuple)) else value).ndim)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether numbers are the same, NaN and the sign of zero included."""
    if one.is_floating_point():
        same = (one == other) & (one.signbit() == other.signbit())
        return bool((same | (one.isnan() & other.isnan())).all())
    return torch.equal(one, other)
