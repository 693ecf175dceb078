"""Scalar operations that every target knows."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# Operations whose result is a truth value.
_PREDICATES = "truth lt le gt ge eq ne and or xor not isnan isinf"


PREDICATES = frozenset(_PREDICATES.split())


# Functions of a math library.
_MATH_FUNCTIONS = (
    "sin cos tan exp exp2 expm1 log log2 log10 log1p asin acos atan sinh cosh tanh asinh acosh"
    " atanh erf erfc pow atan2 hypot"
)


MATH_FUNCTIONS = frozenset(_MATH_FUNCTIONS.split())


# The cost of an operation, in scalar products; the default is one.
COSTS: Mapping[str, int] = MappingProxyType(
    dict.fromkeys([*MATH_FUNCTIONS, "lgamma", "digamma", "trigamma", "sigmoid", "fmod"], 20)
    | dict.fromkeys(["div", "sqrt", "rsqrt", "reciprocal"], 4)
)


# Dtypes of expressions.
DTYPES = frozenset(("float64", "float32", "int64", "bool"))
