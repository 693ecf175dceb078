"""The work of a tensor program, counted exactly; `host/costs.py` predicts the seconds of it."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import fx

from torchjac._torch.trace.ir import Instruction, Value
from torchjac._torch.trace.recording import Recording, values_in
from torchjac.host.costs import CACHED_BYTES, ProgramWork
from torchjac.ops import Fact, operators_with


def work_of_call(call: Instruction) -> ProgramWork:
    """The work of one operation."""
    results = [v for v in call.results if v is not None]
    if not call.written and all(v.base is not v for v in results):
        return ProgramWork(1)  # a view
    operands = values_in((*call.args, *call.kwargs.values()))
    numbers = sum(v.shape.numel() for v in results)
    products = 0
    if call.operation in _PRODUCTS:
        products = numbers * operands[-2].shape[-1]
    computed = 0 if call.operation in _NOT_COMPUTED else products or numbers
    moved = _bytes([*operands, *results])
    sizes = (v.shape.numel() * v.dtype.itemsize for v in (*results, *operands))
    near, far = (moved, 0) if max(sizes, default=0) <= CACHED_BYTES else (0, moved)
    return ProgramWork(1, computed, products, near, far)


def work_of(graph: fx.Graph) -> ProgramWork:
    """The work of a graph whose nodes carry their own work."""
    total = ProgramWork()
    for node in graph.nodes:
        total += node.meta.get("work", ProgramWork())
    return total


def numbers_of(recording: Recording) -> int:
    """Numbers that the operations of a recording compute."""
    results = [v for call in recording.calls for v in call.results if v is not None]
    return sum(math.prod(v.shape) for v in results)


def _bytes(values: Iterable[Value]) -> int:
    """Bytes of values; elements that are the same along an axis count once."""
    total = 0
    for v in values:
        sizes = zip(v.shape, v.stride, strict=True)
        total += math.prod(size for size, step in sizes if step) * v.dtype.itemsize
    return total


_PRODUCTS = operators_with(Fact.PRODUCT)
_NOT_COMPUTED = operators_with(Fact.NOT_COMPUTED)
