"""Seeds that are sums of unit vectors, and where the entries stand in what comes back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torchjac.passes.coloring import Grouping

# For each leaf the group and the element of every member, by group; where those of each begin.
Members = list[tuple[Tensor, list[int]]]


def members(leaves: Sequence[Tensor], firsts: Sequence[int], groups: Grouping) -> Members:
    """Which elements of each leaf belong to which group; `firsts` numbers the leaves' elements."""
    found: Members = []
    for leaf, first in zip(leaves, firsts, strict=True):
        of = groups.of[first : first + leaf.numel()]
        order = np.argsort(of, kind="stable")
        begin = np.searchsorted(of[order], np.arange(groups.count + 1))
        both = torch.from_numpy(np.stack([of[order], order])).to(leaf.device)
        found.append((both, begin.tolist()))
    return found


class GroupSeeds:
    """One seed a group: ones at all its elements."""

    def __init__(self, leaves: Sequence[Tensor], count: int, members: Members):
        """Takes leaves, the number of groups, and the members of each."""
        self._leaves = leaves
        self.count = count
        self._members = members

    def stack(self, start: int, stop: int) -> tuple[list[int], list[Tensor]]:
        """See `plain.seeds.Seeds`."""
        positions, stacks = [], []
        for position, (leaf, (members, begin)) in enumerate(
            zip(self._leaves, self._members, strict=True)
        ):
            group, element = members[:, begin[start] : begin[stop]]
            if not len(group):
                continue
            stack = torch.zeros((stop - start, leaf.numel()), dtype=leaf.dtype, device=leaf.device)
            stack[group - start, element] = 1
            positions.append(position)
            stacks.append(stack.view(stop - start, *leaf.shape))
        return positions, stacks

    def single(self, number: int) -> tuple[list[int], list[Tensor]]:
        """See `plain.seeds.Seeds`."""
        positions, stacks = self.stack(number, number + 1)
        return positions, [s[0] for s in stacks]

    def by_leaf(self, start: int, stop: int, positions: Sequence[int]) -> list[range]:
        """A group may have members in several leaves."""
        return []
