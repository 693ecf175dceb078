"""How much a straight line of operations does, counted exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from torchjac._torch.notes import Called, Value
from torchjac._torch.operators import aten, known
from torchjac._torch.recording import values_in

# Tensors larger than this do not stay in cache.
_CACHED = 2**20


@dataclass(frozen=True, slots=True)
class Work:
    """Counts.

    Attributes:
        operations: Operations that run, views too.
        multiplications: One for each number that an operation computes, and those of `products`.
        products: Multiplications in matrix products.
        near: Bytes read and written by operations on small tensors.
        far: By those on tensors that do not stay in cache.
    """

    operations: int = 0
    multiplications: int = 0
    products: int = 0
    near: int = 0
    far: int = 0

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.near + self.far

    def __add__(self, other: Work) -> Work:
        """One after the other."""
        return Work(
            self.operations + other.operations,
            self.multiplications + other.multiplications,
            self.products + other.products,
            self.near + other.near,
            self.far + other.far,
        )

    def times(self, factor: float) -> Work:
        """The work of the same operations on tensors that are larger by a factor."""
        large = factor * self.near / max(self.operations, 1) > _CACHED
        near, far = int(factor * self.near), int(factor * self.far)
        return Work(
            self.operations,
            int(factor * self.multiplications),
            int(factor * self.products),
            0 if large else near,
            near + far if large else far,
        )


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
