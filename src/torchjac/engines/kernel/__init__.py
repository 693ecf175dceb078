"""Programs of few operations on each element as C: lines of scalars, in loops over lanes."""

from torchjac.engines.kernel.compiler import LIMIT, NoCompiler
from torchjac.engines.kernel.kernel import NAME, Kernel, Written, written, written_for_samples
from torchjac.engines.kernel.readings import unchanged

__all__ = [
    "LIMIT",
    "NAME",
    "Kernel",
    "NoCompiler",
    "Written",
    "unchanged",
    "written",
    "written_for_samples",
]
