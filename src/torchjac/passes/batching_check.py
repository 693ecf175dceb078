"""Compares some rows of a batched pass with the same rows of plain passes.

Both passes do the same arithmetic. So rows agree closely even if the Jacobian is rounding noise or
the backward is nonlinear. A difference means a wrong batching rule.
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

# Bytes of the rows that are copied for comparison, at most.
_ROW_BYTES = 4 * 2**20
_ALWAYS = 6  # rows that are compared on every check
_MOST = 32  # rows that are compared in doubt, at most


class BatchingCheck:
    """Copies rows spread over all output leaves, and compares the copies with plain passes.

    The first few copies are compared always; all copies if another check is in doubt.
    """

    def __init__(self, structure: Structure, inputs: Sequence[Tensor]):
        size = sum(t.numel() * t.element_size() for t in inputs)
        count = max(2, min(_MOST, _ROW_BYTES // max(1, size)))
        self._numbers = _spread(structure, count)
        # One allocation before the passes: rows allocated one by one would pin the heap between
        # the temporaries of the passes.
        self._rows = [
            torch.zeros((count, *t.shape), dtype=t.dtype, device=t.device) for t in inputs
        ]
        self._present: dict[int, list[bool]] = {}
        self._recorded = False

    def add(self, slab: Slab) -> None:
        """Copies the rows of the slab that are to be compared."""
        self._recorded |= any(v is not None and v.requires_grad for v in slab.values)
        for slot, number in enumerate(self._numbers):
            if slab.start <= number < slab.stop:
                self._present[number] = [v is not None for v in slab.values]
                for rows, value in zip(self._rows, slab.values, strict=True):
                    if value is not None:
                        rows[slot] = value[number - slab.start].detach()

    def holds(self, passes: Passes, in_doubt: bool) -> bool:
        """Whether the copied rows equal rows of plain passes; all copies are compared if in doubt.

        With create_graph the rows must also have a graph if the rows of plain passes have one.
        """
        for slot, number in enumerate(self._numbers if in_doubt else self._numbers[:_ALWAYS]):
            if number not in self._present:
                continue
            expected = passes.single(number)
            if any(e is not None and e.requires_grad for e in expected) and not self._recorded:
                return False
            present = self._present[number]
            got = [k[slot] if p else None for k, p in zip(self._rows, present, strict=True)]
            if not _rows_equal(got, expected):
                return False
        return True


def _spread(structure: Structure, count: int) -> list[int]:
    """Row numbers: the middle row of each leaf first, then rows spread evenly."""
    starts = structure.row_starts
    middles = [(first + stop) // 2 for first, stop in pairwise(starts) if stop > first]
    m = structure.m
    evenly = [i * (m - 1) // max(1, count - 1) for i in range(count)]
    return list(dict.fromkeys([*middles[: count // 2], *evenly]))[:count]


def _rows_equal(got: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    for a, b in zip(got, expected, strict=True):
        if a is None or b is None:
            if (a is not None and bool((a != 0).any())) or (b is not None and bool((b != 0).any())):
                return False
        elif not equal_up_to_rounding(a, b):
            return False
    return True


def equal_up_to_rounding(a: Tensor, b: Tensor) -> bool:
    """Whether two results of the same arithmetic are equal up to rounding."""
    a, b = a.detach(), b.detach()
    if not a.numel():
        return True
    largest = torch.where(torch.isfinite(b), b.abs(), 0).amax()
    near = (a - b).abs() <= tolerance(torch.finfo(a.dtype).eps) * largest
    identical = (a == b) | (a.isnan() & b.isnan())
    return bool((near | identical).all())
