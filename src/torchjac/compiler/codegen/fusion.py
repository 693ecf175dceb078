"""Fusion: points of different expressions that one iteration of a loop computes together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from torchjac.compiler.codegen.scalar_ir import Domain, IndexMap, Indices

MAX_GROUP = 64  # points of one domain in a fusion group: larger groups are not formed
_MAX_READERS = 4  # points that read one value, for each value read: with more an edge is cut
# Points that are fused: all along each edge, those with even counts in each group, or none.
FusionPolicy = Literal["all", "even", "none"]


@dataclass(slots=True)
class Edge:
    """An index map from the domain of expressions to the domain of their arguments.

    Attributes:
        start: The domain of the expressions.
        end: The domain of the arguments.
        by: The index map.
        arguments: The arguments that are read through the map.
    """

    start: Domain
    end: Domain
    by: IndexMap
    arguments: set[int] = field(default_factory=set)

    @property
    def is_even(self) -> bool:
        """Whether each point at the end is read by the same number of points, more than one."""
        counts = np.bincount(self.by.indices, minlength=self.end.size)
        return bool(counts[0] > 1 and (counts == counts[0]).all())


class FusionGroups:
    """A partition of the points of several domains; at first each point is alone.

    Args:
        kinds: The domains.
        policy: The points that may be fused.
    """

    def __init__(self, kinds: Iterable[Domain], policy: FusionPolicy):
        """Begins with one group for each point."""
        self._policy = policy
        self._starts: dict[int, int] = {}  # the first point of a domain among all points
        self._kinds: dict[int, Domain] = {}
        total = 0
        for domain in kinds:
            if id(domain) not in self._starts:
                self._starts[id(domain)], self._kinds[id(domain)] = total, domain
                total += domain.size
        self._groups = np.arange(total)
        self._fused: list[Edge] = []

    def of(self, domain: Domain, indices: Indices) -> Indices:
        """The groups of some points."""
        return np.asarray(self._groups[self._starts[id(domain)] + indices])

    def slots_of(self, domain: Domain, indices: Indices, slots: Indices) -> Indices:
        """The numbers of some points within their groups.

        Args:
            domain: The domain of the points.
            indices: The points.
            slots: The numbers of all points, from `slots`.
        """
        return np.asarray(slots[self._starts[id(domain)] + indices])

    def fuse(self, edge: Edge) -> bool:
        """Fuses points along an edge.

        Returns:
            Whether it did: groups must not get too large, nor all different.
        """
        shared = int(np.bincount(edge.by.indices).max())
        if self._policy == "none" or shared > _MAX_READERS * len(edge.arguments):
            return False
        start, end = self._starts[id(edge.start)], self._starts[id(edge.end)]
        one = self._groups[start : start + edge.start.size]
        other = self._groups[end : end + edge.end.size][edge.by.indices]
        if np.array_equal(one, other):
            self._fused.append(edge)
            return True
        if self._policy == "even" and not edge.is_even:
            if not self._fuses_evenly(edge, one, other):
                return False
            self._groups[start : start + edge.start.size] = other
            self._fused.append(edge)
            return True
        count = int(self._groups.max()) + 1
        links = coo_array((np.ones(len(one), dtype=np.int8), (one, other)), shape=(count, count))
        components, merged = connected_components(links, directed=False)
        # Only merged groups get larger. They are numbered from zero.
        larger = np.bincount(merged, minlength=components) > 1
        number = np.where(larger, np.cumsum(larger) - 1, -1)[merged]
        for kind, domain in self._kinds.items():
            begin, stop = self._starts[kind], self._starts[kind] + domain.size
            of = number[self._groups[begin:stop]]
            of = of[of >= 0]
            if len(of) and np.bincount(of).max() > MAX_GROUP:
                return False
        self._groups = merged[self._groups]
        self._fused.append(edge)
        return True

    def _fuses_evenly(self, edge: Edge, one: Indices, other: Indices) -> bool:
        """Whether single points join groups that all get the same number of points.

        Args:
            edge: The edge from these points.
            one: The groups of these points.
            other: The groups that they would join.
        """
        sizes = np.bincount(self._groups)
        if (sizes[one] > 1).any():
            return False
        end = self._starts[id(edge.end)]
        counts = np.bincount(other, minlength=len(sizes))
        counts = counts[np.unique(self._groups[end : end + edge.end.size])]
        return 0 < counts[0] <= MAX_GROUP and bool((counts == counts[0]).all())

    def slots(self) -> Indices:
        """For each point its number among the points of its domain in its group."""
        slots = np.zeros(len(self._groups), dtype=np.int64)
        for kind, domain in self._kinds.items():
            begin = self._starts[kind]
            of = self._groups[begin : begin + domain.size]
            order = np.argsort(of, kind="stable")
            sorted_ = of[order]
            starts = np.flatnonzero(np.append(True, np.diff(sorted_)))
            sizes = np.diff(np.append(starts, len(sorted_)))
            slots[begin + order] = np.arange(len(sorted_)) - np.repeat(starts, sizes)
        return slots

    def signatures(self, groups: Indices) -> Indices:
        """For each group a number; groups with equal numbers have equal edges."""
        slots = self.slots()
        position = np.full(int(self._groups.max()) + 1, -1)
        position[groups] = np.arange(len(groups))
        facts: list[Indices] = []
        owners: list[Indices] = []
        for k, edge in enumerate(self._fused):
            start = self._starts[id(edge.start)]
            end = self._starts[id(edge.end)]
            here = np.arange(start, start + edge.start.size)
            owner = position[self._groups[here]]
            there = slots[end + edge.by.indices]
            mask = owner >= 0
            facts.append(np.stack([np.full(mask.sum(), k), slots[here][mask], there[mask]], axis=1))
            owners.append(owner[mask])
        if not facts:
            return np.zeros(len(groups), dtype=np.int64)
        every, owner = np.concatenate(facts), np.concatenate(owners)
        order = np.argsort(owner, kind="stable")  # keeps the order of edges and slots
        starts = np.searchsorted(owner[order], np.arange(len(groups) + 1))
        return number_parts(every[order], starts)


def number_parts(facts: Indices, starts: Indices) -> Indices:
    """A number for each part of an array; equal parts have equal numbers.

    Args:
        facts: The rows of the array.
        starts: The first row of each part, and the number of rows.
    """
    sizes = np.diff(starts)
    numbers = np.zeros(len(sizes), dtype=np.int64)
    for size in np.unique(sizes).tolist():
        members = np.flatnonzero(sizes == size)
        rows = facts[starts[members][:, None] + np.arange(size)].reshape(len(members), -1)
        if not rows.shape[1]:
            continue
        numbers[members] = numbers.max() + 1 + number_rows(rows)
    return numbers


def number_rows(rows: Indices) -> Indices:
    """A number for each row; equal rows have equal numbers.

    Random projections of different rows nearly always differ; the result is verified. Sorting the
    rows takes twenty times as long.
    """
    weights = np.random.default_rng(0).integers(1, 2**62, rows.shape[1])
    _, first, which = np.unique(rows @ weights, return_index=True, return_inverse=True)
    if np.array_equal(rows[first][which], rows):
        return np.asarray(which)
    _, which = np.unique(rows, axis=0, return_inverse=True)
    return np.asarray(which).reshape(-1)
