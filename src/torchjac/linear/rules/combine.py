"""Combine: sums, and results that take each element from one of several tensors."""

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
    found: Local = []
    for key, factor in (("self", first), ("other", second)):
        operand = op[key]
        if isinstance(operand, Operand) and operand.linear:
            found += scaled(op, operand, factor)
        elif not (operand.zero if isinstance(operand, Operand) else operand == 0):
            raise NotLinear
    return found


def chosen(op: Op, *, data: tuple[str, ...]) -> Local:
    """The operation run on one operand at a time, zeros in the place of the others.

    Args:
        op: An operation that only moves elements of its data operands.
        data: Names of those operands (tensors, or a list of them).
    """
    operands = [o for name in data for o in _listed(op[name])]
    if any(o.linear and o not in operands for o in op.linear):
        raise NotLinear
    if any(not o.linear and not vanishes(o) for o in operands):
        raise NotLinear
    rest = {k: _plain(v) for k, v in op.others(*data).items()}
    if any(v is None and isinstance(op[k], Operand) for k, v in rest.items()):
        raise NoRule(op.name, "case", "an index depends on the input")

    def run_on(which: Operand, t: Tensor) -> Tensor:
        def filled(o: Any) -> Any:
            if o is which:
                return t
            return torch.zeros((), dtype=t.dtype).expand(o.shape) if isinstance(o, Operand) else o

        given = {
            name: [filled(o) for o in op[name]] if isinstance(op[name], list) else filled(op[name])
            for name in data
        }
        made: Tensor = op.target(**given, **rest)
        return made

    return [
        (o, index_map(partial(run_on, o), op.shape, o.shape, True)) for o in operands if o.linear
    ]


@rule(aten.cat.default, aten.stack.default, aten.block_diag.default)
def cat(op: Op) -> Local | Concat:
    """Concatenates tensors along an axis, along a new axis, or as blocks of a diagonal."""
    operands = op["tensors"]
    if len(operands) > _MANY and op.target is not aten.block_diag.default:
        return _concat(op)
    return chosen(op, data=("tensors",))


def _concat(op: Op) -> Concat:
    axis = op["dim"] % len(op.shape)
    size = (1,) if op.target is aten.stack.default else ()
    parts = []
    for operand in op["tensors"]:
        if not operand.linear and not vanishes(operand):
            raise NotLinear
        if operand.shape != (0,) or len(op.shape) == 1:  # cat skips those, whatever the others are
            parts.append((operand, (*operand.shape[:axis], *size, *operand.shape[axis:])))
    return Concat(axis, tuple(parts))


_MANY = 8  # operands: more are one `Concat`, in place of one map each


@rule(aten.slice_scatter.default, aten.select_scatter.default, aten.diagonal_scatter.default)
def scattered_view(op: Op) -> Local:
    """A tensor with part of it replaced by another."""
    return chosen(op, data=("self", "src"))


@rule(aten.copy.default)
def copy(op: Op) -> Local:
    """Every element replaced by those of another tensor."""
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
    found: Local = []
    for name in ("self", "end"):
        operand = op[name]
        if operand.linear:
            factor = op.response(operand)
            if isinstance(weight, (int, float)):
                factor = float(weight if name == "end" else 1 - weight)
            found += scaled(op, operand, factor)
        elif not operand.zero:
            raise NotLinear
    return found


def vanishes(operand: Operand) -> bool:
    """Whether an operand that is not linear adds nothing: it is zero, or nobody may read it."""
    return operand.zero or operand.node.target in UNINITIALIZED


def _listed(value: Any) -> list[Operand]:
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, Operand)]


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value.constant if isinstance(value, Operand) else value
