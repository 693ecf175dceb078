"""Scale: every element times a factor that does not depend on the cotangent."""

from __future__ import annotations

import torch
from torch import Tensor

from torchjac._torch.modes import real_values
from torchjac._torch.operators import aten
from torchjac.linear.known_values import device_of
from torchjac.linear.maps import (
    UNKNOWN,
    Factors,
    broadcast,
    diagonal,
    map_unexpanded,
    product,
    times,
)
from torchjac.linear.maps.factors import is_float32
from torchjac.linear.rules.registry import Local, NotLinear, Op, Operand, ZeroPreserving, rule


def scaled(op: Op, operand: Operand, factors: Factors) -> Local:
    """The operand, broadcast to the result, times factors."""
    map_ = diagonal(op.shape, factors)
    if operand.shape != op.shape:
        map_ = product(map_, broadcast(op.shape, operand.shape))
    return [(operand, map_)]


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(op: Op) -> Local:
    """`a * b`; if both are linear, the product is zero where either operand is."""
    first, second = op["self"], op["other"]
    if len(op.linear) > 1:
        return zero_preserving(op)
    operand, other = (first, second) if _is_linear(first) else (second, first)
    return scaled(op, operand, _factor(other, op.shape))


def zero_preserving(op: Op) -> Local:
    """The dependence of an elementwise operation with f(0) = 0 on its linear operands."""
    return ZeroPreserving(part for operand in op.linear for part in scaled(op, operand, UNKNOWN))


@rule(aten.div.Tensor, aten.div.Scalar)
def div(op: Op) -> Local:
    """`a / b` with b not linear."""
    operand, other = op.only("self"), op["other"]
    if isinstance(other, Operand):
        inverse: Factors = map_unexpanded(_inverse, other.known.expand(op.shape))
    else:
        inverse = float(_inverse(torch.tensor(float(other), dtype=torch.float64)))
    return scaled(op, operand, op.response(operand, inverse))


def _inverse(factors: Tensor) -> Tensor:
    """The reciprocal of each factor; exact for powers of two only."""
    inverse = torch.where(factors == 0, UNKNOWN, 1 / factors)
    rounded = is_float32(inverse) & (torch.frexp(factors).mantissa.abs() != 0.5)
    return torch.where(rounded, torch.nextafter(inverse, 2 * inverse), inverse)


@rule(aten.neg.default)
def neg(op: Op) -> Local:
    """`-a`."""
    return scaled(op, op.only("self"), -1.0)


@rule(
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten._to_copy.default,
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
    aten.positive.default,
    aten.contiguous.default,
    aten._conj.default,
    aten._conj_physical.default,
    aten._neg_view.default,
    aten.resolve_conj.default,
    aten.resolve_neg.default,
)
def same(op: Op) -> Local:
    """A copy, alias, cast or conjugate."""
    operand = op.only("self")
    kind, before = op.node.meta["val"].dtype, operand.node.meta["val"].dtype
    exact = kind.is_complex or (kind.is_floating_point and not before.is_complex)
    if op.target in (aten._conj.default, aten._conj_physical.default):
        exact = not kind.is_complex
    if not exact:  # a cast to an integer, to bool, or to the real part: f(0) = 0
        local = scaled(op, operand, UNKNOWN)
        return local if kind.is_floating_point or kind.is_complex else ZeroPreserving(local)
    return scaled(op, operand, -1.0 if op.target is aten._neg_view.default else 1.0)


@rule(aten.where.self)
def where(op: Op) -> Local:
    """Elements of two tensors; the condition may depend on the cotangent."""
    condition = op["condition"]
    mask = condition.constant
    local: Local = scaled(op, condition, UNKNOWN) if condition.linear else []
    for name, keeps in (("self", True), ("other", False)):
        operand = op[name]
        factors: Factors = UNKNOWN
        if mask is not None:
            factors = (mask if keeps else ~mask).cpu().to(torch.float64).expand(op.shape)
        if operand.linear:
            local += scaled(op, operand, op.response(operand, factors))
        elif not operand.zero:
            raise NotLinear
    return ZeroPreserving(local) if condition.linear else local


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(op: Op) -> Local:
    """Elements replaced by zero under a mask that is not linear."""
    operand, mask = op.only("self"), op["mask"]
    value = op["value"]
    if not (value.zero if isinstance(value, Operand) else value == 0):
        raise NotLinear
    constant = mask.constant
    if constant is None:
        return scaled(op, operand, op.response(operand))
    return scaled(op, operand, (~constant).cpu().to(torch.float64).expand(op.shape))


@rule(
    aten.tanh_backward.default,
    aten.sigmoid_backward.default,
    aten.threshold_backward.default,
    aten.gelu_backward.default,
    aten.silu_backward.default,
    aten.elu_backward.default,
    aten.softplus_backward.default,
    aten.hardtanh_backward.default,
    aten.hardsigmoid_backward.default,
    aten.hardswish_backward.default,
    aten.leaky_relu_backward.default,
    aten.log_sigmoid_backward.default,
    aten.logit_backward.default,
    aten.mish_backward.default,
    aten.softshrink_backward.default,
    aten.hardshrink_backward.default,
    aten.rrelu_with_noise_backward.default,
    aten.native_dropout_backward.default,
    aten.mse_loss_backward.default,
    aten.smooth_l1_loss_backward.default,
    aten.huber_loss_backward.default,
    aten.soft_margin_loss_backward.default,
    aten.binary_cross_entropy_backward.default,
)
def pointwise_backward(op: Op) -> Local:
    """The backward of a pointwise function: the cotangent times a factor per element.

    The factors are the result of the operation for a cotangent of ones.
    """
    (name,) = [n for n in ("grad_output", "grad_out", "grad") if n in op]
    operand = op.only(name)
    constants = op.constants()
    meta = operand.node.meta["val"]
    if constants is None or not meta.is_floating_point():
        return scaled(op, operand, op.response(operand))
    with real_values():
        ones = torch.ones(operand.shape, dtype=meta.dtype, device=device_of(operand.node))
        factors: Tensor = op.target(**{name: ones}, **constants)
    return scaled(op, operand, op.response(operand, _zeros_only(op, factors)))


def _zeros_only(op: Op, factors: Tensor) -> Factors:
    """Factors with every nonzero unknown: they depend on a saved tensor, only zeros are certain."""
    numbers = factors.detach().cpu().to(torch.float64)
    return numbers.masked_fill(numbers != 0, UNKNOWN)


def _is_linear(value: object) -> bool:
    return isinstance(value, Operand) and value.linear


def _factor(value: object, shape: tuple[int, ...]) -> Factors:
    if isinstance(value, Operand):
        return value.factors.expand(shape)
    if isinstance(value, complex):
        return UNKNOWN if value else 0.0
    return float(value)  # type: ignore[arg-type]


@rule(aten.addcmul.default, aten.addcdiv.default)
def addcmul(op: Op) -> Local:
    """`self + value * a * b`, `self + value * a / b`."""
    added, first, second = op["self"], op["tensor1"], op["tensor2"]
    value = _factor(op["value"], op.shape)
    divides = op.target is aten.addcdiv.default
    if divides and second.linear:
        raise NotLinear
    if not (first.linear or second.linear or first.zero or second.zero):
        raise NotLinear
    if not (added.linear or added.zero):
        raise NotLinear
    local = scaled(op, added, 1.0) if added.linear else []
    for operand, other in ((first, second), (second, first)):
        if operand.linear:
            known = not (other.linear or divides)
            factors = times(other.known.expand(op.shape), value) if known else UNKNOWN
            local += scaled(op, operand, op.response(operand, factors))
    return local


@rule(
    aten.xlogy.Tensor,
    aten.xlogy.Scalar_Other,
    aten.special_xlog1py.default,
    aten.special_xlog1py.other_scalar,
    aten.ldexp.Tensor,
)
def times_logarithm(op: Op) -> Local:
    """`a log(b)`, `a 2 ** b`: linear in a."""
    operand = op.only("self")
    return scaled(op, operand, op.response(operand))


@rule(
    aten.fmod.Tensor,
    aten.fmod.Scalar,
    aten.remainder.Tensor,
    aten.remainder.Scalar,
    aten.div.Tensor_mode,
    aten.div.Scalar_mode,
    aten.copysign.Tensor,
    aten.copysign.Scalar,
)
def times_function(op: Op) -> Local:
    """f(0, b) = 0 for every b; only the first operand is linear."""
    return ZeroPreserving(scaled(op, op.only("self"), UNKNOWN))


@rule(aten.polar.default)
def polar(op: Op) -> Local:
    """`abs * exp(i angle)` with an angle that is not linear."""
    operand = op.only("abs")
    return scaled(op, operand, op.response(operand))


@rule(aten.fill.Scalar, aten.fill.Tensor)
def fill(op: Op) -> Local:
    """One value everywhere."""
    value = op["value"]
    if isinstance(value, Operand) and value.linear:
        return scaled(op, value, 1.0)
    if value.zero if isinstance(value, Operand) else value == 0:
        return []
    raise NotLinear
