"""Rules: what each operation's local Jacobian looks like, one file a family."""

from torchjac.structure.rules import combine, contract, move, reduce, scale
from torchjac.structure.rules import convolve as _convolve
from torchjac.structure.rules import index as _index
from torchjac.structure.rules import linalg as _linalg
from torchjac.structure.rules import nonlinear as _nonlinear
from torchjac.structure.rules import opaque as _opaque
from torchjac.structure.rules import pool as _pool
from torchjac.structure.rules import transform as _transform
from torchjac.structure.rules.registry import (
    RULES,
    Beside,
    NoRule,
    NotLinear,
    Op,
    Operand,
    Vanishing,
    local_of,
    rule,
)

__all__ = [
    "RULES",
    "Beside",
    "NoRule",
    "NotLinear",
    "Op",
    "Operand",
    "Vanishing",
    "combine",
    "contract",
    "local_of",
    "move",
    "reduce",
    "rule",
    "scale",
]
