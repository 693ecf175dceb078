"""A batch of few samples in the place of one of many, and whether both are computed alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from torchjac._torch.pytree import flatten, unflatten
from torchjac.capture.function import Call

aten = torch.ops.aten
# How many samples are few: what is no other size of the arguments, and divides none by accident.
_FEW = (7, 11, 13, 17, 19, 23)
# A batch of fewer is not worth it.
MANY = 32
# Operations that take a position along an axis which may be the size of the batch.
_UP_TO = frozenset((aten.slice.Tensor, aten.slice_backward.default))


def fewer(call: Call, batch: int) -> tuple[Call, int] | None:
    """The call with the first few samples of its arguments, and how many; None if it has no more.

    Args:
        call: A function and its arguments.
        batch: How many samples they hold, along the leading axes of some.
    """
    leaves, spec = flatten((call.args, call.kwargs))
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    sizes = {size for x in tensors for size in x.shape}
    few = next((count for count in _FEW if count not in sizes), None)
    if batch < MANY or few is None:
        return None
    leading = [isinstance(x, Tensor) and bool(x.ndim) and x.shape[0] == batch for x in leaves]
    taken = [x[:few] if lead else x for x, lead in zip(leaves, leading, strict=True)]
    args, kwargs = unflatten(taken, spec)
    return Call(call.function, call.argnums, call.has_aux, args, kwargs), few


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

    def holds(self) -> bool:
        """Whether they are."""
        one, other = list(self.less.graph.nodes), list(self.more.graph.nodes)
        return len(one) == len(other) and all(map(self._node, one, other))

    def _node(self, one: fx.Node, other: fx.Node) -> bool:
        self._same[one] = other
        if one.op != other.op or not self._value(one.meta.get("val"), other.meta.get("val")):
            return False
        if one.op == "get_attr":
            return self._constant(
                getattr(self.less, str(one.target)), getattr(self.more, str(other.target))
            )
        if one.op == "placeholder":
            return True
        if one.target != other.target or list(one.kwargs) != list(other.kwargs):
            return False
        spans = one.target in _UP_TO
        args = zip(one.args, other.args, strict=False)
        return (
            len(one.args) == len(other.args)
            and all(self._argument(a, b, spans) for a, b in args)
            and all(self._argument(one.kwargs[k], other.kwargs[k], False) for k in one.kwargs)
        )

    def _argument(self, one: Any, other: Any, sizes: bool) -> bool:
        """Whether arguments are the same; in lists of numbers, and of some operations, as sizes."""
        if isinstance(one, fx.Node):
            return self._same.get(one) is other
        if isinstance(one, (list, tuple)):
            return (
                isinstance(other, (list, tuple))
                and len(one) == len(other)
                and all(self._argument(a, b, True) for a, b in zip(one, other, strict=True))
            )
        if type(one) is not type(other):
            return False
        if isinstance(one, int) and not isinstance(one, bool) and sizes:
            return self._size(one, other)
        return bool(one == other)

    def _size(self, one: int, other: int) -> bool:
        return one == other or (one * self.many == other * self.few and one % self.few == 0)

    def _value(self, one: Any, other: Any) -> bool:
        """Whether results are alike."""
        if isinstance(one, (list, tuple)):
            return len(one) == len(other) and all(map(self._value, one, other))
        if not isinstance(one, Tensor):
            return one is None and other is None
        return (
            one.dtype == other.dtype
            and one.ndim == other.ndim
            and all(map(self._size, one.shape, other.shape))
        )

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
        if not one.ndim or one.shape[0] != self.few or other.shape != (self.many, *one.shape[1:]):
            return False
        first = one[:1]  # the same for every sample
        return _equal(one, first.expand_as(one)) and _equal(other, first.expand_as(other))


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether numbers are the same, NaN and the sign of zero included."""
    if one.is_floating_point():
        same = (one == other) & (one.signbit() == other.signbit())
        return bool((same | (one.isnan() & other.isnan())).all())
    return torch.equal(one, other)
