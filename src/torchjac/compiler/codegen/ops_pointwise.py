"""Pointwise operations of torch in terms of scalar operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torchjac._torch.operators import aten, known, prims
from torchjac.errors import PlanRefused

# An operand: element ids or a Python number.
Operand = Any


class Builder(Protocol):
    """Applies a scalar operation to operands of known dtypes, with broadcasting."""

    def __call__(self, kind: str, *operands: Operand) -> Operand:
        """The result."""


def _plain(kind: str) -> Callable[..., Operand]:
    def built(do: Builder, *operands: Operand) -> Operand:
        return do(kind, *operands)

    return built


def _add(do: Builder, x: Operand, y: Operand, alpha: float = 1) -> Operand:
    return do("add", x, y if alpha == 1 else do("mul", y, alpha))


def _sub(do: Builder, x: Operand, y: Operand, alpha: float = 1) -> Operand:
    return do("sub", x, y if alpha == 1 else do("mul", y, alpha))


def _rsub(do: Builder, x: Operand, y: Operand, alpha: float = 1) -> Operand:
    return _sub(do, y, x, alpha)


def _pow(do: Builder, x: Operand, exponent: Operand) -> Operand:
    """As in torch: some exponents do not use the math library."""
    if not isinstance(exponent, (int, float)):
        return do("pow", x, exponent)
    if exponent in _POWERS:
        return _POWERS[exponent](do, x)
    return do("pow", x, float(exponent))


_POWERS: Mapping[float, Callable[[Builder, Operand], Operand]] = {
    0: lambda do, x: do("where", do("eq", x, x), 1.0, 1.0),
    1: lambda do, x: x,
    2: lambda do, x: do("mul", x, x),
    3: lambda do, x: do("mul", do("mul", x, x), x),
    0.5: lambda do, x: do("sqrt", x),
    -0.5: lambda do, x: do("rsqrt", x),
    -1: lambda do, x: do("reciprocal", x),
    -2: lambda do, x: do("reciprocal", do("mul", x, x)),
}


def _clamp(do: Builder, x: Operand, low: Operand = None, high: Operand = None) -> Operand:
    if low is not None:
        x = do("maximum", x, low)
    return x if high is None else do("minimum", x, high)


def _divided(do: Builder, x: Operand, y: Operand, rounding_mode: str | None = None) -> Operand:
    result = do("div", x, y)
    if rounding_mode == "trunc":
        return do("trunc", result)
    if rounding_mode == "floor":
        # floor(x / y) may be off by one where the quotient was rounded.
        rest = do("fmod", x, y)
        result = do("div", do("sub", x, rest), y)
        other = do("and", do("ne", rest, 0.0), do("ne", do("lt", y, 0.0), do("lt", rest, 0.0)))
        result = do("where", other, do("sub", result, 1.0), result)
        return do("where", do("eq", y, 0.0), do("div", x, y), do("round", result))
    return result


def _remainder(do: Builder, x: Operand, y: Operand) -> Operand:
    rest = do("fmod", x, y)
    other = do("and", do("ne", rest, 0.0), do("ne", do("lt", rest, 0.0), do("lt", y, 0.0)))
    return do("where", other, do("add", rest, y), rest)


def _threshold(do: Builder, g: Operand, x: Operand, threshold: float) -> Operand:
    return do("where", do("le", x, threshold), 0.0, g)


def _shrunk(do: Builder, g: Operand, x: Operand, around: float) -> Operand:
    """The derivative of a function that is zero around zero."""
    inside = do("and", do("ge", x, -around), do("le", x, around))
    return do("where", inside, 0.0, g)


def _tanh_backward(do: Builder, g: Operand, y: Operand) -> Operand:
    return do("mul", g, do("sub", 1.0, do("mul", y, y)))


def _sigmoid_backward(do: Builder, g: Operand, y: Operand) -> Operand:
    return do("mul", g, do("mul", do("sub", 1.0, y), y))


def _xlogy(do: Builder, x: Operand, y: Operand) -> Operand:
    result = do("where", do("eq", x, 0.0), 0.0, do("mul", x, do("log", y)))
    return do("where", do("isnan", y), y, result)


def _logaddexp(do: Builder, x: Operand, y: Operand) -> Operand:
    most = do("maximum", x, y)
    split_ids = do("neg", do("abs", do("sub", x, y)))
    result = do("add", most, do("log1p", do("exp", split_ids)))
    same = do("and", do("isinf", x), do("eq", x, y))
    return do("where", same, x, result)


def _lerp(do: Builder, x: Operand, y: Operand, weight: Operand) -> Operand:
    split_ids = do("sub", y, x)
    near = do("add", x, do("mul", weight, split_ids))
    far = do("sub", y, do("mul", split_ids, do("sub", 1.0, weight)))
    return do("where", do("lt", do("abs", weight), 0.5), near, far)


def _softplus(do: Builder, x: Operand, beta: float = 1, threshold: float = 20) -> Operand:
    scaled = do("mul", x, beta)
    soft = do("div", do("log1p", do("exp", scaled)), beta)
    return do("where", do("gt", scaled, threshold), x, soft)


def _silu(do: Builder, x: Operand) -> Operand:
    return do("mul", x, do("sigmoid", x))


def _addcmul(do: Builder, x: Operand, y: Operand, z: Operand, value: float = 1) -> Operand:
    return _add(do, x, do("mul", y, z), value)


def _addcdiv(do: Builder, x: Operand, y: Operand, z: Operand, value: float = 1) -> Operand:
    return _add(do, x, do("div", y, z), value)


def _polygamma(do: Builder, order: int, x: Operand) -> Operand:
    if order == 0:
        return do("digamma", x)
    if order == 1:
        return do("trigamma", x)
    raise PlanRefused(f"polygamma of order {order}")


def _both(name: str) -> list[Any]:
    """The overloads of a binary operation with a tensor and a number, or with two tensors."""
    result = []
    for packet in (getattr(aten, name), getattr(prims, name)):
        overloads = [o for o in packet.overloads() if o in ("default", "Tensor", "Scalar")]
        result += [getattr(packet, o) for o in overloads]
    return result


_NAMES = (
    "sqrt rsqrt reciprocal neg abs exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan"
    " sinh cosh tanh asinh acosh atanh erf erfc lgamma digamma floor ceil round trunc frac sigmoid"
    " mul atan2 hypot copysign fmod fmax fmin maximum minimum lt le gt ge eq ne isnan isinf"
)
_SAME = _NAMES.split()
_RENAMED = {
    "sgn": "sign",
    "logical_and": "and",
    "logical_or": "or",
    "logical_xor": "xor",
    "logical_not": "not",
    "bitwise_and": "and",
    "bitwise_or": "or",
    "bitwise_xor": "xor",
    "bitwise_not": "not",
    "sign": "sign",
}
POINTWISE: Mapping[Any, Callable[..., Operand]] = known(
    {o: _plain(name) for name in _SAME for o in _both(name)}
    | {o: _plain(kind) for name, kind in _RENAMED.items() for o in _both(name)}
    | dict.fromkeys(_both("add"), _add)
    | dict.fromkeys(_both("sub"), _sub)
    | dict.fromkeys(_both("rsub"), _rsub)
    | dict.fromkeys(_both("div"), _divided)
    | dict.fromkeys(_both("remainder"), _remainder)
    | dict.fromkeys(_both("clamp_min"), lambda do, x, low: _clamp(do, x, low))
    | dict.fromkeys(_both("clamp_max"), lambda do, x, high: _clamp(do, x, None, high))
    | {
        aten.clamp.default: _clamp,
        aten.clamp.Tensor: _clamp,
        aten.div.Tensor_mode: _divided,
        aten.div.Scalar_mode: _divided,
        aten.pow.Tensor_Scalar: _pow,
        aten.pow.Tensor_Tensor: _plain("pow"),
        aten.pow.Scalar: _plain("pow"),
        aten.relu.default: lambda do, x: do("maximum", x, 0.0),
        aten.where.self: _plain("where"),
        aten.threshold_backward.default: _threshold,
        aten.hardshrink_backward.default: _shrunk,
        aten.softshrink_backward.default: _shrunk,
        aten.tanh_backward.default: _tanh_backward,
        aten.sigmoid_backward.default: _sigmoid_backward,
        aten.xlogy.Tensor: _xlogy,
        aten.logaddexp.default: _logaddexp,
        aten.lerp.Tensor: _lerp,
        aten.lerp.Scalar: _lerp,
        aten.softplus.default: _softplus,
        aten.silu.default: _silu,
        aten.polygamma.default: _polygamma,
        aten.addcmul.default: _addcmul,
        aten.addcdiv.default: _addcdiv,
        aten.masked_fill.Scalar: lambda do, x, mask, value: do("where", mask, value, x),
        aten.masked_fill.Tensor: lambda do, x, mask, value: do("where", mask, value, x),
    }
)
