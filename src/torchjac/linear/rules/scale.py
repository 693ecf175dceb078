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
from torchjac.linear.rules.registry import Local, NotLinear, Op, Operand, Vanishing, rule


def scaled(op: Op, operand: Operand, factors: Factors) -> Local:
    """The operand, broadcast to the result, times factors."""
    made = diagonal(op.shape, factors)
    if operand.shape != op.shape:
        made = product(made, broadcast(op.shape, operand.shape))
    return [(operand, made)]


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(op: Op) -> Local:
    """`a * b`; where both are linear the product still vanishes with them."""
    first, second = op["self"], op["other"]
    if len(op.linear) > 1:
        return vanishing(op)
    operand, other = (first, second) if _is_linear(first) else (second, first)
    return scaled(op, operand, _factor(other, op.shape))


def vanishing(op: Op) -> Local:
    """A result that is zero where every linear operand is, element by element."""
    return Vanishing(part for operand in op.linear for part in scaled(op, operand, UNKNOWN))


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
    """One over each factor; only of powers of two is it an exact number."""
    made = torch.where(factors == 0, UNKNOWN, 1 / factors)
    rounded = is_float32(made) & (torch.frexp(factors).mantissa.abs() != 0.5)
    return torch.where(rounded, torch.nextafter(made, 2 * made), made)


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
    """The same values (or their conjugates) in another tensor."""
    operand = op.only("self")
    kind, before = op.node.meta["val"].dtype, operand.node.meta["val"].dtype
    exact = kind.is_complex or (kind.is_floating_point and not before.is_complex)
    if op.target in (aten._conj.default, aten._conj_physical.default):
        exact = not kind.is_complex
    if not exact:  # a cast to integers, to bool, or to the real part: zero stays zero
        made = scaled(op, operand, UNKNOWN)
        return made if kind.is_floating_point or kind.is_complex else Vanishing(made)
    return scaled(op, operand, -1.0 if op.target is aten._neg_view.default else 1.0)


@rule(aten.where.self)
def where(op: Op) -> Local:
    """Elements of two tensors; a condition may depend on the cotangent as well."""
    condition = op["condition"]
    mask = condition.constant
    found: Local = scaled(op, condition, UNKNOWN) if condition.linear else []
    for name, keeps in (("self", True), ("other", False)):
        operand = op[name]
        factors: Factors = UNKNOWN
        if mask is not None:
            factors = (mask if keeps else ~mask).cpu().to(torch.float64).expand(op.shape)
        if operand.linear:
            found += scaled(op, operand, op.response(operand, factors))
        elif not operand.zero:
            raise NotLinear
    return Vanishing(found) if condition.linear else found


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
    """The backward of a pointwise function: the cotangent times something of that element.

    The factors are what the operation gives for a cotangent of ones.
    """
    (name,) = [n for n in ("grad_output", "grad_out", "grad") if n in op]
    operand = op.only(name)
    constants = op.constants()
    made = operand.node.meta["val"]
    if constants is None or not made.is_floating_point():
        return scaled(op, operand, op.response(operand))
    with real_values():
        ones = torch.ones(operand.shape, dtype=made.dtype, device=device_of(operand.node))
        factors: Tensor = op.target(**{name: ones}, **constants)
    return scaled(op, operand, op.response(operand, _masked(op, factors)))


def _masked(op: Op, factors: Tensor) -> Factors:
    """Numbers that a saved tensor went into hold for zeros only."""
    found = factors.detach().cpu().to(torch.float64)
    return found.masked_fill(found != 0, UNKNOWN)


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
    found = scaled(op, added, 1.0) if added.linear else []
    for operand, other in ((first, second), (second, first)):
        if operand.linear:
            known = not (other.linear or divides)
            factors = times(other.known.expand(op.shape), value) if known else UNKNOWN
            found += scaled(op, operand, op.response(operand, factors))
    return found


@rule(
    aten.xlogy.Tensor,
    aten.xlogy.Scalar_Other,
    aten.special_xlog1py.default,
    aten.special_xlog1py.other_scalar,
    aten.ldexp.Tensor,
)
def times_logarithm(op: Op) -> Local:
    """`a log(b)`, `a 2 ** b`: zero where the first operand is, whatever the second is."""
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
    """Zero where the first operand is, whatever the second is; only the first is linear."""
    return Vanishing(scaled(op, op.only("self"), UNKNOWN))


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
