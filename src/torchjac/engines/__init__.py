"""Engines evaluate a plan: program, structure and plan in, parts of the Jacobian out."""

from collections.abc import Callable, Iterator

from torchjac.capture import Program
from torchjac.engines import color, plain
from torchjac.engines.slab import Entries, Slab
from torchjac.plan import Plan
from torchjac.structure import Structure

__all__ = ["Entries", "Part", "Slab", "evaluate"]

Part = Slab | Entries

_ENGINES: dict[str, Callable[[Program, Structure, Plan], Iterator[Part]]] = {
    "plain": plain.evaluate,
    "color": color.evaluate,
}


def evaluate(program: Program, structure: Structure, plan: Plan) -> Iterator[Part]:
    """Evaluates a Jacobian part by part with the engine that the plan names.

    Raises:
        PlanRefused: The plan cannot be run on this program.
        PatternMissed: The pattern lacks an entry that is not zero.
        CoupledBatchError: Samples of a batch are not independent.
    """
    return _ENGINES[plan.engine](program, structure, plan)
