"""Seeds of compressed passes: a sum of unit vectors for each group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torchjac.passes.coloring import Grouping

# For each leaf: group and element of every member, ordered by group; first member of each group.
Members = list[tuple[Tensor, list[int]]]


def members(leaves: Sequence[Tensor], firsts: Sequence[int], groups: Grouping) -> Members:
    """Members of each group, leaf by leaf; `firsts` are the numbers of the first elements."""
    by_leaf: Members = []
    for leaf, first in zip(leaves, firsts, strict=True):
        group_of = groups.group_of[first : first + leaf.numel()]
        order = np.argsort(group_of, kind="stable")
        begin = np.searchsorted(group_of[order], np.arange(groups.count + 1))
        group_and_element = torch.from_numpy(np.stack([group_of[order], order])).to(leaf.device)
        by_leaf.append((group_and_element, begin.tolist()))
    return by_leaf


class GroupSeeds:
    """A seed for each group, with ones at all members of the group."""

    def __init__(self, leaves: Sequence[Tensor], count: int, members: Members):
        """Stores leaves, the number of groups, and their members."""
        self._leaves = leaves
        self.count = count
        self._members = members

    def stack(self, start: int, stop: int) -> tuple[list[int], list[Tensor]]:
        """See `passes.seeds.Seeds`."""
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
        """See `passes.seeds.Seeds`."""
        positions, stacks = self.stack(number, number + 1)
        return positions, [s[0] for s in stacks]

    def ranges_by_leaf(self, start: int, stop: int, positions: Sequence[int]) -> list[range]:
        """Empty: a group may have members in several leaves."""
        return []
