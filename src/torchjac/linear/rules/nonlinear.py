"""Nonlinear: functions that a custom backward may apply to a cotangent.

The backward of a custom `autograd.Function` may be nonlinear in the cotangent: a clipped gradient,
a sign, a mask by the cotangent itself. If f(0) = 0, the result is zero where the cotangent is, and
the pattern is known (`ZeroPreserving`). If f(0) is nonzero, every row of J may be nonzero
(`NotLinear`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torchjac._torch.operators import aten
from torchjac.linear.maps import UNKNOWN, LinearMap, dense, product, reshape
from torchjac.linear.rules.registry import Local, NotLinear, Op, Operand, ZeroPreserving, rule
from torchjac.linear.rules.scale import scaled, zero_preserving


def nonlinear(*operations: Any) -> Callable[[Callable[[Op], Local]], Callable[[Op], Local]]:
    """Registers a rule for the pattern of operations with f(0) = 0, not for their derivative."""

    def register(function: Callable[[Op], Local]) -> Callable[[Op], Local]:
        @functools.wraps(function)
        def zero_preserving_rule(op: Op) -> Local:
            return ZeroPreserving(function(op))

        rule(*operations)(zero_preserving_rule)
        return zero_preserving_rule

    return register


@nonlinear(
    aten.abs.default,
    aten.asin.default,
    aten.asinh.default,
    aten.atan.default,
    aten.atanh.default,
    aten.ceil.default,
    aten.celu.default,
    aten.elu.default,
    aten.erf.default,
    aten.erfinv.default,
    aten.expm1.default,
    aten.floor.default,
    aten.frac.default,
    aten.gelu.default,
    aten.hardshrink.default,
    aten.hardswish.default,
    aten.isinf.default,
    aten.isnan.default,
    aten.leaky_relu.default,
    aten.log1p.default,
    aten.mish.default,
    aten.nan_to_num.default,
    aten.relu.default,
    aten.round.decimals,
    aten.round.default,
    aten.selu.default,
    aten.sgn.default,
    aten.sign.default,
    aten.silu.default,
    aten.sin.default,
    aten.sinh.default,
    aten.softshrink.default,
    aten.sqrt.default,
    aten.square.default,
    aten.tan.default,
    aten.tanh.default,
    aten.trunc.default,
)
def zero_at_zero(op: Op) -> Local:
    """f(0) = 0, element by element."""
    return scaled(op, op.only("self"), UNKNOWN)


@nonlinear(
    aten.acos.default,
    aten.acosh.default,
    aten.all.default,
    aten.all.dim,
    aten.all.dims,
    aten.argmax.default,
    aten.argmin.default,
    aten.argsort.default,
    aten.argsort.stable,
    aten.bernoulli.default,
    aten.bitwise_not.default,
    aten.cos.default,
    aten.cosh.default,
    aten.digamma.default,
    aten.eq.Scalar,
    aten.eq.Tensor,
    aten.erfc.default,
    aten.exp.default,
    aten.exp2.default,
    aten.ge.Scalar,
    aten.ge.Tensor,
    aten.i0.default,
    aten.isfinite.default,
    aten.le.Scalar,
    aten.le.Tensor,
    aten.linalg_cholesky_ex.default,
    aten.linalg_inv_ex.default,
    aten.linalg_matrix_exp.default,
    aten.lgamma.default,
    aten.log.default,
    aten.log10.default,
    aten.log2.default,
    aten.log_sigmoid_forward.default,
    aten.logcumsumexp.default,
    aten.logical_not.default,
    aten.logit.default,
    aten.logsumexp.default,
    aten.pow.Scalar,
    aten.pow.Tensor_Tensor,
    aten.reciprocal.default,
    aten.rsqrt.default,
    aten.searchsorted.Tensor,
    aten.sigmoid.default,
    aten.signbit.default,
    aten.sinc.default,
    aten.softplus.default,
    aten.sort.default,
    aten.sort.stable,
    aten.topk.default,
    aten._log_softmax.default,
    aten._softmax.default,
)
def not_linear(op: Op) -> Local:
    """f(0) is nonzero, at least for some arguments, or the result is an index."""
    raise NotLinear


@nonlinear(
    aten.fmax.default,
    aten.fmin.default,
    aten.gt.Scalar,
    aten.gt.Tensor,
    aten.hypot.default,
    aten.logical_or.default,
    aten.logical_xor.default,
    aten.lt.Scalar,
    aten.lt.Tensor,
    aten.maximum.default,
    aten.minimum.default,
    aten.ne.Scalar,
    aten.ne.Tensor,
    aten.bitwise_or.Tensor,
    aten.bitwise_xor.Tensor,
)
def zero_at_zeros(op: Op) -> Local:
    """f(0, 0) = 0: an operand that is not linear must be zero."""
    for name in ("self", "other"):
        value = op[name]
        zero = value.linear or value.zero if isinstance(value, Operand) else value == 0
        if not zero:
            return _comparison(op)
    return zero_preserving(op)


def _comparison(op: Op) -> Local:
    """`self > c` is false at zero where c is positive, `self < c` where c is negative."""
    limit, name = op["other"], op.name
    if isinstance(limit, Operand) or not isinstance(op["self"], Operand):
        raise NotLinear
    if (name == "aten::gt" and limit > 0) or (name == "aten::lt" and limit < 0):
        return zero_preserving(op)
    raise NotLinear


@nonlinear(aten.logical_and.default, aten.bitwise_and.Tensor)
def logical_and(op: Op) -> Local:
    """False where either operand is false."""
    return zero_preserving(op)


@nonlinear(
    aten.clamp.default,
    aten.clamp.Tensor,
    aten.clamp_min.default,
    aten.clamp_min.Tensor,
    aten.clamp_max.default,
    aten.clamp_max.Tensor,
    aten.hardtanh.default,
)
def clamp(op: Op) -> Local:
    """f(0) = 0 if zero lies within the limits."""
    for name, limit in op.arguments.items():
        if name.startswith("min") and not _at_most(limit, 0, 1):
            raise NotLinear
        if name.startswith("max") and not _at_most(limit, 0, -1):
            raise NotLinear
    return scaled(op, op.only("self"), UNKNOWN)


def _at_most(limit: object, bound: float, sign: float) -> bool:
    if limit is None:
        return True
    if isinstance(limit, Operand):
        return not limit.linear and bool((sign * limit.known <= bound).all())
    return sign * limit <= bound  # type: ignore[operator]


@nonlinear(aten.threshold.default)
def threshold(op: Op) -> Local:
    """Elements above the threshold, a constant elsewhere."""
    if op["threshold"] >= 0 and op["value"] != 0:
        raise NotLinear
    return scaled(op, op.only("self"), UNKNOWN)


@nonlinear(aten.pow.Tensor_Scalar)
def power(op: Op) -> Local:
    """A positive power of zero is zero."""
    exponent = op["exponent"]
    if isinstance(exponent, complex) or exponent <= 0:
        raise NotLinear
    return scaled(op, op.only("self"), UNKNOWN if exponent != 1 else 1.0)


@nonlinear(
    aten.amax.default,
    aten.amin.default,
    aten.any.default,
    aten.any.dim,
    aten.any.dims,
    aten.count_nonzero.dim_IntList,
    aten.cumprod.default,
    aten.linalg_vector_norm.default,
    aten.max.default,
    aten.min.default,
    aten.norm.Scalar,
    aten.norm.ScalarOpt_dim,
    aten.prod.default,
    aten.prod.dim_int,
    aten.std.correction,
    aten.var.correction,
)
def zero_reduction(op: Op) -> Local:
    """A reduction along axes with f(0, ..., 0) = 0."""
    order = op["ord"] if op.target is aten.linalg_vector_norm.default else 1
    if op.target in (aten.norm.Scalar, aten.norm.ScalarOpt_dim):
        order = op["p"]
    if order is not None and order <= 0:
        raise NotLinear  # a limit at zero
    operand = op.only("self")
    if 0 in operand.shape:
        raise NotLinear  # the empty product is one
    return [(operand, dense_along(op.shape, operand.shape, op.arguments.get("dim")))]


def dense_along(
    shape_out: Sequence[int], shape_in: Sequence[int], axes: Sequence[int] | int | None
) -> LinearMap:
    """Dense along axes of the argument; the result has the axes with any size, or drops them."""
    axis_list = [axes] if isinstance(axes, int) else list(axes or range(len(shape_in)))
    if not shape_in:
        return dense(shape_out, shape_in)
    summed = {a % len(shape_in) for a in axis_list}
    lanes = [1 if i in summed else s for i, s in enumerate(shape_in)]
    if len(shape_out) == len(shape_in):
        return dense(shape_out, shape_in, sorted(summed), sorted(summed))
    return product(
        reshape(shape_out, lanes), dense(lanes, shape_in, sorted(summed), sorted(summed))
    )
