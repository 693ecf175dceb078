"""How much a straight line of operations does, counted exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import fx

from torchjac._torch.trace.ir import Instruction, Value
from torchjac._torch.trace.recording import values_in
from torchjac.host.costs import _CACHED, Work
from torchjac.ops import Fact, having


def work_of_call(call: Instruction) -> Work:
    """The work of one operation."""
    results = [v for v in call.results if v is not None]
    if not call.written and all(v.base is not v for v in results):
        return Work(1)  # a view
    given = values_in((*call.args, *call.kwargs.values()))
    numbers = sum(v.shape.numel() for v in results)
    products = 0
    if call.operation in _PRODUCTS:
        products = numbers * given[-2].shape[-1]
    computed = 0 if call.operation in _NOT_COMPUTED else products or numbers
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


_PRODUCTS = having(Fact.PRODUCT)
_NOT_COMPUTED = having(Fact.NOT_COMPUTED)
