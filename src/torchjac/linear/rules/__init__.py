"""Rules: the local Jacobian of each operation, one file per family."""

from torchjac.linear.rules import combine, contract, move, reduce, scale
from torchjac.linear.rules import convolve as _convolve
from torchjac.linear.rules import index as _index
from torchjac.linear.rules import linalg as _linalg
from torchjac.linear.rules import mask as _mask
from torchjac.linear.rules import nonlinear as _nonlinear
from torchjac.linear.rules import opaque as _opaque
from torchjac.linear.rules import pool as _pool
from torchjac.linear.rules import transform as _transform
from torchjac.linear.rules.registry import (
    RULES,
    Concat,
    NoRule,
    NotLinear,
    Op,
    Operand,
    ZeroPreserving,
    local_of,
    rule,
)

__all__ = [
    "RULES",
    "Concat",
    "NoRule",
    "NotLinear",
    "Op",
    "Operand",
    "ZeroPreserving",
    "combine",
    "contract",
    "local_of",
    "move",
    "reduce",
    "rule",
    "scale",
]
