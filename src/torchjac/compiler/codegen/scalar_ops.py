"""Scalar operations that every target knows."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# They give true or false, whatever they are given.
_TRUTHS = "truth lt le gt ge eq ne and or xor not isnan isinf"


TRUTHS = frozenset(_TRUTHS.split())


# Vectorized by the C library of GNU systems, within 4 units in the last place.
_VECTORIZED = (
    "sin cos tan exp exp2 expm1 log log2 log10 log1p asin acos atan sinh cosh tanh asinh acosh"
    " atanh erf erfc pow atan2 hypot"
)


VECTORIZED = frozenset(_VECTORIZED.split())


# What they cost, in products; others cost one.
COSTLY: Mapping[str, int] = MappingProxyType(
    dict.fromkeys([*VECTORIZED, "lgamma", "digamma", "trigamma", "sigmoid", "fmod"], 20)
    | dict.fromkeys(["div", "sqrt", "rsqrt", "reciprocal"], 4)
)


CTYPES: Mapping[str, str] = MappingProxyType(
    {"float64": "double", "float32": "float", "int64": "long long", "bool": "int"}
)
