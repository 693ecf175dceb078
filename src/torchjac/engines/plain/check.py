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
        lowest = min((*given, *cotangent), key=lambda t: -torch.finfo(t.dtype).eps).dtype
        self._tolerance = tolerance(lowest)
        self._dtype = torch.float64 if lowest == torch.float64 else torch.float32
        self._structure = structure
        self._device = cotangent[0].device
        self.cotangent = tuple(cotangent)
        self._weights = self._joined(cotangent, structure.rows)
        self._expected = self._joined([_detached(g) for g in expected], structure.columns)
        self._sum = torch.zeros_like(self._expected)
        self._scale = torch.zeros_like(self._expected)

    def add(self, slab: Slab) -> None:
        """Takes one slab into account."""
        if slab.axis == "rows":
            weights = self._weights[:, slab.start : slab.stop]  # (B, k)
            starts = self._structure.column_starts
            for first, stop, value in zip(starts, starts[1:], slab.values, strict=False):
                if value is not None:
                    rows = self._matrix(value, stop - first)  # (k, B, n)
                    self._sum[:, first:stop] += torch.einsum("bk,kbn->bn", weights, rows)
                    self._scale[:, first:stop] += torch.einsum(
                        "bk,kbn->bn", weights.abs(), rows.abs()
                    )
            return
        starts = self._structure.row_starts
        for first, stop, value in zip(starts, starts[1:], slab.values, strict=False):
            if value is not None:
                weights = self._weights[:, first:stop]  # (B, m)
                columns = self._matrix(value, stop - first)  # (k, B, m)
                part = slice(slab.start, slab.stop)
                self._sum[:, part] += torch.einsum("bm,kbm->bk", weights, columns)
                self._scale[:, part] += torch.einsum("bm,kbm->bk", weights.abs(), columns.abs())

    def finite(self) -> bool:
        """Whether every entry that went into the sums was finite."""
        return bool(torch.isfinite(self._sum).all() and torch.isfinite(self._expected).all())

    def mismatch(self) -> list[int] | None:
        """Samples that disagree beyond rounding, worst first; None if there are none."""
        if self._expected.numel() == 0:
            return None
        error = (self._sum - self._expected).abs()
        finite = torch.isfinite(self._sum)
        scale = torch.where(finite, self._scale, 0)
        allowed = self._tolerance * (scale + scale.amax(1, keepdim=True))
        bad = torch.where(finite & torch.isfinite(self._expected), error > allowed, False)
        bad |= finite != torch.isfinite(self._expected)
        if not bool(bad.any()):
            return None
        excess = torch.where(bad, torch.nan_to_num(error / allowed.clamp_min(1e-300)), 0)
        worst = excess.amax(1).sort(descending=True)
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

    def _matrix(self, value: Tensor, size: int) -> Tensor:
        shape = (value.shape[0], len(self._weights), size)
        return value.detach().to(self._device, self._dtype).reshape(shape)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
