"""The color engine: compressed passes, a seed for each group of structurally independent rows.

Rows of which no column has two entries share a cotangent; their entries are then read off the one
gradient that comes back (A. R. Curtis, M. J. D. Powell and J. K. Reid, "On the estimation of sparse
Jacobian matrices", 1974). The same with columns and tangents in forward mode.
"""

from collections.abc import Iterator

from torchjac.capture import Program
from torchjac.engines.color.compressed import columns, rows
from torchjac.engines.slab import Entries
from torchjac.plan import Plan
from torchjac.structure import Structure

_MODES = {"reverse": rows, "forward": columns}


def evaluate(program: Program, structure: Structure, plan: Plan) -> Iterator[Entries]:
    """Evaluates a plan of this engine, some groups at a time."""
    return _MODES[plan.mode](program, structure, plan)
