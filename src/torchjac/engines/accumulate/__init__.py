"""The accumulate engine: local Jacobians multiplied over the graph, once for every function.

What it makes is a straight line of operations that computes the entries of J from the inputs; the
function itself and its backward pass do not run any more.
"""

from torchjac.engines.accumulate.emit import Emitted, Target, emit

__all__ = ["Emitted", "Target", "emit"]
