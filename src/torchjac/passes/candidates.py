"""Predicted cost of a plan, and the candidates worth trying.

The constants were measured with torch 2.13.0 on a 2-core AMD EPYC (1 MiB L2 a core), float64. They
only rank candidates: what a candidate really costs is measured when it runs (`passes.race`).
"""

from __future__ import annotations

from dataclasses import replace

from torchjac.capture.eager_graph import EagerGraph
from torchjac.host.costs import DEFAULT, cost_model
from torchjac.passes.autograd_graph import Profile, profile, survey
from torchjac.passes.coloring import column_groups, row_groups
from torchjac.passes.plan import Mode, Plan
from torchjac.passes.structure import Structure, analyze

# Seconds. Kinematic chain with 30 joints, 12 rows: 0.85 ms a plain pass, 1.4 ms a batched one.
_PASS, _NODE = 10e-6, 2.5e-6
_BATCHED_PASS, _BATCHED_NODE = 25e-6, 6e-6
# Bytes a second through element-wise backward operations whose tensors stay in cache.
_BANDWIDTH = 10e9
# A tensor of a chunk that leaves the cache costs about twice as much a byte, and one that the
# allocator must map fresh for every operation four times (128 bodies: 112, 244 and 480 ms in
# chunks of 5, 21 and 384 with 2, 8 and 150 MiB tensors; Brusselator 32: 22 ms in chunks of 64,
# 94 ms in one; unstructured volumes 127 ms in chunks of 101, 163 ms in chunks of 404).
_CACHED, _MAPPED = 2 * 2**20, 16 * 2**20
_UNCACHED_FACTOR, _MAPPED_FACTOR = 2.0, 4.0
# Batching with loops inside some operations: a third of them or so, a few microseconds each.
_LOOPED_NODE = 1e-6
# Random weights, products and comparison of a checked plan, beside its extra pass.
_CHECK = 100e-6
# The transposed backward graph has about the same operations, and building it costs a backward
# pass that records itself and a second, checking, product.
_FORWARD_FACTOR = 1.2


def predict(plan: Plan, structure: Structure, size: Profile) -> float:
    """Predicted seconds of a plan on this machine, if its costs were measured (`cost_model`)."""
    return _predicted(plan, structure, size) * cost_model().operation / DEFAULT.operation


def _predicted(plan: Plan, structure: Structure, size: Profile) -> float:
    """Predicted seconds on the machine that the constants above are from."""
    forward = plan.mode == "forward"
    seeds = structure.n if forward else structure.m
    passes = -(-seeds // plan.chunk)
    moved = seeds * size.traffic / _BANDWIDTH
    if plan.chunk > 1:
        largest = size.largest * plan.chunk
        moved *= _MAPPED_FACTOR if largest > _MAPPED else 1
        moved *= _UNCACHED_FACTOR if 2 * _CACHED < largest <= _MAPPED else 1
    if plan.mode == "replicated":  # forward again, backward, and the check of both
        again = passes * (_PASS + 2 * _NODE * size.nodes) + 2 * moved
        return again + _PASS + _NODE * size.nodes + _CHECK
    if plan.chunk == 1:
        overhead = passes * (_PASS + _NODE * size.nodes)
    else:
        overhead = passes * (_BATCHED_PASS + _BATCHED_NODE * size.nodes)
    if plan.batching != "functorch" and plan.chunk > 1:
        overhead += seeds * _LOOPED_NODE * size.nodes
    if not forward:
        return overhead + moved
    build = _PASS + 3 * _NODE * size.nodes + _CHECK
    return build + _FORWARD_FACTOR * (overhead + moved)


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
    cached = max(1, min(most, _CACHED // max(1, size.largest)))
    sizes = {1, cached, min(most, 4 * cached), max(1, cached // 4)}
    return sorted(sizes)
