"""Comparing a whole Jacobian with one product of it that autograd computed by itself.

For a random cotangent u one backward pass gives u' J. The same combination of the evaluated rows
(or columns) must agree: this finds samples that were promised to be independent and are not,
backward passes that cannot be transposed, and functions that do not map copies independently.
R. Freivalds' check of a matrix product (1977), for a Jacobian.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchjac.engines.slab import Slab
from torchjac.structure import Structure


def tolerance(dtype: torch.dtype) -> float:
    """Relative disagreement put down to rounding: 1000 units in the last place."""
    return 1000 * torch.finfo(dtype).eps


class Check:
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
        lowest = max((*given, *cotangent), key=lambda t: torch.finfo(t.dtype).eps).dtype
        self._tolerance = tolerance(lowest)
        self._dtype = torch.float64 if lowest == torch.float64 else torch.float32
        self._structure = structure
        self._device = cotangent[0].device
        self.cotangent = tuple(cotangent)
        self._weights = self._joined(cotangent, structure.rows)
        self._expected = self._joined([_detached(g) for g in expected], structure.columns)
        self._sum = torch.zeros_like(self._expected)

    def add(self, slab: Slab) -> None:
        """Takes one slab into account."""
        by_rows = slab.axis == "rows"
        starts = self._structure.column_starts if by_rows else self._structure.row_starts
        for first, stop, value in zip(starts, starts[1:], slab.values, strict=False):
            if value is None:
                continue
            part = self._matrices(value, stop - first)  # (k, B, n) or (k, B, m)
            if by_rows:
                weights = self._weights[:, slab.start : slab.stop].unsqueeze(1)  # (B, 1, k)
                self._sum[:, first:stop] += (weights @ part.transpose(0, 1)).squeeze(1)
            else:
                weights = self._weights[:, first:stop].unsqueeze(2)  # (B, m, 1)
                columns = slice(slab.start, slab.stop)
                self._sum[:, columns] += (part.transpose(0, 1) @ weights).squeeze(2)

    def finite(self) -> bool:
        """Whether every entry that went into the sums was finite."""
        return bool(torch.isfinite(self._sum).all() and torch.isfinite(self._expected).all())

    def mismatch(self) -> list[int] | None:
        """Samples that disagree beyond rounding, worst first; None if there are none.

        An entry of u' J may be off by rounding of the largest one of its sample. (A random u does
        not let large terms cancel in all of a sample's entries.)
        """
        if self._expected.numel() == 0:
            return None
        error = (self._sum - self._expected).abs()
        allowed = self._tolerance * self._expected.abs().amax(1, keepdim=True)
        fine = error <= allowed  # False for NaN
        if bool(fine.all()):
            return None
        finite = torch.isfinite(self._sum)
        both = finite & torch.isfinite(self._expected)
        neither = ~finite & ~torch.isfinite(self._expected)
        if not bool(both.all()):  # the finite entries of a sample are judged by themselves
            largest = torch.where(both, self._expected.abs(), 0).amax(1, keepdim=True)
            allowed = self._tolerance * largest
        bad = ~torch.where(both, error <= allowed, neither)
        if not bool(bad.any()):
            return None
        info = torch.finfo(self._dtype)
        excess = torch.where(both, error / allowed.clamp_min(info.tiny), info.max)
        worst = torch.where(bad, excess, 0).amax(1).sort(descending=True)
        return [int(b) for b in worst.indices[: int(bad.any(1).sum())]]

    def _joined(self, leaves: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
        samples = 1 if self._structure.batch is None else self._structure.batch
        parts = [
            torch.zeros(samples, size, dtype=self._dtype, device=self._device)
            if leaf is None
            else leaf.reshape(samples, size).to(self._device, self._dtype)
            for leaf, size in zip(leaves, sizes, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _matrices(self, value: Tensor, size: int) -> Tensor:
        shape = (value.shape[0], len(self._weights), size)
        return value.detach().to(self._device, self._dtype).reshape(shape)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
