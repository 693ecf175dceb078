"""Seeds, as the passes take them: unit vectors here, sums of them in other engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Seeds(Protocol):
    """What is pulled back: vectors numbered from 0 in the space that some leaves span together."""

    @property
    def count(self) -> int:
        """How many there are."""

    def stack(self, start: int, stop: int) -> tuple[list[int], list[Tensor]]:
        """Positions of the leaves where some seeds are not zero, and a stack for each."""

    def single(self, number: int) -> tuple[list[int], list[Tensor]]:
        """The same for one seed, without the axis of the stack; the vectors may be written to."""

    def by_leaf(self, start: int, stop: int, positions: Sequence[int]) -> list[range]:
        """The seeds apart by leaf, where each belongs to one leaf only; else nothing."""


class UnitSeeds:
    """Unit vectors, the same for every sample of a batch."""

    def __init__(self, leaves: Sequence[Tensor], starts: Sequence[int], batch: int | None):
        """Takes leaves, the number of each leaf's first element with the total, and the batch."""
        self._leaves = leaves
        self._starts = starts
        self._batch = batch
        self.count = starts[-1]

    def stack(self, start: int, stop: int) -> tuple[list[int], list[Tensor]]:
        """See `Seeds`."""
        return unit_stack(self._leaves, self._starts, start, stop, self._batch)

    def single(self, number: int) -> tuple[list[int], list[Tensor]]:
        """See `Seeds`."""
        position, vector = unit(self._leaves, self._starts, number, self._batch)
        return [position], [vector]

    def by_leaf(self, start: int, stop: int, positions: Sequence[int]) -> list[range]:
        """See `Seeds`."""
        starts = self._starts
        return [range(max(start, starts[p]), min(stop, starts[p + 1])) for p in positions]


def unit_stack(
    leaves: Sequence[Tensor], starts: Sequence[int], start: int, stop: int, batch: int | None
) -> tuple[list[int], list[Tensor]]:
    """Unit vectors `start..stop` of the space that the leaves span together.

    Args:
        leaves: Tensors whose elements (those of one sample, with a batch) are numbered through.
        starts: Number of each leaf's first element, and the total at the end.
        start: First unit vector.
        stop: One after the last.
        batch: Number of samples, all of which get the same unit vector; or None.

    Returns:
        Positions of the leaves in which a one stands, and for each the stack
        `(stop - start, *leaf.shape)`. Leaves outside the range are left out: passes then skip
        what only they depend on.
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


def unit(
    leaves: Sequence[Tensor], starts: Sequence[int], number: int, batch: int | None
) -> tuple[int, Tensor]:
    """One unit vector: position of its leaf, and a fresh tensor in the shape of that leaf."""
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


def weights(leaves: Sequence[Tensor]) -> list[Tensor]:
    """A random cotangent for checks, with magnitudes from 1 to 2 and random signs.

    The generator is private: the user's random state does not move.
    """
    found = []
    for leaf in leaves:
        uniform = torch.rand(leaf.shape, generator=_generator, dtype=torch.float32).sub_(0.5)
        vector = uniform.sign().add_(uniform, alpha=2)
        found.append(vector.to(device=leaf.device, dtype=leaf.dtype))
    return found


_generator = torch.Generator().manual_seed(2026)
