"""Candidate plans, ranked by their predicted cost (`host/costs.py`).

The prediction only ranks candidates. The race (`passes.race`) measures their costs.
"""

from __future__ import annotations

from dataclasses import replace

from torchjac.capture.eager_graph import EagerGraph
from torchjac.host.costs import CHUNK_CACHED_BYTES, PassWork, cost_model
from torchjac.passes.autograd_graph import Profile, profile, traverse
from torchjac.passes.coloring import column_groups, row_groups
from torchjac.passes.plan import Mode, Plan
from torchjac.passes.structure import Structure, analyze


def predict(plan: Plan, structure: Structure, size: Profile) -> float:
    """Predicted seconds of a plan on this machine (`cost_model`)."""
    return cost_model().pass_seconds(work_of(plan, structure, size))


def work_of(plan: Plan, structure: Structure, size: Profile) -> PassWork:
    """The work of all passes of a plan, as counts."""
    seeds = structure.n if plan.mode == "forward" else structure.m
    return PassWork(
        plan.mode,
        seeds,
        plan.chunk,
        size.nodes,
        size.traffic,
        size.largest,
        looped=seeds if plan.batching != "functorch" and plan.chunk > 1 else 0,
    )


def candidates(
    structure: Structure, size: Profile, budget: int, replayable: bool
) -> list[tuple[Plan, float]]:
    """Plans within the memory budget and their predicted seconds, best first.

    The row loop is always a candidate: the row loop defines the answer, and is never refused.

    Args:
        structure: Rows and columns of the Jacobian.
        size: Size of one backward pass.
        budget: Bytes that the gradients of one chunk may take.
        replayable: Whether the function can run again on copies of its input.
    """
    plans: list[Plan] = []
    modes: tuple[tuple[Mode, int], ...] = (("reverse", structure.m), ("forward", structure.n))
    for mode, seeds in modes:
        plans += [Plan(mode, c) for c in _chunk_sizes(seeds, size, budget)]
    if replayable:
        plans.append(Plan("replicated", _largest_chunk(structure.m, size, budget // 2)))
    return sorted(((p, predict(p, structure, size)) for p in plans), key=lambda c: c[1])


def plain_seconds(program: EagerGraph, budget: int) -> tuple[int, float]:
    """Number of nodes of a program's graph, and predicted seconds of its passes, uncompressed."""
    structure = analyze(program)
    if not structure.m or not structure.n:
        return 0, 0.0
    graph = structure.graph or traverse(program)  # the structure of one row has no graph
    size = profile(program, graph)
    return size.nodes, candidates(structure, size, budget, False)[0][1]


def compressed_candidates(
    structure: Structure, size: Profile, budget: int
) -> list[tuple[Plan, float]]:
    """Plans of the color engine and their predicted seconds: one seed for each group.

    Args:
        structure: A structure of groups (`with_groups`).
        size: Size of one backward pass.
        budget: Bytes that the gradients of one chunk may take.
    """
    modes: tuple[tuple[Mode, int], ...] = (("reverse", structure.m), ("forward", structure.n))
    plans = [
        Plan(mode, chunk, engine="color")
        for mode, groups in modes
        for chunk in _chunk_sizes(groups, size, budget)
    ]
    return sorted(((p, predict(p, structure, size)) for p in plans), key=lambda c: c[1])


def with_groups(structure: Structure) -> Structure:
    """The structure whose rows and columns are the color groups of the pattern."""
    pattern = structure.pattern
    assert pattern is not None, "asked for only where the pattern is known"
    return replace(
        structure,
        row_starts=(0, row_groups(pattern).count),
        column_starts=(0, column_groups(pattern).count),
        pattern=None,
    )


def _largest_chunk(seeds: int, size: Profile, budget: int) -> int:
    """The largest chunk whose gradients fit the budget."""
    return max(1, min(seeds, budget // max(1, size.peak)))


def _chunk_sizes(seeds: int, size: Profile, budget: int) -> list[int]:
    largest = _largest_chunk(seeds, size, budget)
    cached = max(1, min(largest, CHUNK_CACHED_BYTES // max(1, size.largest)))
    sizes = {1, cached, min(largest, 4 * cached), max(1, cached // 4)}
    return sorted(sizes)
