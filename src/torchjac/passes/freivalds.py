"""Compares a whole Jacobian with one product of it, computed by a pass of autograd.

For a random cotangent u one backward pass gives u' J. The same combination of the evaluated rows
(or columns) must agree. R. Freivalds' check of a matrix product (1977), for a Jacobian.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from torchjac.passes.slab import Slab
from torchjac.passes.structure import Structure

# Disagreement beyond which even half precision cannot be to blame.
_GROSS = 0.05

# A few large rows are added up one by one; otherwise a matrix product for each sample is faster
# (2 x 31 843 x 15: 1.2 ms against 2.1 ms; 5 x 128 x 3: 30 us against 12 us).
_FEW, _LARGE = 8, 2**15


def tolerance(eps: float) -> float:
    """Relative disagreement put down to rounding: 1000 units in the last place."""
    return min(1000 * eps, _GROSS)


class FreivaldsCheck:
    """Accumulates u' J from slabs and compares it with the expected product.

    Attributes:
        cotangent: The random u, one tensor per output leaf.
    """

    def __init__(
        self,
        structure: Structure,
        cotangent: Sequence[Tensor],
        expected: Sequence[Tensor | None],
    ):
        given = [g for g in expected if g is not None]
        eps = max(torch.finfo(t.dtype).eps for t in (*given, *cotangent))
        self._tolerance = tolerance(eps)
        self._dtype = torch.float64 if eps < 1e-10 else torch.float32
        self._structure = structure
        self._device = cotangent[0].device
        self.cotangent = tuple(cotangent)
        self._weights = self._joined(cotangent, structure.rows)
        self._expected = self._joined(expected, structure.columns)
        self._sum = torch.zeros_like(self._expected)

    def add(self, slab: Slab) -> None:
        """Takes one slab into account."""
        by_rows = slab.axis == "rows"
        starts = self._structure.column_starts if by_rows else self._structure.row_starts
        for first, stop, value in zip(starts, starts[1:], slab.values, strict=False):
            if value is None:
                continue
            part = self._matrices(value, stop - first)  # (k, B, n) or (k, B, m)
            if by_rows and part[0].numel() > _LARGE and len(part) <= _FEW:
                for row, number in zip(part, range(slab.start, slab.stop), strict=True):
                    self._sum[:, first:stop].addcmul_(row, self._weights[:, number : number + 1])
            elif by_rows:
                weights = self._weights[:, slab.start : slab.stop].unsqueeze(1)  # (B, 1, k)
                self._sum[:, first:stop] += (weights @ part.transpose(0, 1)).squeeze(1)
            else:
                weights = self._weights[:, first:stop].unsqueeze(2)  # (B, m, 1)
                columns = slice(slab.start, slab.stop)
                self._sum[:, columns] += (part.transpose(0, 1) @ weights).squeeze(2)

    def finite(self) -> bool:
        """Whether every entry that went into the sums was finite."""
        return bool(torch.isfinite(self._sum).all() and torch.isfinite(self._expected).all())

    def agrees(self) -> bool:
        """Whether both products are equal up to rounding.

        An entry may be off by rounding of the largest one of its sample and input leaf. (A random
        u does not let large terms cancel in all of them.)
        """
        starts = self._structure.column_starts
        return all(
            self._leaf_agrees(slice(first, stop))
            for first, stop in pairwise(starts)
            if stop > first
        )

    def _leaf_agrees(self, columns: slice) -> bool:
        if self._expected.shape[0] == 0:
            return True
        got, expected = self._sum[:, columns], self._expected[:, columns]
        error = (got - expected).abs()
        fine = error <= self._tolerance * expected.abs().amax(1, keepdim=True)
        if bool(fine.all()):  # False where anything is NaN
            return True
        both = torch.isfinite(got) & torch.isfinite(expected)
        neither = ~torch.isfinite(got) & ~torch.isfinite(expected)
        largest = torch.where(both, expected.abs(), 0).amax(1, keepdim=True)
        return bool(torch.where(both, error <= self._tolerance * largest, neither).all())

    def _joined(self, leaves: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
        samples = 1 if self._structure.batch is None else self._structure.batch
        parts = [
            torch.zeros(samples, size, dtype=self._dtype, device=self._device)
            if leaf is None
            else leaf.detach().reshape(samples, size).to(self._device, self._dtype)
            for leaf, size in zip(leaves, sizes, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _matrices(self, value: Tensor, size: int) -> Tensor:
        shape = (value.shape[0], len(self._weights), size)
        return value.detach().to(self._device, self._dtype).reshape(shape)
