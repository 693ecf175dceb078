"""Compressed passes in reverse and in forward mode, and the check of what is read off them."""

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
    recorded,
    refuse_beforehand,
    refuse_user_code,
    transposed_outputs,
    transposed_passes,
)
from torchjac.passes.freivalds import tolerance
from torchjac.passes.group_seeds import GroupSeeds, Members, members
from torchjac.passes.plan import Plan
from torchjac.passes.reverse import release
from torchjac.passes.seeds import weights
from torchjac.passes.slab import Entries, Slab
from torchjac.passes.structure import Structure
from torchjac.sparsity.pattern import Pattern


def rows(program: EagerGraph, structure: Structure, plan: Plan) -> Iterator[Entries]:
    """Pulls one cotangent back for each group of rows.

    Raises:
        PlanRefused: The passes cannot be batched.
        PatternMissed: The pattern lacks an entry that is not zero.
        CompressionFailed: Rows that share a pass do not come out as they do alone.
    """
    pattern = _pattern(structure)
    prepared = _prepared(program, pattern, "rows")
    seeds = GroupSeeds(program.outputs, prepared.count, prepared.members)
    passes = Passes(
        program.outputs, program.inputs, seeds, plan, program.create_graph, structure.operations
    )
    check = None if plan.checked else _Check(program, pattern)
    for slab in _slabs(passes, plan, prepared.count, program.inputs):
        entries = _read(slab, prepared.reading)
        if check is not None:
            check.add(entries)
        yield entries
        del slab, entries
    if check is not None:
        check.verify()
    if not program.retain_graph:
        release(program)


def columns(program: EagerGraph, structure: Structure, plan: Plan) -> Iterator[Entries]:
    """Pushes one tangent forward for each group of columns.

    Raises:
        PlanRefused: The backward pass cannot be transposed.
        PatternMissed: The pattern lacks an entry that is not zero.
        CompressionFailed: Rows that share a pass do not come out as they do alone.
    """
    refuse_beforehand(program, structure)
    pattern = _pattern(structure)
    prepared = _prepared(program, pattern, "columns")
    cotangent = weights(program.outputs)
    if not plan.checked:
        refuse_user_code(program, cotangent)
    gradients, _ = recorded(program, cotangent)
    used = tuple(g is not None for g in gradients)
    check = _Check(program, pattern, [u.detach() for u in cotangent], gradients)
    outputs = transposed_outputs(program, gradients)
    seeds = GroupSeeds(outputs, prepared.count, prepared.members)
    passes = transposed_passes(program, structure, plan, outputs, cotangent, seeds)
    for slab in _slabs(passes, plan, prepared.count, program.outputs):
        entries = _read(slab, prepared.reading, used)
        check.add(entries)
        yield entries
        del slab, entries
    if not check.finite():
        raise RefusedHere("values are not finite: reverse mode defines what they are")
    check.verify()
    if not program.retain_graph:
        release(program)


def _slabs(passes: Passes, plan: Plan, count: int, leaves: Sequence[Tensor]) -> Iterator[Slab]:
    def evaluate(start: int, stop: int) -> Slab:
        if plan.chunk > 1 and stop - start > 1:
            return Slab("rows", start, stop, passes.batched(start, stop), 1)
        return Slab("rows", start, stop, passes.singles(start, stop), stop - start)

    size = plan.chunk
    if size == 1:
        size = rows_at_once(count, sum(t.numel() * t.element_size() for t in leaves))
    yield from in_chunks(count, size, evaluate)


@dataclass(frozen=True, slots=True)
class _Reading:
    """Where in the compressed Jacobian the entries of one leaf stand.

    Attributes:
        entries: Their numbers in the pattern, ordered by group.
        group: Group of each.
        offset: Element of the leaf that each is.
        begin: Where those of each group begin, and their number at the end.
        size: Elements of the leaf.
    """

    entries: Tensor
    group: Tensor
    offset: Tensor
    begin: list[int]
    size: int


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What depends on the pattern only, kept from call to call.

    Attributes:
        count: Number of groups.
        members: Elements of the leaves that are seeded, by group.
        reading: Where entries stand in each leaf that comes back.
    """

    count: int
    members: Members
    reading: list[_Reading]


_kept: WeakKeyDictionary[Pattern, dict[Hashable, _Prepared]] = WeakKeyDictionary()


def _prepared(program: EagerGraph, pattern: Pattern, axis: str) -> _Prepared:
    nest = program.nest
    key = (axis, nest.live_outputs, nest.live_inputs, program.device)
    kept = _kept.setdefault(pattern, {})
    if key not in kept:
        groups = row_groups(pattern) if axis == "rows" else column_groups(pattern)
        leaves = program.outputs if axis == "rows" else program.inputs
        kept[key] = _Prepared(
            groups.count,
            members(leaves, _firsts(program, pattern, axis), groups),
            _reading(program, pattern, groups, axis),
        )
    return kept[key]


def _reading(program: EagerGraph, pattern: Pattern, groups: Grouping, axis: str) -> list[_Reading]:
    """One for each leaf that comes back: inputs in reverse mode, outputs in forward mode."""
    by_rows = axis == "rows"
    seeded, other = pattern.rows, pattern.columns
    if not by_rows:
        seeded, other = other, seeded
    leaves = program.inputs if by_rows else program.outputs
    found = []
    for leaf, first in zip(
        leaves, _firsts(program, pattern, "columns" if by_rows else "rows"), strict=True
    ):
        mine = np.flatnonzero((other >= first) & (other < first + leaf.numel()))
        group = groups.of[seeded[mine]]
        order = np.argsort(group, kind="stable")
        mine, group = mine[order], group[order]
        begin = np.searchsorted(group, np.arange(groups.count + 1)).tolist()
        device = leaf.device
        found.append(
            _Reading(
                torch.from_numpy(mine).to(device),
                torch.from_numpy(group).to(device),
                torch.from_numpy(other[mine].astype(np.int64) - first).to(device),
                begin,
                leaf.numel(),
            )
        )
    return found


def _read(slab: Slab, reading: list[_Reading], used: tuple[bool, ...] | None = None) -> Entries:
    """The entries that a few compressed rows hold."""
    parts = []
    for value, where in zip(slab.values, reading, strict=True):
        mine = slice(where.begin[slab.start], where.begin[slab.stop])
        numbers = where.entries[mine]
        if value is None:
            device = numbers.device
            parts.append((numbers, torch.zeros(len(numbers), device=device)))
            continue
        index = (where.group[mine] - slab.start) * where.size + where.offset[mine]
        parts.append((numbers, value.detach().reshape(-1)[index]))
    if used is None:
        used = tuple(value is not None for value in slab.values)
    return Entries(slab.stop - slab.start, tuple(parts), slab.passes, used)


# Columns that are looked at one by one where the products differ.
_SUSPECTS = 8
# Disagreement that no rounding explains.
_GROSS = 0.05


class _Check:
    """u'J of the entries against u'J of a plain pass, for a random u that tells all rows apart."""

    def __init__(
        self,
        program: EagerGraph,
        pattern: Pattern,
        cotangent: Sequence[Tensor] | None = None,
        expected: Sequence[Tensor | None] | None = None,
    ):
        if cotangent is None or expected is None:
            cotangent = weights(program.outputs)
            expected = backward(program.outputs, cotangent, program.inputs)
        dtypes = [t.dtype for t in (*program.outputs, *program.inputs)]
        self._tolerance = tolerance(max(torch.finfo(d).eps for d in dtypes))
        self._pattern = pattern
        self._firsts = _firsts(program, pattern, "columns")
        self._inputs = program.inputs
        self._expected = expected
        self._names = program.nest.name_input, program.nest.live_inputs
        weight = torch.zeros(pattern.shape[0], dtype=torch.float64)
        for leaf, first in zip(cotangent, _firsts(program, pattern, "rows"), strict=True):
            weight[first : first + leaf.numel()] = leaf.reshape(-1).to(weight)
        self._program = program
        self._weight = weight[torch.from_numpy(pattern.rows).long()]
        self._column = torch.from_numpy(pattern.columns).long()
        self._sum = torch.zeros(pattern.shape[1], dtype=torch.float64)

    def add(self, entries: Entries) -> None:
        """Takes some entries into account."""
        for numbers, values in entries.parts:
            where = numbers.cpu()
            self._sum.index_add_(
                0, self._column[where], values.to("cpu", torch.float64) * self._weight[where]
            )

    def finite(self) -> bool:
        """Whether everything was."""
        given = [g for g in self._expected if g is not None]
        return bool(torch.isfinite(self._sum).all()) and all(
            bool(torch.isfinite(g.detach()).all()) for g in given
        )

    def verify(self) -> None:
        """Compares.

        Raises:
            PatternMissed: They differ by more than rounding.
        """
        for position, (leaf, first, expected) in enumerate(
            zip(self._inputs, self._firsts, self._expected, strict=True)
        ):
            got = self._sum[first : first + leaf.numel()]
            want = torch.zeros_like(got)
            if expected is not None:
                want = expected.detach().reshape(-1).to("cpu", torch.float64)
            both = torch.isfinite(got) & torch.isfinite(want)
            largest = torch.where(both, want.abs(), 0).amax() if len(want) else want.sum()
            error = torch.where(both, (got - want).abs(), 0)
            for element in (error > self._tolerance * largest).nonzero()[:_SUSPECTS].flatten():
                if self._misses(position, int(element)):
                    name, live = self._names
                    raise PatternMissed(name(live[position]), int(element))
            if bool((error > _GROSS * largest).any()):
                raise CompressionFailed(
                    "compressed passes give other values than a plain pass, though no entry is "
                    "missing (a backward that is not linear in the gradient does)"
                )

    def _misses(self, position: int, element: int) -> bool:
        """Whether rows outside the pattern reach a column: exactly, whatever is rounded.

        With a cotangent that is zero at the rows of the column, its gradient is exactly zero.
        """
        pattern, program = self._pattern, self._program
        column = self._firsts[position] + element
        others = np.ones(pattern.shape[0], dtype=bool)
        others[pattern.rows[pattern.columns == column]] = False
        cotangent = weights(program.outputs)
        for leaf, first in zip(cotangent, _firsts(program, pattern, "rows"), strict=True):
            kept = torch.from_numpy(others[first : first + leaf.numel()]).reshape(leaf.shape)
            leaf *= kept.to(leaf.device)
        gradient = backward(program.outputs, cotangent, program.inputs)[position]
        if gradient is None:
            return False
        got = gradient.detach().reshape(-1)[element]
        return bool((got != 0) & ~got.isnan())


def _pattern(structure: Structure) -> Pattern:
    assert structure.pattern is not None, "plans of this engine are made for a pattern"
    return structure.pattern


def _firsts(program: EagerGraph, pattern: Pattern, axis: str) -> list[int]:
    """Number in the pattern of the first element of each leaf that has a graph."""
    nest = program.nest
    by_rows = axis == "rows"
    shapes = pattern.row_shapes if by_rows else pattern.column_shapes
    live = nest.live_outputs if by_rows else nest.live_inputs
    ends = np.cumsum([0, *(int(np.prod(s, dtype=np.int64)) for s in shapes)])
    return [int(ends[position]) for position in live]
