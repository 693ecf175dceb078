"""The plain engine: passes over the graph that PyTorch recorded.

Always available, and the baseline of every other engine. One module per mode: `reverse` pulls
cotangents back, `forward` pushes tangents through the transposed backward graph, `replicated` runs
the function on copies of its input.
"""

from collections.abc import Iterator

from torchjac.capture import Program
from torchjac.engines.plain import forward, replicated, reverse
from torchjac.engines.slab import Slab
from torchjac.plan import Plan
from torchjac.structure import Structure

_MODES = {
    "reverse": reverse.rows,
    "forward": forward.columns,
    "replicated": replicated.rows,
}


def evaluate(program: Program, structure: Structure, plan: Plan) -> Iterator[Slab]:
    """Evaluates a plan of this engine, slab by slab."""
    return _MODES[plan.mode](program, structure, plan)
