"""Engines evaluate a plan: program, structure and plan in, slabs of the Jacobian out."""

from collections.abc import Iterator

from torchjac.capture import Program
from torchjac.engines import plain
from torchjac.engines.slab import Slab
from torchjac.plan import Plan
from torchjac.structure import Structure

__all__ = ["Slab", "evaluate"]

_ENGINES = {"plain": plain.evaluate}


def evaluate(program: Program, structure: Structure, plan: Plan) -> Iterator[Slab]:
    """Evaluates a Jacobian slab by slab with the engine that the plan names.

    Raises:
        PlanRefused: The plan cannot be run on this program.
        CoupledBatchError: Samples of a batch are not independent.
    """
    return _ENGINES[plan.engine](program, structure, plan)
