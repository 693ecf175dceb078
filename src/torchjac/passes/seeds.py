"""Seeds of passes: unit vectors for plain passes (sums of unit vectors: `passes.group_seeds`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Seeds(Protocol):
    """Vectors that passes pull back, numbered from 0, in the space that some leaves span."""

    @property
    def count(self) -> int:
        """Number of seeds."""

    def stack(self, start: int, stop: int) -> tuple[list[int], list[Tensor]]:
        """Positions of the leaves where a seed is nonzero, and a stack of seeds for each leaf."""

    def single(self, number: int) -> tuple[list[int], list[Tensor]]:
        """Positions and vectors of one seed, without the axis of the stack; vectors are fresh."""

    def ranges_by_leaf(self, start: int, stop: int, positions: Sequence[int]) -> list[range]:
        """The range of seeds of each leaf; empty if a seed may span several leaves."""


class UnitSeeds:
    """Unit vectors, equal for all samples of a batch."""

    def __init__(self, leaves: Sequence[Tensor], starts: Sequence[int], batch: int | None):
        """Numbers the unit vectors by leaf.

        Args:
            leaves: Tensors whose elements are numbered (elements of one sample, with a batch).
            starts: Number of each leaf's first element, and the total at the end.
            batch: Number of samples, or None.
        """
        self._leaves = leaves
        self._starts = starts
        self._batch = batch
        self.count = starts[-1]

    def stack(self, start: int, stop: int) -> tuple[list[int], list[Tensor]]:
        """See `passes.seeds.Seeds`."""
        return unit_vector_stack(self._leaves, self._starts, start, stop, self._batch)

    def single(self, number: int) -> tuple[list[int], list[Tensor]]:
        """See `passes.seeds.Seeds`."""
        position, vector = unit_vector(self._leaves, self._starts, number, self._batch)
        return [position], [vector]

    def ranges_by_leaf(self, start: int, stop: int, positions: Sequence[int]) -> list[range]:
        """See `passes.seeds.Seeds`."""
        starts = self._starts
        return [range(max(start, starts[p]), min(stop, starts[p + 1])) for p in positions]


def unit_vector_stack(
    leaves: Sequence[Tensor], starts: Sequence[int], start: int, stop: int, batch: int | None
) -> tuple[list[int], list[Tensor]]:
    """Unit vectors `start..stop` of the space that the leaves span.

    Args:
        leaves: Tensors whose elements are numbered (elements of one sample, with a batch).
        starts: Number of each leaf's first element, and the total at the end.
        start: First unit vector.
        stop: Last unit vector + 1.
        batch: Number of samples, which share each unit vector; or None.

    Returns:
        Positions of the leaves with a nonzero element, and a stack `(stop - start, *leaf.shape)`
        for each of these leaves. Passes skip nodes that only the remaining leaves depend on.
    """
    positions: list[int] = []
    stacks: list[Tensor] = []
    count = stop - start
    for position, leaf in enumerate(leaves):
        first, end = starts[position], starts[position + 1]
        if end <= start or first >= stop:
            continue
        if first == start and end == stop:
            stack = torch.eye(count, dtype=leaf.dtype, device=leaf.device)
        else:
            stack = torch.zeros(count, end - first, dtype=leaf.dtype, device=leaf.device)
            low, high = max(first, start), min(end, stop)
            block = stack[low - start : high - start, low - first : high - first]
            block.fill_diagonal_(1)
        if batch is None:
            if leaf.ndim != 1:
                stack = stack.view(count, *leaf.shape)
        else:
            stack = stack.view(count, 1, *leaf.shape[1:]).expand(count, *leaf.shape)
        positions.append(position)
        stacks.append(stack)
    return positions, stacks


def unit_vector(
    leaves: Sequence[Tensor], starts: Sequence[int], number: int, batch: int | None
) -> tuple[int, Tensor]:
    """One unit vector: position of the nonzero leaf, and a fresh tensor in the leaf's shape."""
    position = 0
    while starts[position + 1] <= number:
        position += 1
    leaf = leaves[position]
    if starts[position + 1] - starts[position] == 1:
        return position, torch.ones(leaf.shape, dtype=leaf.dtype, device=leaf.device)
    vector = torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)
    offset = number - starts[position]
    if batch is None:
        vector.view(-1)[offset] = 1
    else:
        vector.view(batch, -1)[:, offset] = 1
    return position, vector


def random_vectors(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Random vectors for checks, with magnitudes from 1 to 2 and random signs.

    The generator is private, so the user's random state does not change.
    """
    vectors = []
    for leaf in leaves:
        uniform = torch.rand(leaf.shape, generator=_generator, dtype=torch.float32).sub_(0.5)
        vector = uniform.sign().add_(uniform, alpha=2)
        vectors.append(vector.to(device=leaf.device, dtype=leaf.dtype))
    return vectors


_generator = torch.Generator().manual_seed(2026)
