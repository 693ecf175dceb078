"""How much a straight line of operations does, counted exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import fx

from torchjac._torch.operators import aten, known
from torchjac._torch.trace.ir import Called, Value
from torchjac._torch.trace.recording import values_in
from torchjac.host.costs import _CACHED, Work


def work_of_call(call: Called) -> Work:
    """The work of one operation."""
    results = [v for v in call.results if v is not None]
    if not call.written and all(v.base is not v for v in results):
        return Work(1)  # a view
    given = values_in((*call.args, *call.kwargs.values()))
    numbers = sum(v.shape.numel() for v in results)
    products = 0
    if call.operation in _PRODUCTS:
        products = numbers * given[-2].shape[-1]
    computed = 0 if call.operation in _MOVES else products or numbers
    moved = _bytes([*given, *results])
    large = max((v.shape.numel() * v.dtype.itemsize for v in (*results, *given)), default=0)
    near, far = (moved, 0) if large <= _CACHED else (0, moved)
    return Work(1, computed, products, near, far)


def work_of(graph: fx.Graph) -> Work:
    """The work of a graph whose nodes carry that of their own."""
    total = Work()
    for node in graph.nodes:
        total += node.meta.get("work", Work())
    return total


def _bytes(values: Iterable[Value]) -> int:
    """Bytes that values take, those that are the same along an axis once."""
    total = 0
    for v in values:
        sizes = zip(v.shape, v.stride, strict=True)
        total += math.prod(size for size, step in sizes if step) * v.dtype.itemsize
    return total


_PRODUCTS = known(
    {
        aten.mm.default,
        aten.bmm.default,
        aten.mv.default,
        aten.addmm.default,
        aten.baddbmm.default,
        aten.matmul.default,
    }
)
_MOVES = known(
    {
        aten.cat.default,
        aten.clone.default,
        aten.constant_pad_nd.default,
        aten.copy_.default,
        aten.empty.memory_format,
        aten.fill_.Scalar,
        aten.flip.default,
        aten.gather.default,
        aten.index.Tensor,
        aten.index_select.default,
        aten.neg.default,
        aten.roll.default,
        aten.scatter.src,
        aten.stack.default,
        aten.zeros.default,
        aten.zero_.default,
    }
)
