"""Index: elements picked or placed by tensors of indices.

Indices that are known make exact maps. Indices that depend on the input (argmax, sort, a gather by
data) may be any of their axis: all-to-all along it, lanes elsewhere.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchjac._torch.operators import aten
from torchjac.linear.maps import (
    UNKNOWN,
    Factors,
    LinearMap,
    Shape,
    broadcast,
    dense,
    diagonal,
    index_map,
    product,
    reshape,
)
from torchjac.linear.rules.combine import vanishes
from torchjac.linear.rules.places import Places, Slot, places, put, spared, take
from torchjac.linear.rules.registry import Local, NoRule, NotLinear, Op, Operand, rule


@rule(aten.index.Tensor, aten._unsafe_index.Tensor)
def index(op: Op) -> Local:
    """`t[indices]`."""
    operand = op.only("self")
    slots = _slots(op["indices"])
    if slots is None:
        raise NoRule(op.name, "case", "a mask depends on the input")
    return [(operand, take(places(operand.shape, slots)))]


@rule(aten.index_select.default)
def index_select(op: Op) -> Local:
    """Slices along an axis."""
    operand = op.only("self")
    shape = operand.shape or (1,)
    slots = [*[None] * (op["dim"] % len(shape)), _slot(op["index"], flat=True)]
    taken = take(places(shape, slots))
    return [
        (operand, product(reshape(op.shape, taken.shape_out), taken, reshape(shape, operand.shape)))
    ]


@rule(aten.embedding.default)
def embedding(op: Op) -> Local:
    """Rows of a table."""
    operand = op.only("weight")
    return [(operand, take(places(operand.shape, [_slot(op["indices"])])))]


@rule(aten.take.default)
def take_flat(op: Op) -> Local:
    """Elements by their position in the flat tensor."""
    operand = op.only("self")
    flat: Shape = (math.prod(operand.shape),)
    return [
        (operand, product(take(places(flat, [_slot(op["index"])])), reshape(flat, operand.shape)))
    ]


@rule(aten.gather.default)
def gather(op: Op) -> Local:
    """Elements by their index along an axis, which may differ from lane to lane."""
    operand, where = op.only("self"), op["index"]
    shape, mine = operand.shape or (1,), where.shape or (1,)
    axis = op["dim"] % len(shape)
    small = tuple(shape[i] if i == axis else mine[i] for i in range(len(shape)))
    p, order = laned(_known(where), small, mine, axis)
    back = [order.index(i) for i in range(len(order))]
    taken = take(p)
    placed = index_map(lambda t: t.permute(back), mine, taken.shape_out, False)
    first = (_cut(small, shape), reshape(shape, operand.shape))
    return [(operand, product(reshape(op.shape, mine), placed, taken, *first))]


@rule(aten.scatter.src, aten.scatter_add.default, aten.scatter.reduce, aten.scatter_reduce.two)
def scatter(op: Op) -> Local:
    """Elements written or added to places along an axis."""
    adds = op.target is not aten.scatter.src
    if "reduce" in op and (op["reduce"] not in ("add", "sum")):
        raise NoRule(op.name, "case", "not a sum")
    if "include_self" in op and not op["include_self"]:
        raise NoRule(op.name, "case", "what is not added to is lost")
    target, source, where = op["self"], op["src"], op["index"]
    shape, mine = op.shape or (1,), where.shape or (1,)
    p, order = laned(_known(where), shape, mine, op["dim"] % len(shape))
    placed = put(p, tuple(mine[i] for i in order), replace=not adds)
    big = source.shape or (1,)
    chosen = product(
        reshape(op.shape, shape),
        placed,
        index_map(lambda t: t.permute(order), placed.shape_in, mine, False),
        _cut(mine, big),
        reshape(big, source.shape),
    )
    return _written(op, target, 1.0 if adds else spared(p), source, chosen)


@rule(aten.scatter.value)
def scatter_value(op: Op) -> Local:
    """A number written to places along an axis."""
    where = op["index"]
    shape, mine = op.shape or (1,), where.shape or (1,)
    p, _ = laned(_known(where), shape, mine, op["dim"] % len(shape))
    return _written(op, op["self"], spared(p), op["value"], None)


@rule(aten.index_add.default, aten.index_copy.default)
def index_add(op: Op) -> Local:
    """Slices added to, or written over, slices along an axis."""
    shape = op.shape or (1,)
    axis = op["dim"] % len(shape)
    adds = op.target is aten.index_add.default
    source = op["source"]
    p = places(shape, [*[None] * axis, _slot(op["index"], flat=True)])
    placed = put(p, p.taken, replace=not adds)
    alpha = float(op["alpha"]) if adds else 1.0
    chosen = product(
        reshape(op.shape, shape),
        diagonal(shape, alpha),
        placed,
        reshape(p.taken, source.shape),
    )
    return _written(op, op["self"], 1.0 if adds else spared(p), source, chosen)


@rule(aten.index_fill.int_Scalar, aten.index_fill.int_Tensor)
def index_fill(op: Op) -> Local:
    """A number written over slices along an axis."""
    shape = op.shape or (1,)
    slot = _slot(op["index"], flat=True)
    if isinstance(slot, Tensor):  # writing it once is enough
        size = (shape[op["dim"]],)
        (slot,) = places(size, [slot]).flat.bincount().nonzero().unbind(1)
    p = places(shape, [*[None] * (op["dim"] % len(shape)), slot])
    return _written(
        op, op["self"], spared(p), op["value"], product(reshape(op.shape, shape), put(p, ()))
    )


@rule(aten.index_put.default, aten._unsafe_index_put.default)
def index_put(op: Op) -> Local:
    """Values written or added to `t[indices]`."""
    target, values, adds = op["self"], op["values"], bool(op["accumulate"])
    slots = _slots(op["indices"])
    if slots is None:  # a mask that depends on the input
        if len(values.shape) and math.prod(values.shape) != 1:
            chosen = dense(op.shape, values.shape)
        else:
            one = broadcast(op.shape, ())
            chosen = product(diagonal(op.shape, UNKNOWN), one, reshape((), values.shape))
        return _written(op, target, 1.0 if adds else UNKNOWN, values, chosen)
    p = places(target.shape, slots)
    return _written(
        op, target, 1.0 if adds else spared(p), values, put(p, values.shape, replace=not adds)
    )


@rule(aten.put.default)
def put_flat(op: Op) -> Local:
    """Values written or added by their position in the flat tensor."""
    target, source, adds = op["self"], op["source"], bool(op["accumulate"])
    p = places((math.prod(op.shape),), [_slot(op["index"])])
    placed = put(p, source.shape, replace=not adds)
    kept = 1.0 if adds else spared(p)
    if isinstance(kept, Tensor):
        kept = kept.reshape(op.shape)
    return _written(op, target, kept, source, product(reshape(op.shape, p.shape), placed))


@rule(aten.embedding_dense_backward.default)
def embedding_dense_backward(op: Op) -> Local:
    """Rows of the cotangent added up by index; the padding row gets none."""
    operand, where = op.only("grad_output"), op["indices"]
    rows, padding = op["num_weights"], op["padding_idx"]
    known = _known(where)
    shape = operand.shape
    p = places(op.shape, [_slot(where)])
    if known is None:
        kept = torch.ones(rows, dtype=torch.float64)
        if 0 <= padding < rows:
            kept[padding] = 0.0
        factors = kept[:, None].expand(op.shape)
        return [(operand, product(diagonal(op.shape, factors), put(p, shape)))]
    flat = known.reshape(-1)
    scale = torch.ones(flat.numel(), dtype=torch.float64)
    if op["scale_grad_by_freq"] and flat.numel():
        scale = 1 / torch.bincount(flat)[flat].to(torch.float64)
    scale = torch.where(flat == padding, 0.0, scale).reshape(*known.shape, 1).expand(shape)
    return [(operand, product(put(p, shape), diagonal(shape, scale)))]


@rule(aten._unsafe_masked_index.default)
def masked_index(op: Op) -> Local:
    """`t[indices]` where a mask holds, a number elsewhere."""
    operand = op.only("self")
    slots = _slots(op["indices"])
    if slots is None or op["fill"] != 0:
        raise NotLinear
    taken = take(places(operand.shape, _within(slots, operand.shape)))
    return [(operand, product(diagonal(op.shape, _mask(op["mask"], op.shape)), taken))]


@rule(aten._unsafe_masked_index_put_accumulate.default)
def masked_index_put(op: Op) -> Local:
    """Values added to `t[indices]` where a mask holds."""
    target, values = op["self"], op["values"]
    slots = _slots(op["indices"])
    if slots is None:
        raise NoRule(op.name, "case", "a mask depends on the input")
    p = places(target.shape, _within(slots, target.shape))
    spread = product(
        diagonal(p.taken, _mask(op["mask"], p.taken)), broadcast(p.taken, values.shape)
    )
    return _written(op, target, 1.0, values, product(put(p, p.taken), spread))


@rule(aten.masked_select.default)
def masked_select(op: Op) -> Local:
    """The elements under a mask, in order."""
    operand, known = op.only("self"), _known(op["mask"])
    if known is None:
        return [(operand, dense(op.shape, operand.shape))]
    run = index_map(lambda t: t.masked_select(known), op.shape, operand.shape, False)
    return [(operand, run)]


@rule(aten.masked_scatter.default)
def masked_scatter(op: Op) -> Local:
    """Elements of a tensor, in order, written under a mask."""
    target, source, known = op["self"], op["source"], _known(op["mask"])
    if known is None:
        return _written(op, target, UNKNOWN, source, dense(op.shape, source.shape))
    whole = known.expand(op.shape)

    def run(t: Tensor) -> Tensor:
        return torch.zeros(op.shape, dtype=t.dtype).masked_scatter(whole, t)

    kept: Factors = (~whole).to(torch.float64)
    if target.linear and target.shape != op.shape:
        raise NoRule(op.name, "case", "a target that is broadcast")
    return _written(op, target, kept, source, index_map(run, op.shape, source.shape, True))


@rule(aten.masked_scatter_backward.default)
def masked_scatter_backward(op: Op) -> Local:
    """The elements under a mask, in order, zeros after them."""
    operand, known = op.only("grad_output"), _known(op["mask"])
    if known is None:
        return [(operand, dense(op.shape, operand.shape))]
    sizes = op.shape

    def run(t: Tensor) -> Tensor:
        taken = t.masked_select(known)
        rest = taken.new_zeros(max(math.prod(sizes) - len(taken), 0))
        return torch.cat([taken, rest])[: math.prod(sizes)].reshape(sizes)

    return [(operand, index_map(run, sizes, operand.shape, True))]


def _written(
    op: Op, target: Operand, kept: Factors, source: Any, placed: LinearMap | None
) -> Local:
    """A target with factors for what is left of it, and what was put there."""
    found: Local = []
    if any(o is not target and o is not source for o in op.linear):
        raise NotLinear  # an index cannot depend on the cotangent
    if target.linear:
        found.append(
            (
                target,
                diagonal(op.shape, kept if isinstance(kept, float) else kept.reshape(op.shape)),
            )
        )
    elif not vanishes(target):
        raise NotLinear
    if isinstance(source, Operand) and source.linear:
        assert placed is not None
        found.append((source, placed))
    elif not (source.zero if isinstance(source, Operand) else source == 0):
        raise NotLinear
    return found


def _known(where: Operand) -> Tensor | None:
    """Indices or a mask that are the same for every input."""
    if where.linear:
        raise NotLinear
    value = where.constant
    return None if value is None else value.cpu()


def _slot(where: Operand, *, flat: bool = False) -> Slot:
    known = _known(where)
    if known is None:
        return (math.prod(where.shape),) if flat else where.shape
    return known.reshape(-1) if flat else known


def _slots(listed: list[Any]) -> list[Slot] | None:
    """A slot for each index; None if a mask is not known."""
    found: list[Slot] = []
    for where in listed:
        if not isinstance(where, Operand):
            found.append(None)
            continue
        slot = _slot(where)
        if isinstance(slot, tuple) and where.node.meta["val"].dtype in (torch.bool, torch.uint8):
            return None
        found.append(slot)
    return found


def laned(known: Tensor | None, shape: Shape, mine: Shape, axis: int) -> tuple[Places, list[int]]:
    """Slots for an index along one axis that has as many axes as the tensor.

    Axes along which it does not change are lanes.

    Args:
        known: The index, if it is known.
        shape: Shape of the tensor.
        mine: Shape of the index.
        axis: The axis.

    Returns:
        The slots, and the axes of the index in the order in which `t[slots]` has them.
    """
    if known is not None:
        known = known.reshape(mine) if known.numel() else None
    lanes = [
        i
        for i in range(len(shape))
        if i != axis and shape[i] == mine[i] and (known is None or _same(known, i))
    ]
    varied = [i for i in range(len(shape)) if i not in lanes]
    sizes = tuple(mine[i] for i in varied)
    slots: list[Slot] = [None] * len(shape)
    for k, i in enumerate(varied):
        if i != axis:
            slots[i] = torch.arange(mine[i]).reshape(-1, *[1] * (len(varied) - k - 1))
        elif known is None:
            slots[i] = sizes
        else:
            once = tuple(slice(1) if j in lanes else slice(None) for j in range(len(mine)))
            slots[i] = known[once].reshape(sizes)
    p = places(shape, slots)
    return p, [*lanes[: p.at], *varied, *lanes[p.at :]]


def _same(known: Tensor, axis: int) -> bool:
    """Whether indices do not change along an axis."""
    return known.shape[axis] == 1 or bool(
        (known == known.narrow(axis, 0, min(1, known.shape[axis]))).all()
    )


def _cut(small: Shape, shape: Shape) -> LinearMap:
    """The first elements along each axis."""
    if small == shape:
        return reshape(small, shape)
    return index_map(lambda t: t[tuple(map(slice, small))], small, shape, False)


def _within(slots: list[Slot], shape: Shape) -> list[Slot]:
    """Indices that a mask leaves out may lie outside."""
    return [
        s.clamp(0, max(shape[i] - 1, 0)) if isinstance(s, Tensor) else s
        for i, s in enumerate(slots)
    ]


def _mask(mask: Operand, shape: Shape) -> Factors:
    known = _known(mask)
    return UNKNOWN if known is None else known.to(torch.float64).expand(shape)
