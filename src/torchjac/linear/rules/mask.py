"""Mask: elements selected or written under a mask.

A known mask gives exact maps; a mask that depends on the input may select any element.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchjac._torch.operators import aten
from torchjac.linear.maps import (
    UNKNOWN,
    Factors,
    Shape,
    broadcast,
    dense,
    diagonal,
    index_map,
    product,
)
from torchjac.linear.rules.advanced_index import Slot, advanced_index, gather_map, scatter_map
from torchjac.linear.rules.index import index_slots, known_index, overwrite
from torchjac.linear.rules.registry import Local, NoRule, NotLinear, Op, Operand, rule


@rule(aten._unsafe_masked_index.default)
def masked_index(op: Op) -> Local:
    """`t[indices]` where a mask holds, a number elsewhere."""
    operand = op.only("self")
    slots = index_slots(op["indices"])
    if slots is None or op["fill"] != 0:
        raise NotLinear
    gathered = gather_map(advanced_index(operand.shape, _clamped(slots, operand.shape)))
    return [(operand, product(diagonal(op.shape, _mask_factors(op["mask"], op.shape)), gathered))]


@rule(aten._unsafe_masked_index_put_accumulate.default)
def masked_index_put(op: Op) -> Local:
    """Values added to `t[indices]` where a mask holds."""
    target, values = op["self"], op["values"]
    slots = index_slots(op["indices"])
    if slots is None:
        raise NoRule(op.name, "case", "a mask depends on the input")
    ix = advanced_index(target.shape, _clamped(slots, target.shape))
    spread = product(
        diagonal(ix.result_shape, _mask_factors(op["mask"], ix.result_shape)),
        broadcast(ix.result_shape, values.shape),
    )
    return overwrite(op, target, 1.0, values, product(scatter_map(ix, ix.result_shape), spread))


@rule(aten.masked_select.default)
def masked_select(op: Op) -> Local:
    """The elements under a mask, in order."""
    operand, known = op.only("self"), known_index(op["mask"])
    if known is None:
        return [(operand, dense(op.shape, operand.shape))]
    run = index_map(lambda t: t.masked_select(known), op.shape, operand.shape, False)
    return [(operand, run)]


@rule(aten.masked_scatter.default)
def masked_scatter(op: Op) -> Local:
    """Elements of a tensor, in order, written under a mask."""
    target, source, known = op["self"], op["source"], known_index(op["mask"])
    if known is None:
        return overwrite(op, target, UNKNOWN, source, dense(op.shape, source.shape))
    mask = known.expand(op.shape)

    def run(t: Tensor) -> Tensor:
        return torch.zeros(op.shape, dtype=t.dtype).masked_scatter(mask, t)

    untouched: Factors = (~mask).to(torch.float64)
    if target.linear and target.shape != op.shape:
        raise NoRule(op.name, "case", "a target that is broadcast")
    return overwrite(op, target, untouched, source, index_map(run, op.shape, source.shape, True))


@rule(aten.masked_scatter_backward.default)
def masked_scatter_backward(op: Op) -> Local:
    """The elements under a mask, in order, zeros after them."""
    operand, known = op.only("grad_output"), known_index(op["mask"])
    if known is None:
        return [(operand, dense(op.shape, operand.shape))]
    sizes = op.shape

    def run(t: Tensor) -> Tensor:
        selected = t.masked_select(known)
        rest = selected.new_zeros(max(math.prod(sizes) - len(selected), 0))
        return torch.cat([selected, rest])[: math.prod(sizes)].reshape(sizes)

    return [(operand, index_map(run, sizes, operand.shape, True))]


def _clamped(slots: list[Slot], shape: Shape) -> list[Slot]:
    """The slots clamped to the tensor: masked indices may be out of bounds."""
    return [
        s.clamp(0, max(shape[i] - 1, 0)) if isinstance(s, Tensor) else s
        for i, s in enumerate(slots)
    ]


def _mask_factors(mask: Operand, shape: Shape) -> Factors:
    known = known_index(mask)
    return UNKNOWN if known is None else known.to(torch.float64).expand(shape)
