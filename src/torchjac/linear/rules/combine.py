"""Combine: sums, and operations that assemble a result from elements of several tensors."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchjac._torch.operators import aten
from torchjac.linear.known_values import UNINITIALIZED
from torchjac.linear.maps import broadcast, index_map
from torchjac.linear.rules.registry import Concat, Local, NoRule, NotLinear, Op, Operand, rule
from torchjac.linear.rules.scale import scaled


@rule(
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.rsub.Scalar,
    aten.rsub.Tensor,
    aten.add.Scalar,
    aten.sub.Scalar,
)
def add(op: Op) -> Local:
    """`a + alpha * b`, `a - alpha * b`, `b - alpha * a`."""
    alpha = op["alpha"]
    alpha = 1.0 if alpha is None else float(alpha)
    name = op.name
    first, second = {
        "aten::add": (1.0, alpha),
        "aten::sub": (1.0, -alpha),
        "aten::rsub": (-alpha, 1.0),
    }[name]
    local: Local = []
    for key, factor in (("self", first), ("other", second)):
        operand = op[key]
        if isinstance(operand, Operand) and operand.linear:
            local += scaled(op, operand, factor)
        elif not (operand.zero if isinstance(operand, Operand) else operand == 0):
            raise NotLinear
    return local


def one_operand_at_a_time(op: Op, *, data: tuple[str, ...]) -> Local:
    """The maps of an operation that only moves elements of its data operands.

    Each map runs the operation on one operand, with zeros in place of all other operands.

    Args:
        op: The operation.
        data: Names of the data operands (tensors or lists of tensors).
    """
    operands = [o for name in data for o in _operands_in(op[name])]
    if any(o.linear and o not in operands for o in op.linear):
        raise NotLinear
    if any(not o.linear and not contributes_nothing(o) for o in operands):
        raise NotLinear
    rest = {k: _constants_in(v) for k, v in op.arguments_without(*data).items()}
    if any(v is None and isinstance(op[k], Operand) for k, v in rest.items()):
        raise NoRule(op.name, "case", "an index depends on the input")

    def run_on(operand: Operand, t: Tensor) -> Tensor:
        def zeros_elsewhere(o: Any) -> Any:
            if o is operand:
                return t
            return torch.zeros((), dtype=t.dtype).expand(o.shape) if isinstance(o, Operand) else o

        data_arguments = {
            name: [zeros_elsewhere(o) for o in op[name]]
            if isinstance(op[name], list)
            else zeros_elsewhere(op[name])
            for name in data
        }
        result: Tensor = op.target(**data_arguments, **rest)
        return result

    return [
        (o, index_map(partial(run_on, o), op.shape, o.shape, True)) for o in operands if o.linear
    ]


@rule(aten.cat.default, aten.stack.default, aten.block_diag.default)
def cat(op: Op) -> Local | Concat:
    """Concatenates tensors along an axis, along a new axis, or as blocks of a diagonal."""
    operands = op["tensors"]
    if len(operands) > _MANY and op.target is not aten.block_diag.default:
        return _concat(op)
    return one_operand_at_a_time(op, data=("tensors",))


def _concat(op: Op) -> Concat:
    axis = op["dim"] % len(op.shape)
    size = (1,) if op.target is aten.stack.default else ()
    parts = []
    for operand in op["tensors"]:
        if not operand.linear and not contributes_nothing(operand):
            raise NotLinear
        if operand.shape != (0,) or len(op.shape) == 1:  # cat skips empty vectors
            parts.append((operand, (*operand.shape[:axis], *size, *operand.shape[axis:])))
    return Concat(axis, tuple(parts))


_MANY = 8  # operands: above this, one `Concat` replaces the maps


@rule(aten.slice_scatter.default, aten.select_scatter.default, aten.diagonal_scatter.default)
def scattered_view(op: Op) -> Local:
    """A tensor with part of it replaced by another."""
    return one_operand_at_a_time(op, data=("self", "src"))


@rule(aten.copy.default)
def copy(op: Op) -> Local:
    """Every element replaced by an element of another tensor."""
    source = op["src"]
    if not source.linear:
        if source.zero:
            return []
        raise NotLinear
    return [(source, broadcast(op.shape, source.shape))]


@rule(aten.lerp.Scalar, aten.lerp.Tensor)
def lerp(op: Op) -> Local:
    """`a + w (b - a)`."""
    weight = op["weight"]
    if isinstance(weight, Operand) and weight.linear:
        raise NotLinear
    local: Local = []
    for name in ("self", "end"):
        operand = op[name]
        if operand.linear:
            factor = op.response(operand)
            if isinstance(weight, (int, float)):
                factor = float(weight if name == "end" else 1 - weight)
            local += scaled(op, operand, factor)
        elif not operand.zero:
            raise NotLinear
    return local


def contributes_nothing(operand: Operand) -> bool:
    """Whether a nonlinear operand is zero or uninitialized memory, which no program may read."""
    return operand.zero or operand.node.target in UNINITIALIZED


def _operands_in(value: Any) -> list[Operand]:
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, Operand)]


def _constants_in(value: Any) -> Any:
    if isinstance(value, list):
        return [_constants_in(v) for v in value]
    return value.constant if isinstance(value, Operand) else value
