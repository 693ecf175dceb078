"""Opaque: kernels that are linear in a cotangent, with unknown factors.

For each kernel, `TABLE` names the linear operand, and the axes of the operand and of each result
along which the local Jacobian is dense. All other axes are lanes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchjac._torch.operators import aten, known
from torchjac._torch.trace.op_traits import OpOverload
from torchjac.linear.maps import (
    UNKNOWN,
    LinearMap,
    Shape,
    axis_sum,
    broadcast,
    dense,
    diagonal,
    index_map,
    product,
    reshape,
    scatter,
)
from torchjac.linear.rules.registry import Local, NotLinear, Op, Operand, rule

Axes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Opaque:
    """The structure of an opaque kernel.

    Attributes:
        operand: Name of the linear operand.
        results: For each result, the dense axes of the result and of the operand; None if all are.
    """

    operand: str
    results: tuple[tuple[Axes, Axes] | None, ...]


# The cotangent of a query, (batch, head, position, feature), goes to the gradient of the query, of
# all keys of the same head, and of all values of the same head, feature by feature.
_ATTENTION = (((-1,), (-1,)), ((-2, -1), (-2, -1)), ((-2,), (-2,)))

# The gradient of the image mixes within a channel; that of the grid mixes channels at one point.
_GRID_2D = (((-2, -1), (-2, -1)), ((-1,), (1,)))
_GRID_3D = (((-3, -2, -1), (-3, -2, -1)), ((-1,), (1,)))

TABLE: dict[OpOverload, Opaque] = known(
    {
        aten._cdist_backward.default: Opaque("grad_output", (((-1,), (-1,)),)),
        aten._ctc_loss_backward.default: Opaque("grad", (((0, 2), ()),)),
        aten._ctc_loss_backward.Tensor: Opaque("grad", (((0, 2), ()),)),
        aten.grid_sampler_2d_backward.default: Opaque("grad_output", _GRID_2D),
        aten.grid_sampler_3d_backward.default: Opaque("grad_output", _GRID_3D),
        aten.multi_margin_loss_backward.default: Opaque("grad_output", (((-1,), ()),)),
        aten.multilabel_margin_loss_backward.default: Opaque("grad_output", (((-1,), ()),)),
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default: Opaque(
            "grad_out", _ATTENTION
        ),
        aten._scaled_dot_product_flash_attention_backward.default: Opaque("grad_out", _ATTENTION),
        aten._scaled_dot_product_cudnn_attention_backward.default: Opaque("grad_out", _ATTENTION),
        aten._scaled_dot_product_efficient_attention_backward.default: Opaque(
            "grad_out_", (*_ATTENTION, None)
        ),
        aten._scaled_dot_product_fused_attention_overrideable_backward.default: Opaque(
            "grad_out", (*_ATTENTION, None)
        ),
        aten._to_dense.default: Opaque("self", (None,)),
    }
)


@rule(*TABLE)
def opaque(op: Op) -> Local | tuple[Local, ...]:
    """Dense along the axes that the table names."""
    entry = TABLE[op.target]
    operand = op.only(entry.operand)
    value = op.node.meta["val"]
    if isinstance(value, Tensor):
        return [(operand, _dense_block(tuple(value.shape), operand.shape, entry.results[0]))]
    return tuple(
        [(operand, _dense_block(tuple(v.shape), operand.shape, mixed))]
        if isinstance(v, Tensor)
        else []
        for v, mixed in zip(value, entry.results, strict=True)
    )


def _dense_block(out: Shape, in_: Shape, mixed: tuple[Axes, Axes] | None) -> LinearMap:
    """Dense along axes if the other axes of result and operand agree; else along all axes."""
    if mixed is None:
        return dense(out, in_)
    axes = [
        {a % len(s) for a in signed} if s else set()
        for signed, s in zip(mixed, (out, in_), strict=True)
    ]
    lanes = [
        [size for i, size in enumerate(shape) if i not in which]
        for which, shape in zip(axes, (out, in_), strict=True)
    ]
    if lanes[0] != lanes[1]:  # a mean over everything, heads shared by several queries
        return dense(out, in_)
    return dense(out, in_, sorted(axes[0]), sorted(axes[1]))


@rule(aten._softmax_backward_data.default, aten._masked_softmax_backward.default)
def softmax_backward(op: Op) -> Local:
    """`y * (g - sum(y * g))`: dense along an axis, except for zeros of the softmax."""
    operand, y = op.only("grad_output"), diagonal(op.shape, op["output"].factors)
    axis = op["dim"]
    axes = None if axis is None or not op.shape else [axis]
    return [(operand, product(y, dense(op.shape, operand.shape, axes, axes), y))]


@rule(aten._log_softmax_backward_data.default)
def log_softmax_backward(op: Op) -> Local:
    """`g - exp(y) * sum(g)`: dense along an axis."""
    operand = op.only("grad_output")
    axes = [op["dim"]] if op.shape else None
    return [(operand, dense(op.shape, operand.shape, axes, axes))]


@rule(aten._pdist_backward.default)
def pdist_backward(op: Op) -> Local:
    """The cotangent of a distance goes to the two points of the pair."""
    operand = op.only("grad_output")
    count = op.shape[0]
    first, second = torch.triu_indices(count, count, 1)
    pair = torch.arange(len(first)).repeat(2)
    return [
        (
            operand,
            product(
                diagonal(op.shape, UNKNOWN),
                broadcast(op.shape, (count, 1)),
                reshape((count, 1), (count,)),
                scatter((count,), (len(pair),), 0, torch.cat([first, second])),
                index_map(lambda t: t.index_select(0, pair), (len(pair),), operand.shape, False),
            ),
        )
    ]


def _bags(op: Op) -> tuple[Tensor, Tensor] | None:
    """Row of the table and bag of each index, if both are equal for every input."""
    indices: Tensor | None = op["indices"].constant
    bags: Tensor | None = op["offset2bag"].constant
    if indices is None:
        return None
    offsets = _offsets(op)
    if offsets is not None:
        places = torch.arange(len(indices))
        bags = torch.searchsorted(offsets.cpu().contiguous(), places, right=True) - 1
    if bags is None or len(bags) != len(indices):
        return None
    return indices.cpu(), bags.cpu()


def _offsets(op: Op) -> Tensor | None:
    """The first index of each bag, or None if the argument is missing or unknown."""
    if "offsets" not in op:
        return None
    offsets: Tensor | None = op["offsets"].constant
    return offsets


@rule(aten._embedding_bag_backward.default, aten._embedding_bag_dense_backward.default)
def embedding_bag_backward(op: Op) -> Local:
    """The cotangent of a bag goes to the rows in the bag; columns are lanes."""
    operand = op.only("grad")
    rows_and_bags = _bags(op)
    if rows_and_bags is None:
        return [(operand, dense(op.shape, operand.shape, [0], [0]))]
    indices, bags = rows_and_bags
    entries = (len(bags), *operand.shape[1:])
    return [
        (
            operand,
            product(
                diagonal(op.shape, UNKNOWN),
                scatter(op.shape, entries, 0, indices),
                index_map(lambda t: t.index_select(0, bags), entries, operand.shape, False),
            ),
        )
    ]


@rule(aten._embedding_bag_per_sample_weights_backward.default)
def embedding_bag_weights_backward(op: Op) -> Local:
    """The gradient of a sample's weight: the cotangent of its bag, summed over columns."""
    operand = op.only("grad")
    rows_and_bags = _bags(op)
    if rows_and_bags is None:
        return [(operand, dense(op.shape, operand.shape))]
    _, bags = rows_and_bags
    total = axis_sum(operand.shape, [1])
    unsigned = diagonal(operand.shape, UNKNOWN)
    gather = index_map(lambda t: t.index_select(0, bags), op.shape, total.shape_out, False)
    return [(operand, product(gather, total, unsigned))]


@rule(aten.mkldnn_rnn_layer_backward.default)
def recurrent_layer_backward(op: Op) -> tuple[Local, ...]:
    """A layer of a recurrent network, (time, batch, feature): samples do not mix."""
    operands = [o for o in map(op.__getitem__, _OF_RECURRENT) if isinstance(o, Operand)]
    if any(o not in operands for o in op.linear):
        raise NotLinear
    linear = [o for o in operands if o.linear]

    def mixed(shape: Shape, operand: Operand) -> LinearMap:
        theirs = operand.shape
        if len(shape) < 2 or shape[-2] != theirs[-2]:
            return dense(shape, theirs)
        axes = [[i for i in range(len(s)) if i != len(s) - 2] for s in (shape, theirs)]
        return dense(shape, theirs, *axes)

    # Of seven results the second to the fifth are gradients of weights.
    return tuple(
        [
            (o, mixed(tuple(v.shape), o) if k in (0, 5, 6) else dense(tuple(v.shape), o.shape))
            for o in linear
        ]
        for k, v in enumerate(op.node.meta["val"])
    )


_OF_RECURRENT = ("grad_output", "grad_hy", "grad_cy")


@rule(aten._segment_reduce_backward.default)
def segment_reduce_backward(op: Op) -> Local:
    """The cotangent of a segment goes to its elements."""
    operand, axis = op.only("grad"), op["axis"]
    lengths, offsets = op["lengths"], op["offsets"]
    segments: Operand = lengths if lengths is not None else offsets
    known = segments.constant
    # Lengths of several rows of segments differ from row to row.
    if known is None or known.dim() != 1:
        return [(operand, dense(op.shape, operand.shape, [axis], [axis]))]
    counts = known.cpu() if lengths is not None else known.cpu().diff()
    which = torch.repeat_interleave(torch.arange(len(counts)), counts)
    if len(which) != op.shape[axis]:
        return [(operand, dense(op.shape, operand.shape, [axis], [axis]))]
    gather = index_map(lambda t: t.index_select(axis, which), op.shape, operand.shape, False)
    return [(operand, product(diagonal(op.shape, UNKNOWN), gather))]
