"""Index: elements gathered or scattered by tensors of indices.

Known indices give exact maps. Indices that depend on the input (argmax, sort, a gather by data) may
be any position on their axis: dense along the axis, lanes elsewhere.
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
from torchjac.linear.rules.advanced_index import (
    AdvancedIndex,
    Slot,
    advanced_index,
    gather_map,
    scatter_map,
    untouched_factors,
)
from torchjac.linear.rules.combine import contributes_nothing
from torchjac.linear.rules.registry import Local, NoRule, NotLinear, Op, Operand, rule


@rule(aten.index.Tensor, aten._unsafe_index.Tensor)
def index(op: Op) -> Local:
    """`t[indices]`."""
    operand = op.only("self")
    slots = index_slots(op["indices"])
    if slots is None:
        raise NoRule(op.name, "case", "a mask depends on the input")
    return [(operand, gather_map(advanced_index(operand.shape, slots)))]


@rule(aten.index_select.default)
def index_select(op: Op) -> Local:
    """Slices along an axis."""
    operand = op.only("self")
    shape = operand.shape or (1,)
    slots = [*[None] * (op["dim"] % len(shape)), _slot(op["index"], flat=True)]
    gathered = gather_map(advanced_index(shape, slots))
    return [
        (
            operand,
            product(reshape(op.shape, gathered.shape_out), gathered, reshape(shape, operand.shape)),
        )
    ]


@rule(aten.embedding.default)
def embedding(op: Op) -> Local:
    """Rows of a table."""
    operand = op.only("weight")
    return [(operand, gather_map(advanced_index(operand.shape, [_slot(op["indices"])])))]


@rule(aten.take.default)
def take_flat(op: Op) -> Local:
    """Elements by their position in the flat tensor."""
    operand = op.only("self")
    flat: Shape = (math.prod(operand.shape),)
    return [
        (
            operand,
            product(
                gather_map(advanced_index(flat, [_slot(op["index"])])), reshape(flat, operand.shape)
            ),
        )
    ]


@rule(aten.gather.default)
def gather(op: Op) -> Local:
    """Elements by indices along an axis; the indices may differ between lanes."""
    operand, indices = op.only("self"), op["index"]
    shape, index_shape = operand.shape or (1,), indices.shape or (1,)
    axis = op["dim"] % len(shape)
    source_shape = tuple(shape[i] if i == axis else index_shape[i] for i in range(len(shape)))
    ix, order = index_along_axis(known_index(indices), source_shape, index_shape, axis)
    inverse = [order.index(i) for i in range(len(order))]
    gathered = gather_map(ix)
    restored = index_map(lambda t: t.permute(inverse), index_shape, gathered.shape_out, False)
    first = (_leading_part(source_shape, shape), reshape(shape, operand.shape))
    return [(operand, product(reshape(op.shape, index_shape), restored, gathered, *first))]


@rule(aten.scatter.src, aten.scatter_add.default, aten.scatter.reduce, aten.scatter_reduce.two)
def scatter(op: Op) -> Local:
    """Elements written, or added, at indices along an axis."""
    adds = op.target is not aten.scatter.src
    if "reduce" in op and (op["reduce"] not in ("add", "sum")):
        raise NoRule(op.name, "case", "not a sum")
    if "include_self" in op and not op["include_self"]:
        raise NoRule(op.name, "case", "what is not added to is lost")
    target, source, indices = op["self"], op["src"], op["index"]
    shape, index_shape = op.shape or (1,), indices.shape or (1,)
    ix, order = index_along_axis(known_index(indices), shape, index_shape, op["dim"] % len(shape))
    scattered = scatter_map(ix, tuple(index_shape[i] for i in order), replace=not adds)
    source_shape = source.shape or (1,)
    source_map = product(
        reshape(op.shape, shape),
        scattered,
        index_map(lambda t: t.permute(order), scattered.shape_in, index_shape, False),
        _leading_part(index_shape, source_shape),
        reshape(source_shape, source.shape),
    )
    return overwrite(op, target, 1.0 if adds else untouched_factors(ix), source, source_map)


@rule(aten.scatter.value)
def scatter_value(op: Op) -> Local:
    """A number written at indices along an axis."""
    indices = op["index"]
    shape, index_shape = op.shape or (1,), indices.shape or (1,)
    ix, _ = index_along_axis(known_index(indices), shape, index_shape, op["dim"] % len(shape))
    return overwrite(op, op["self"], untouched_factors(ix), op["value"], None)


@rule(aten.index_add.default, aten.index_copy.default)
def index_add(op: Op) -> Local:
    """Slices added to, or written over, slices along an axis."""
    shape = op.shape or (1,)
    axis = op["dim"] % len(shape)
    adds = op.target is aten.index_add.default
    source = op["source"]
    ix = advanced_index(shape, [*[None] * axis, _slot(op["index"], flat=True)])
    scattered = scatter_map(ix, ix.result_shape, replace=not adds)
    alpha = float(op["alpha"]) if adds else 1.0
    source_map = product(
        reshape(op.shape, shape),
        diagonal(shape, alpha),
        scattered,
        reshape(ix.result_shape, source.shape),
    )
    return overwrite(op, op["self"], 1.0 if adds else untouched_factors(ix), source, source_map)


@rule(aten.index_fill.int_Scalar, aten.index_fill.int_Tensor)
def index_fill(op: Op) -> Local:
    """A number written over slices along an axis."""
    shape = op.shape or (1,)
    slot = _slot(op["index"], flat=True)
    if isinstance(slot, Tensor):  # without repeated indices
        size = (shape[op["dim"]],)
        (slot,) = advanced_index(size, [slot]).flat_index.bincount().nonzero().unbind(1)
    ix = advanced_index(shape, [*[None] * (op["dim"] % len(shape)), slot])
    return overwrite(
        op,
        op["self"],
        untouched_factors(ix),
        op["value"],
        product(reshape(op.shape, shape), scatter_map(ix, ())),
    )


@rule(aten.index_put.default, aten._unsafe_index_put.default)
def index_put(op: Op) -> Local:
    """Values written or added to `t[indices]`."""
    target, values, adds = op["self"], op["values"], bool(op["accumulate"])
    slots = index_slots(op["indices"])
    if slots is None:  # a mask that depends on the input
        if len(values.shape) and math.prod(values.shape) != 1:
            values_map = dense(op.shape, values.shape)
        else:
            one = broadcast(op.shape, ())
            values_map = product(diagonal(op.shape, UNKNOWN), one, reshape((), values.shape))
        return overwrite(op, target, 1.0 if adds else UNKNOWN, values, values_map)
    ix = advanced_index(target.shape, slots)
    return overwrite(
        op,
        target,
        1.0 if adds else untouched_factors(ix),
        values,
        scatter_map(ix, values.shape, replace=not adds),
    )


@rule(aten.put.default)
def put_flat(op: Op) -> Local:
    """Values written or added by their position in the flat tensor."""
    target, source, adds = op["self"], op["source"], bool(op["accumulate"])
    ix = advanced_index((math.prod(op.shape),), [_slot(op["index"])])
    scattered = scatter_map(ix, source.shape, replace=not adds)
    untouched = 1.0 if adds else untouched_factors(ix)
    if isinstance(untouched, Tensor):
        untouched = untouched.reshape(op.shape)
    return overwrite(op, target, untouched, source, product(reshape(op.shape, ix.shape), scattered))


@rule(aten.embedding_dense_backward.default)
def embedding_dense_backward(op: Op) -> Local:
    """Rows of the cotangent added up by index; the gradient of the padding row is zero."""
    operand, indices = op.only("grad_output"), op["indices"]
    rows, padding = op["num_weights"], op["padding_idx"]
    known = known_index(indices)
    shape = operand.shape
    ix = advanced_index(op.shape, [_slot(indices)])
    if known is None:
        not_padding = torch.ones(rows, dtype=torch.float64)
        if 0 <= padding < rows:
            not_padding[padding] = 0.0
        factors = not_padding[:, None].expand(op.shape)
        return [(operand, product(diagonal(op.shape, factors), scatter_map(ix, shape)))]
    flat = known.reshape(-1)
    scale = torch.ones(flat.numel(), dtype=torch.float64)
    if op["scale_grad_by_freq"] and flat.numel():
        scale = 1 / torch.bincount(flat)[flat].to(torch.float64)
    scale = torch.where(flat == padding, 0.0, scale).reshape(*known.shape, 1).expand(shape)
    return [(operand, product(scatter_map(ix, shape), diagonal(shape, scale)))]


def overwrite(
    op: Op, target: Operand, untouched: Factors, source: Any, source_map: LinearMap | None
) -> Local:
    """The local Jacobian of an operation that writes values into a target.

    Args:
        op: The operation.
        target: The tensor that is written to.
        untouched: Factor of each element of the target: 0 if overwritten.
        source: The values, a tensor or a number.
        source_map: Map from the values to the result; None if they are no tensor.
    """
    local: Local = []
    if any(o is not target and o is not source for o in op.linear):
        raise NotLinear  # an index cannot depend on the cotangent
    if target.linear:
        local.append(
            (
                target,
                diagonal(
                    op.shape,
                    untouched if isinstance(untouched, float) else untouched.reshape(op.shape),
                ),
            )
        )
    elif not contributes_nothing(target):
        raise NotLinear
    if isinstance(source, Operand) and source.linear:
        assert source_map is not None
        local.append((source, source_map))
    elif not (source.zero if isinstance(source, Operand) else source == 0):
        raise NotLinear
    return local


def known_index(indices: Operand) -> Tensor | None:
    """The value of an index or a mask if it is equal for every input, else None."""
    if indices.linear:
        raise NotLinear
    value = indices.constant
    return None if value is None else value.cpu()


def _slot(indices: Operand, *, flat: bool = False) -> Slot:
    known = known_index(indices)
    if known is None:
        return (math.prod(indices.shape),) if flat else indices.shape
    return known.reshape(-1) if flat else known


def index_slots(indices: list[Any]) -> list[Slot] | None:
    """A slot for each index; None if a mask is unknown."""
    slots: list[Slot] = []
    for index in indices:
        if not isinstance(index, Operand):
            slots.append(None)
            continue
        slot = _slot(index)
        if isinstance(slot, tuple) and index.node.meta["val"].dtype in (torch.bool, torch.uint8):
            return None
        slots.append(slot)
    return slots


def index_along_axis(
    known: Tensor | None, shape: Shape, index_shape: Shape, axis: int
) -> tuple[AdvancedIndex, list[int]]:
    """Slots for an index of the same rank as the tensor, which acts along one axis (`gather`).

    Axes along which the index does not change are lanes.

    Args:
        known: The index, or None if it is unknown.
        shape: Shape of the tensor.
        index_shape: Shape of the index.
        axis: The axis.

    Returns:
        The slots, and the axes of the index in their order in `t[slots]`.
    """
    if known is not None:
        known = known.reshape(index_shape) if known.numel() else None
    lanes = [
        i
        for i in range(len(shape))
        if i != axis and shape[i] == index_shape[i] and (known is None or _is_repeated(known, i))
    ]
    varying = [i for i in range(len(shape)) if i not in lanes]
    sizes = tuple(index_shape[i] for i in varying)
    slots: list[Slot] = [None] * len(shape)
    for k, i in enumerate(varying):
        if i != axis:
            slots[i] = torch.arange(index_shape[i]).reshape(-1, *[1] * (len(varying) - k - 1))
        elif known is None:
            slots[i] = sizes
        else:
            once = tuple(slice(1) if j in lanes else slice(None) for j in range(len(index_shape)))
            slots[i] = known[once].reshape(sizes)
    ix = advanced_index(shape, slots)
    return ix, [*lanes[: ix.position], *varying, *lanes[ix.position :]]


def _is_repeated(known: Tensor, axis: int) -> bool:
    """Whether indices are equal along an axis."""
    return known.shape[axis] == 1 or bool(
        (known == known.narrow(axis, 0, min(1, known.shape[axis]))).all()
    )


def _leading_part(sizes: Shape, shape: Shape) -> LinearMap:
    """The first elements along each axis, as many as `sizes` says."""
    if sizes == shape:
        return reshape(sizes, shape)
    return index_map(lambda t: t[tuple(map(slice, sizes))], sizes, shape, False)
