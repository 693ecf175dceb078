"""Compares a whole Jacobian with its product u' J, computed by one pass of autograd.

For a random cotangent u one backward pass gives u' J. The product of u with the evaluated rows (or
columns) must agree with that gradient. R. Freivalds checks matrix products in this way (1977).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from torchjac.passes.slab import Slab
from torchjac.passes.structure import Structure

# Relative tolerance of half precision; tolerances of better precisions are smaller.
_MAX_TOLERANCE = 0.05

# A slab of few large rows is added up row by row, any other slab by one matrix product a sample.
# (2 x 31 843 x 15: 1.2 ms row by row, 2.1 ms as products; 5 x 128 x 3: 30 us and 12 us.)
_FEW_ROWS = 8  # rows of a slab, at most
_LARGE_ROW = 2**15  # elements of a row, at least


def tolerance(eps: float) -> float:
    """Relative tolerance of rounding: 1000 units in the last place."""
    return min(1000 * eps, _MAX_TOLERANCE)


class FreivaldsCheck:
    """Accumulates u' J from slabs and compares the sum with the expected product.

    Attributes:
        cotangent: The random u, one tensor per output leaf.
    """

    def __init__(
        self,
        structure: Structure,
        cotangent: Sequence[Tensor],
        expected: Sequence[Tensor | None],
    ):
        present = [g for g in expected if g is not None]
        eps = max(torch.finfo(t.dtype).eps for t in (*present, *cotangent))
        self._tolerance = tolerance(eps)
        self._dtype = torch.float64 if eps < 1e-10 else torch.float32
        self._structure = structure
        self._device = cotangent[0].device
        self.cotangent = tuple(cotangent)
        self._weights = self._by_sample(cotangent, structure.rows)
        self._expected = self._by_sample(expected, structure.columns)
        self._sum = torch.zeros_like(self._expected)

    def add(self, slab: Slab) -> None:
        """Adds the product of one slab."""
        by_rows = slab.axis == "rows"
        starts = self._structure.column_starts if by_rows else self._structure.row_starts
        for first, stop, value in zip(starts, starts[1:], slab.values, strict=False):
            if value is None:
                continue
            part = self._matrices(value, stop - first)  # (k, B, n) or (k, B, m)
            if by_rows and part[0].numel() > _LARGE_ROW and len(part) <= _FEW_ROWS:
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
        """Whether both products are finite."""
        return bool(torch.isfinite(self._sum).all() and torch.isfinite(self._expected).all())

    def agrees(self) -> bool:
        """Whether both products are equal up to rounding.

        The tolerance is relative to the largest entry of the same sample and input leaf. (With a
        random u, large terms do not cancel in all entries.)
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
        computed, expected = self._sum[:, columns], self._expected[:, columns]
        error = (computed - expected).abs()
        agrees = error <= self._tolerance * expected.abs().amax(1, keepdim=True)
        if bool(agrees.all()):  # False if an entry is NaN
            return True
        both = torch.isfinite(computed) & torch.isfinite(expected)
        neither = ~torch.isfinite(computed) & ~torch.isfinite(expected)
        largest = torch.where(both, expected.abs(), 0).amax(1, keepdim=True)
        return bool(torch.where(both, error <= self._tolerance * largest, neither).all())

    def _by_sample(self, leaves: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
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
