"""Comparing some rows of a batched pass with the same rows of plain passes.

Both do the same arithmetic, so they agree closely even where a Jacobian is all rounding noise or a
backward is not linear: what differs is a wrong batching rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from torchjac.engines.plain.check import tolerance
from torchjac.engines.plain.passes import Passes
from torchjac.engines.slab import Slab
from torchjac.structure import Structure

# Bytes of the rows that are kept for comparison.
_KEPT = 4 * 2**20
_ALWAYS, _MOST = 6, 32


class Sameness:
    """Keeps copies of rows spread over all output leaves, and compares them.

    A few are compared always; the others where something else gave cause for doubt.
    """

    def __init__(self, structure: Structure, inputs: Sequence[Tensor]):
        size = sum(t.numel() * t.element_size() for t in inputs)
        count = max(2, min(_MOST, _KEPT // max(1, size)))
        self._wanted = _spread(structure, count)
        self._rows: dict[int, list[Tensor | None]] = {}
        self._recorded = False

    def add(self, slab: Slab) -> None:
        """Copies the rows that are wanted."""
        self._recorded |= any(v is not None and v.requires_grad for v in slab.values)
        for number in self._wanted:
            if slab.start <= number < slab.stop:
                self._rows[number] = [
                    None if v is None else v[number - slab.start].detach().clone()
                    for v in slab.values
                ]

    def holds(self, passes: Passes, doubt: bool) -> bool:
        """Whether kept rows equal those of plain passes; all of them if there is a doubt.

        With create_graph they must also continue the graph where the plain ones do.
        """
        for number in self._wanted if doubt else self._wanted[:_ALWAYS]:
            if number not in self._rows:
                continue
            expected = passes.single(number)
            if any(e is not None and e.requires_grad for e in expected) and not self._recorded:
                return False
            if not _equal(self._rows[number], expected):
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
            continue
        b = b.detach()
        if not a.numel():
            continue
        allowed = tolerance(torch.finfo(a.dtype).eps)
        finite = torch.isfinite(b)
        largest = torch.where(finite, b.abs(), 0).amax()
        near = (a - b).abs() <= allowed * largest
        alike = (a == b) | (a.isnan() & b.isnan())
        if not bool((near | alike).all()):
            return False
    return True
