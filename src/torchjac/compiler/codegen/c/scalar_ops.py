"""Scalar operations as C."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from torchjac.compiler.codegen.scalar_ops import MATH_FUNCTIONS

# The C type of each dtype.
CTYPES: Mapping[str, str] = MappingProxyType(
    {"float64": "double", "float32": "float", "int64": "long long", "bool": "int"}
)
# SIMD functions of the GNU C library, within 4 units in the last place.
VECTORIZED = MATH_FUNCTIONS

# The C expression of each operation; `{f}` is the suffix of math functions, `{t}` the type.
# Arguments are names, so they may be repeated.
C: Mapping[str, str] = MappingProxyType(
    {
        "add": "{0} + {1}",
        "sub": "{0} - {1}",
        "mul": "{0} * {1}",
        "div": "{0} / {1}",
        "neg": "-{0}",
        "cast": "({t}){0}",
        "truth": "{0} != 0",
        "abs": "fabs{f}({0})",
        "sqrt": "sqrt{f}({0})",
        "rsqrt": "1 / sqrt{f}({0})",
        "reciprocal": "1 / {0}",
        "square": "{0} * {0}",
        "cube": "{0} * {0} * {0}",
        "exp": "exp{f}({0})",
        "exp2": "exp2{f}({0})",
        "expm1": "expm1{f}({0})",
        "log": "log{f}({0})",
        "log2": "log2{f}({0})",
        "log10": "log10{f}({0})",
        "log1p": "log1p{f}({0})",
        "sin": "sin{f}({0})",
        "cos": "cos{f}({0})",
        "tan": "tan{f}({0})",
        "asin": "asin{f}({0})",
        "acos": "acos{f}({0})",
        "atan": "atan{f}({0})",
        "sinh": "sinh{f}({0})",
        "cosh": "cosh{f}({0})",
        "tanh": "tanh{f}({0})",
        "asinh": "asinh{f}({0})",
        "acosh": "acosh{f}({0})",
        "atanh": "atanh{f}({0})",
        "erf": "erf{f}({0})",
        "erfc": "erfc{f}({0})",
        "lgamma": "lgamma{f}({0})",
        "digamma": "({t})torchjac_digamma({0})",
        "trigamma": "({t})torchjac_trigamma({0})",
        "floor": "floor{f}({0})",
        "ceil": "ceil{f}({0})",
        "round": "rint{f}({0})",
        "trunc": "trunc{f}({0})",
        "frac": "{0} - trunc{f}({0})",
        "sigmoid": "1 / (1 + exp{f}(-{0}))",
        "sign": "({t})(({0} > 0) - ({0} < 0))",
        "pow": "pow{f}({0}, {1})",
        "atan2": "atan2{f}({0}, {1})",
        "hypot": "hypot{f}({0}, {1})",
        "copysign": "copysign{f}({0}, {1})",
        "fmod": "fmod{f}({0}, {1})",
        "fmax": "fmax{f}({0}, {1})",
        "fmin": "fmin{f}({0}, {1})",
        # NaN propagates, as in torch.
        "maximum": "({0} != {0} || {0} > {1}) ? {0} : {1}",
        "minimum": "({0} != {0} || {0} < {1}) ? {0} : {1}",
        "lt": "{0} < {1}",
        "le": "{0} <= {1}",
        "gt": "{0} > {1}",
        "ge": "{0} >= {1}",
        "eq": "{0} == {1}",
        "ne": "{0} != {1}",
        "and": "{0} && {1}",
        "or": "{0} || {1}",
        "xor": "!{0} != !{1}",
        "not": "!{0}",
        "isnan": "{0} != {0}",
        "isinf": "fabs{f}({0}) == INFINITY",
        "where": "{0} ? {1} : {2}",
    }
)
# Functions that no C library has, by their name in C.
OWN_FUNCTIONS: Mapping[str, str] = MappingProxyType(
    {
        "torchjac_digamma": """\
/* psi(x): reflected to where x > 0, raised to x >= 10, and the asymptotic series there
 * (Abramowitz and Stegun, 6.3.7, 6.3.5, 6.3.18). */
static double torchjac_digamma(double x)
{
  static const double b[] = {1. / 12, -1. / 120, 1. / 252, -1. / 240, 1. / 132, -691. / 32760,
                             1. / 12};
  double sum = 0, power = 1, series = 0, whole;
  if (x == 0) return copysign(INFINITY, -x);
  if (x < 0) {
    if (x == trunc(x)) return NAN;
    sum = -3.14159265358979323846 / tan(3.14159265358979323846 * modf(x, &whole));
    x = 1 - x;
  }
  for (; x < 10; x++) sum -= 1 / x;
  for (int k = 0; k < 7; k++) series += b[k] * (power /= x * x);
  return sum + log(x) - 0.5 / x - series;
}
""",
        "torchjac_trigamma": """\
/* psi'(x): reflected to where x >= 1/2, raised to x >= 10, and the asymptotic series there
 * (Abramowitz and Stegun, 6.4.7, 6.4.6, 6.4.12). */
static double torchjac_trigamma(double x)
{
  static const double b[] = {1. / 6, -1. / 30, 1. / 42, -1. / 30, 5. / 66, -691. / 2730, 7. / 6};
  const double pi = 3.14159265358979323846;
  double sum = 0, sign = 1, power, series = 0, whole, s;
  if (x < 0.5) {
    s = sin(pi * modf(x, &whole));
    sum = -pi * pi / (s * s);
    sign = -1;
    x = 1 - x;
  }
  for (; x < 10; x++) sum += 1 / (x * x);
  power = 1 / x;
  for (int k = 0; k < 7; k++) series += b[k] * (power /= x * x);
  return sign * (sum + 1 / x + 0.5 / (x * x) + series);
}
""",
    }
)


def literal(value: float, dtype: str) -> str:
    """A number as C, exactly."""
    if dtype == "bool":
        return "1" if value else "0"
    if dtype == "int64":
        return f"({int(value)}LL)"
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    if dtype == "float32":
        text = (f"{value:.1f}" if value == int(value) and abs(value) < 1e6 else value.hex()) + "f"
    elif value == int(value) and abs(value) < 1e15:
        text = f"{value:.1f}"
    else:
        text = value.hex()
    return f"({text})" if value < 0 else text
