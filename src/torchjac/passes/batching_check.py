"""Compares some rows of a batched pass with the same rows of plain passes.

Both do the same arithmetic, so they agree closely even where a Jacobian is all rounding noise or a
backward is not linear: what differs is a wrong batching rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from torchjac.passes.batched_pass import Passes
from torchjac.passes.freivalds import tolerance
from torchjac.passes.slab import Slab
from torchjac.passes.structure import Structure

# Bytes of the rows that are kept for comparison.
_KEPT = 4 * 2**20
_ALWAYS, _MOST = 6, 32


class BatchingCheck:
    """Keeps copies of rows spread over all output leaves, and compares them.

    A few are compared always; the others where something else gave cause for doubt.
    """

    def __init__(self, structure: Structure, inputs: Sequence[Tensor]):
        size = sum(t.numel() * t.element_size() for t in inputs)
        count = max(2, min(_MOST, _KEPT // max(1, size)))
        self._wanted = _spread(structure, count)
        # Allocated at once: rows that are copied one by one would pin the heap between the
        # temporaries of the passes.
        self._kept = [
            torch.zeros((count, *t.shape), dtype=t.dtype, device=t.device) for t in inputs
        ]
        self._present: dict[int, list[bool]] = {}
        self._recorded = False

    def add(self, slab: Slab) -> None:
        """Copies the rows that are wanted."""
        self._recorded |= any(v is not None and v.requires_grad for v in slab.values)
        for place, number in enumerate(self._wanted):
            if slab.start <= number < slab.stop:
                self._present[number] = [v is not None for v in slab.values]
                for kept, value in zip(self._kept, slab.values, strict=True):
                    if value is not None:
                        kept[place] = value[number - slab.start].detach()

    def holds(self, passes: Passes, doubt: bool) -> bool:
        """Whether kept rows equal those of plain passes; all of them if there is a doubt.

        With create_graph they must also continue the graph where the plain ones do.
        """
        for place, number in enumerate(self._wanted if doubt else self._wanted[:_ALWAYS]):
            if number not in self._present:
                continue
            expected = passes.single(number)
            if any(e is not None and e.requires_grad for e in expected) and not self._recorded:
                return False
            present = self._present[number]
            got = [k[place] if p else None for k, p in zip(self._kept, present, strict=True)]
            if not _equal(got, expected):
                return False
        return True


def _spread(structure: Structure, count: int) -> list[int]:
    """Row numbers: the middle one of each leaf first, then evenly over all rows."""
    starts = structure.row_starts
    middles = [(first + stop) // 2 for first, stop in pairwise(starts) if stop > first]
    m = structure.m
    even = [i * (m - 1) // max(1, count - 1) for i in range(count)]
    return list(dict.fromkeys([*middles[: count // 2], *even]))[:count]


def _equal(got: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    for a, b in zip(got, expected, strict=True):
        if a is None or b is None:
            if (a is not None and bool((a != 0).any())) or (b is not None and bool((b != 0).any())):
                return False
        elif not same(a, b):
            return False
    return True


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two results of the same arithmetic are equal up to rounding."""
    a, b = a.detach(), b.detach()
    if not a.numel():
        return True
    largest = torch.where(torch.isfinite(b), b.abs(), 0).amax()
    near = (a - b).abs() <= tolerance(torch.finfo(a.dtype).eps) * largest
    alike = (a == b) | (a.isnan() & b.isnan())
    return bool((near | alike).all())
