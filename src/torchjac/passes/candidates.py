"""The candidates worth trying, ranked by their predicted cost (`host/costs.py`).

The prediction only ranks candidates: the cost of a candidate is measured when it runs
(`passes.race`).
"""

from __future__ import annotations

from dataclasses import replace

from torchjac.capture.eager_graph import EagerGraph
from torchjac.host.costs import CHUNK_CACHED_BYTES, PassWork, cost_model
from torchjac.passes.autograd_graph import Profile, profile, survey
from torchjac.passes.coloring import column_groups, row_groups
from torchjac.passes.plan import Mode, Plan
from torchjac.passes.structure import Structure, analyze


def predict(plan: Plan, structure: Structure, size: Profile) -> float:
    """Predicted seconds of a plan on this machine, if its costs were measured (`cost_model`)."""
    return cost_model().pass_seconds(work_of(plan, structure, size))


def work_of(plan: Plan, structure: Structure, size: Profile) -> PassWork:
    """The work of all passes of a plan, in counts."""
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
    """Plans that keep the budget, with their predicted seconds, best first.

    The row loop is always among them: it is the definition of the answer and never refused.
    """
    plans: list[Plan] = []
    modes: tuple[tuple[Mode, int], ...] = (("reverse", structure.m), ("forward", structure.n))
    for mode, seeds in modes:
        plans += [Plan(mode, c) for c in _chunks(seeds, size, budget)]
    if replayable:
        plans.append(Plan("replicated", _within(structure.m, size, budget // 2)))
    return sorted(((p, predict(p, structure, size)) for p in plans), key=lambda c: c[1])


def plain_seconds(program: EagerGraph, budget: int) -> tuple[int, float]:
    """Operations of a program's graph, and predicted seconds of its Jacobian without a pattern."""
    structure = analyze(program)
    if not structure.m or not structure.n:
        return 0, 0.0
    graph = structure.graph or survey(program)  # one row is evaluated without a survey
    size = profile(program, graph)
    return size.nodes, candidates(structure, size, budget, False)[0][1]


def compressed_candidates(
    structure: Structure, size: Profile, budget: int
) -> list[tuple[Plan, float]]:
    """Plans of the color engine for a `grouped` structure: a seed for each group.

    The loop over groups of rows is never refused.
    """
    modes: tuple[tuple[Mode, int], ...] = (("reverse", structure.m), ("forward", structure.n))
    plans = [
        Plan(mode, chunk, engine="color")
        for mode, groups in modes
        for chunk in _chunks(groups, size, budget)
    ]
    return sorted(((p, predict(p, structure, size)) for p in plans), key=lambda c: c[1])


def grouped(structure: Structure) -> Structure:
    """The structure with groups of rows and columns in the place of rows and columns."""
    pattern = structure.pattern
    assert pattern is not None, "asked for only where the pattern is known"
    return replace(
        structure,
        row_starts=(0, row_groups(pattern).count),
        column_starts=(0, column_groups(pattern).count),
        pattern=None,
    )


def _within(seeds: int, size: Profile, budget: int) -> int:
    """Most seeds at once whose gradients fit the budget."""
    return max(1, min(seeds, budget // max(1, size.peak)))


def _chunks(seeds: int, size: Profile, budget: int) -> list[int]:
    most = _within(seeds, size, budget)
    cached = max(1, min(most, CHUNK_CACHED_BYTES // max(1, size.largest)))
    sizes = {1, cached, min(most, 4 * cached), max(1, cached // 4)}
    return sorted(sizes)
