"""Scalar operations that every target knows."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# They give true or false, whatever they are given.
_TRUTHS = "truth lt le gt ge eq ne and or xor not isnan isinf"


TRUTHS = frozenset(_TRUTHS.split())


# Functions of a math library.
_FUNCTIONS = (
    "sin cos tan exp exp2 expm1 log log2 log10 log1p asin acos atan sinh cosh tanh asinh acosh"
    " atanh erf erfc pow atan2 hypot"
)


FUNCTIONS = frozenset(_FUNCTIONS.split())


# What they cost, in products; others cost one.
COSTLY: Mapping[str, int] = MappingProxyType(
    dict.fromkeys([*FUNCTIONS, "lgamma", "digamma", "trigamma", "sigmoid", "fmod"], 20)
    | dict.fromkeys(["div", "sqrt", "rsqrt", "reciprocal"], 4)
)


# Dtypes that expressions may have.
DTYPES = frozenset(("float64", "float32", "int64", "bool"))
