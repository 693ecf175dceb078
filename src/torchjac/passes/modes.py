"""Modes of passes: the table from a plan's engine and mode to the function that runs the plan.

*plain* passes carry one row or column each: `reverse` pulls cotangents back, `forward` pushes
tangents through the transposed backward graph, `replicated` runs the function on copies of its
input. *color* passes are compressed: structurally orthogonal rows share a cotangent, and the
gradient holds the entries of all these rows (A. R. Curtis, M. J. D. Powell and J. K. Reid, "On the
estimation of sparse Jacobian matrices", 1974). In forward mode columns share a tangent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torchjac.capture.eager_graph import EagerGraph
from torchjac.passes import compressed, forward, replicated, reverse
from torchjac.passes.plan import Plan
from torchjac.passes.slab import Entries, Slab
from torchjac.passes.structure import Structure

Part = Slab | Entries
Mode = Callable[[EagerGraph, Structure, Plan], Iterator[Part]]

_MODES: dict[tuple[str, str], Mode] = {
    ("plain", "reverse"): reverse.rows,
    ("plain", "forward"): forward.columns,
    ("plain", "replicated"): replicated.rows,
    ("color", "reverse"): compressed.rows,
    ("color", "forward"): compressed.columns,
}


def evaluate(program: EagerGraph, structure: Structure, plan: Plan) -> Iterator[Part]:
    """Evaluates a Jacobian part by part, in the mode that the plan names.

    Raises:
        PlanRefused: The plan cannot run on this program.
        PatternMissed: The pattern lacks a nonzero entry.
        CoupledBatchError: Samples of a batch are not independent.
    """
    return _MODES[plan.engine, plan.mode](program, structure, plan)
