"""Compressed passes in reverse and in forward mode, and the check of their entries."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from torchjac._torch.autograd import backward
from torchjac.capture.eager_graph import EagerGraph
from torchjac.errors import CompressionFailed, PatternMissed, RefusedHere
from torchjac.passes.batched_pass import Passes
from torchjac.passes.chunks import in_chunks, rows_at_once
from torchjac.passes.coloring import Grouping, column_groups, row_groups
from torchjac.passes.forward import (
    check_transposable,
    check_user_code,
    recorded_gradients,
    transposed_outputs,
    transposed_passes,
)
from torchjac.passes.freivalds import tolerance
from torchjac.passes.group_seeds import GroupSeeds, Members, members
from torchjac.passes.plan import Plan
from torchjac.passes.reverse import free_graph
from torchjac.passes.seeds import random_vectors
from torchjac.passes.slab import Entries, Slab
from torchjac.passes.structure import Structure
from torchjac.sparsity.pattern import Pattern


def rows(program: EagerGraph, structure: Structure, plan: Plan) -> Iterator[Entries]:
    """Pulls one cotangent back for each group of rows.

    Raises:
        PlanRefused: The passes cannot be batched.
        PatternMissed: The pattern lacks a nonzero entry.
        CompressionFailed: Rows of a shared pass differ from rows of plain passes.
    """
    pattern = _pattern(structure)
    compression = _compression(program, pattern, "rows")
    seeds = GroupSeeds(program.outputs, compression.count, compression.members)
    passes = Passes(
        program.outputs, program.inputs, seeds, plan, program.create_graph, structure.operations
    )
    check = None if plan.checked else _ProductCheck(program, pattern)
    for slab in _slabs(passes, plan, compression.count, program.inputs):
        entries = _entries_of(slab, compression.indices)
        if check is not None:
            check.add(entries)
        yield entries
        del slab, entries
    if check is not None:
        check.verify()
    if not program.retain_graph:
        free_graph(program)


def columns(program: EagerGraph, structure: Structure, plan: Plan) -> Iterator[Entries]:
    """Pushes one tangent forward for each group of columns.

    Raises:
        PlanRefused: The backward pass cannot be transposed.
        PatternMissed: The pattern lacks a nonzero entry.
        CompressionFailed: Rows of a shared pass differ from rows of plain passes.
    """
    check_transposable(program, structure)
    pattern = _pattern(structure)
    compression = _compression(program, pattern, "columns")
    cotangent = random_vectors(program.outputs)
    if not plan.checked:
        check_user_code(program, cotangent)
    gradients, _ = recorded_gradients(program, cotangent)
    used = tuple(g is not None for g in gradients)
    check = _ProductCheck(program, pattern, [u.detach() for u in cotangent], gradients)
    outputs = transposed_outputs(program, gradients)
    seeds = GroupSeeds(outputs, compression.count, compression.members)
    passes = transposed_passes(program, structure, plan, outputs, cotangent, seeds)
    for slab in _slabs(passes, plan, compression.count, program.outputs):
        entries = _entries_of(slab, compression.indices, used)
        check.add(entries)
        yield entries
        del slab, entries
    if not check.finite():
        raise RefusedHere("values are not finite: reverse mode defines what they are")
    check.verify()
    if not program.retain_graph:
        free_graph(program)


def _slabs(passes: Passes, plan: Plan, count: int, leaves: Sequence[Tensor]) -> Iterator[Slab]:
    def evaluate(start: int, stop: int) -> Slab:
        if plan.chunk > 1 and stop - start > 1:
            return Slab("rows", start, stop, passes.batched(start, stop), 1)
        return Slab("rows", start, stop, passes.looped(start, stop), stop - start)

    size = plan.chunk
    if size == 1:
        size = rows_at_once(count, sum(t.numel() * t.element_size() for t in leaves))
    yield from in_chunks(count, size, evaluate)


@dataclass(frozen=True, slots=True)
class _EntryIndex:
    """Positions in the compressed Jacobian of the entries of one leaf.

    Attributes:
        entries: Numbers of the entries in the pattern, ordered by group.
        group: Group of each entry.
        offset: Element of the leaf of each entry.
        begin: First entry of each group, and the number of entries at the end.
        size: Elements of the leaf.
    """

    entries: Tensor
    group: Tensor
    offset: Tensor
    begin: list[int]
    size: int


@dataclass(frozen=True, slots=True)
class _Compression:
    """Seeds and positions of entries, which depend on the pattern only; cached.

    Attributes:
        count: Number of groups.
        members: Elements of the seeded leaves, by group.
        indices: Positions of the entries, for each leaf that a pass returns.
    """

    count: int
    members: Members
    indices: list[_EntryIndex]


_compressions: WeakKeyDictionary[Pattern, dict[Hashable, _Compression]] = WeakKeyDictionary()


def _compression(program: EagerGraph, pattern: Pattern, axis: str) -> _Compression:
    nest = program.nest
    key = (axis, nest.live_outputs, nest.live_inputs, program.device)
    by_key = _compressions.setdefault(pattern, {})
    if key not in by_key:
        groups = row_groups(pattern) if axis == "rows" else column_groups(pattern)
        leaves = program.outputs if axis == "rows" else program.inputs
        by_key[key] = _Compression(
            groups.count,
            members(leaves, _leaf_starts(program, pattern, axis), groups),
            _entry_indices(program, pattern, groups, axis),
        )
    return by_key[key]


def _entry_indices(
    program: EagerGraph, pattern: Pattern, groups: Grouping, axis: str
) -> list[_EntryIndex]:
    """Positions of the entries for each leaf that a pass returns: inputs, or outputs if forward."""
    by_rows = axis == "rows"
    seeded, returned = pattern.rows, pattern.columns
    if not by_rows:
        seeded, returned = returned, seeded
    leaves = program.inputs if by_rows else program.outputs
    indices = []
    for leaf, first in zip(
        leaves, _leaf_starts(program, pattern, "columns" if by_rows else "rows"), strict=True
    ):
        numbers = np.flatnonzero((returned >= first) & (returned < first + leaf.numel()))
        group = groups.group_of[seeded[numbers]]
        order = np.argsort(group, kind="stable")
        numbers, group = numbers[order], group[order]
        begin = np.searchsorted(group, np.arange(groups.count + 1)).tolist()
        device = leaf.device
        indices.append(
            _EntryIndex(
                torch.from_numpy(numbers).to(device),
                torch.from_numpy(group).to(device),
                torch.from_numpy(returned[numbers].astype(np.int64) - first).to(device),
                begin,
                leaf.numel(),
            )
        )
    return indices


def _entries_of(
    slab: Slab, indices: list[_EntryIndex], used: tuple[bool, ...] | None = None
) -> Entries:
    """The entries of a slab of compressed rows."""
    parts = []
    for value, entry in zip(slab.values, indices, strict=True):
        span = slice(entry.begin[slab.start], entry.begin[slab.stop])
        numbers = entry.entries[span]
        if value is None:
            device = numbers.device
            parts.append((numbers, torch.zeros(len(numbers), device=device)))
            continue
        index = (entry.group[span] - slab.start) * entry.size + entry.offset[span]
        parts.append((numbers, value.detach().reshape(-1)[index]))
    if used is None:
        used = tuple(value is not None for value in slab.values)
    return Entries(slab.stop - slab.start, tuple(parts), slab.passes, used)


# Columns that are tested one by one if the products differ, at most.
_SUSPECTS = 8
# Relative difference of the products, at least, that means a nonlinear backward.
_NONLINEAR = 0.05


class _ProductCheck:
    """Compares u'J of the entries with u'J of a plain pass, for a random u."""

    def __init__(
        self,
        program: EagerGraph,
        pattern: Pattern,
        cotangent: Sequence[Tensor] | None = None,
        expected: Sequence[Tensor | None] | None = None,
    ):
        if cotangent is None or expected is None:
            cotangent = random_vectors(program.outputs)
            expected = backward(program.outputs, cotangent, program.inputs)
        dtypes = [t.dtype for t in (*program.outputs, *program.inputs)]
        self._tolerance = tolerance(max(torch.finfo(d).eps for d in dtypes))
        self._pattern = pattern
        self._leaf_starts = _leaf_starts(program, pattern, "columns")
        self._inputs = program.inputs
        self._expected = expected
        self._names = program.nest.name_input, program.nest.live_inputs
        weight = torch.zeros(pattern.shape[0], dtype=torch.float64)
        for leaf, first in zip(cotangent, _leaf_starts(program, pattern, "rows"), strict=True):
            weight[first : first + leaf.numel()] = leaf.reshape(-1).to(weight)
        self._program = program
        self._weight = weight[torch.from_numpy(pattern.rows).long()]
        self._column = torch.from_numpy(pattern.columns).long()
        self._sum = torch.zeros(pattern.shape[1], dtype=torch.float64)

    def add(self, entries: Entries) -> None:
        """Adds the product of some entries."""
        for numbers, values in entries.parts:
            on_cpu = numbers.cpu()
            self._sum.index_add_(
                0, self._column[on_cpu], values.to("cpu", torch.float64) * self._weight[on_cpu]
            )

    def finite(self) -> bool:
        """Whether both products are finite."""
        present = [g for g in self._expected if g is not None]
        return bool(torch.isfinite(self._sum).all()) and all(
            bool(torch.isfinite(g.detach()).all()) for g in present
        )

    def verify(self) -> None:
        """Compares the products.

        Raises:
            PatternMissed: The pattern lacks a nonzero entry.
            CompressionFailed: The products differ by more than rounding, for another reason.
        """
        for position, (leaf, first, expected) in enumerate(
            zip(self._inputs, self._leaf_starts, self._expected, strict=True)
        ):
            computed = self._sum[first : first + leaf.numel()]
            expected_leaf = torch.zeros_like(computed)
            if expected is not None:
                expected_leaf = expected.detach().reshape(-1).to("cpu", torch.float64)
            both = torch.isfinite(computed) & torch.isfinite(expected_leaf)
            largest = (
                torch.where(both, expected_leaf.abs(), 0).amax()
                if len(expected_leaf)
                else expected_leaf.sum()
            )
            error = torch.where(both, (computed - expected_leaf).abs(), 0)
            for element in (error > self._tolerance * largest).nonzero()[:_SUSPECTS].flatten():
                if self._has_missing_entry(position, int(element)):
                    name, live = self._names
                    raise PatternMissed(name(live[position]), int(element))
            if bool((error > _NONLINEAR * largest).any()):
                raise CompressionFailed(
                    "compressed passes give other values than a plain pass, though no entry is "
                    "missing (a backward that is not linear in the gradient does)"
                )

    def _has_missing_entry(self, position: int, element: int) -> bool:
        """Whether a column has a nonzero entry outside the pattern, without a tolerance.

        With a cotangent that is zero at the rows of the column, the gradient is exactly zero.
        """
        pattern, program = self._pattern, self._program
        column = self._leaf_starts[position] + element
        outside = np.ones(pattern.shape[0], dtype=bool)
        outside[pattern.rows[pattern.columns == column]] = False
        cotangent = random_vectors(program.outputs)
        for leaf, first in zip(cotangent, _leaf_starts(program, pattern, "rows"), strict=True):
            mask = torch.from_numpy(outside[first : first + leaf.numel()]).reshape(leaf.shape)
            leaf *= mask.to(leaf.device)
        gradient = backward(program.outputs, cotangent, program.inputs)[position]
        if gradient is None:
            return False
        computed = gradient.detach().reshape(-1)[element]
        return bool((computed != 0) & ~computed.isnan())


def _pattern(structure: Structure) -> Pattern:
    assert structure.pattern is not None, "plans of this engine are made for a pattern"
    return structure.pattern


def _leaf_starts(program: EagerGraph, pattern: Pattern, axis: str) -> list[int]:
    """Number, in the pattern, of the first element of each leaf that has a graph."""
    nest = program.nest
    by_rows = axis == "rows"
    shapes = pattern.row_shapes if by_rows else pattern.column_shapes
    live = nest.live_outputs if by_rows else nest.live_inputs
    ends = np.cumsum([0, *(int(np.prod(s, dtype=np.int64)) for s in shapes)])
    return [int(ends[position]) for position in live]
