"""Contract: products with a tensor that does not depend on the cotangent, summed along axes.

A contraction is a broadcast, a scaling and a sum. Broadcast axes have stride 0 and cost nothing,
so a batch or a Kronecker factor is never materialized.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchjac._torch.operators import aten
from torchjac.linear.maps import (
    LinearMap,
    Shape,
    axis_sum,
    broadcast,
    diagonal,
    index_map,
    product,
    reshape,
    times,
)
from torchjac.linear.rules.registry import Local, NotLinear, Op, Operand, rule


def contraction(
    operand: Operand, axes: str, other: Operand, other_axes: str, out_axes: str, factor: float = 1.0
) -> LinearMap:
    """`einsum(axes, other_axes -> out_axes)` as a map of the first operand.

    Letters name axes, as in `torch.einsum`; each operand has a letter once.
    """
    size = dict(zip(axes, operand.shape, strict=True)) | dict(
        zip(other_axes, other.shape, strict=True)
    )
    letters = out_axes + "".join(a for a in dict.fromkeys(axes + other_axes) if a not in out_axes)
    full: Shape = tuple(size[a] for a in letters)
    order = [axes.index(a) for a in letters if a in axes]
    aligned_shape = tuple(size[a] if a in axes else 1 for a in letters)
    aligned = index_map(
        lambda t: t.permute(order).reshape(aligned_shape), aligned_shape, operand.shape, False
    )
    factors = other.factors.permute([other_axes.index(a) for a in letters if a in other_axes])
    factors = factors.reshape(tuple(size[a] if a in other_axes else 1 for a in letters))
    out = tuple(size[a] for a in out_axes)
    return product(
        diagonal(out, factor),
        axis_sum(full, range(len(out_axes), len(letters))),
        diagonal(full, factors.expand(full)),
        broadcast(full, aligned_shape),
        aligned,
    )


def _bilinear(op: Op, names: tuple[str, str], axes: tuple[str, str], out: str) -> Local:
    """A contraction of two operands, one of them linear."""
    first, second = op[names[0]], op[names[1]]
    if first.linear and second.linear:
        raise NotLinear
    if first.linear:
        return [(first, contraction(first, axes[0], second, axes[1], out))]
    return [(second, contraction(second, axes[1], first, axes[0], out))]


@rule(aten.mm.default)
def mm(op: Op) -> Local:
    """Matrix times matrix."""
    return _bilinear(op, ("self", "mat2"), ("ik", "kj"), "ij")


@rule(aten.bmm.default)
def bmm(op: Op) -> Local:
    """Batches of matrix times matrix."""
    return _bilinear(op, ("self", "mat2"), ("bik", "bkj"), "bij")


@rule(aten.mv.default)
def mv(op: Op) -> Local:
    """Matrix times vector."""
    return _bilinear(op, ("self", "vec"), ("ik", "k"), "i")


@rule(aten.dot.default, aten.vdot.default)
def dot(op: Op) -> Local:
    """Vector times vector."""
    return _bilinear(op, ("self", [*op.arguments][1]), ("k", "k"), "")


@rule(
    aten.addmm.default,
    aten.addmv.default,
    aten.baddbmm.default,
    aten.addbmm.default,
    aten.addr.default,
)
def addmm(op: Op) -> Local:
    """`beta * self + alpha * a @ b`."""
    names, axes, out = {
        "aten::addmm": (("mat1", "mat2"), ("ik", "kj"), "ij"),
        "aten::addmv": (("mat", "vec"), ("ik", "k"), "i"),
        "aten::baddbmm": (("batch1", "batch2"), ("bik", "bkj"), "bij"),
        "aten::addbmm": (("batch1", "batch2"), ("bik", "bkj"), "ij"),
        "aten::addr": (("vec1", "vec2"), ("i", "j"), "ij"),
    }[op.name]
    local: Local = []
    beta, alpha = float(op["beta"]), float(op["alpha"])
    added = op["self"]
    if added.linear:
        broadcast_map = broadcast(op.shape, added.shape)
        local.append((added, product(diagonal(op.shape, beta), broadcast_map)))
    elif beta != 0 and not added.zero:
        raise NotLinear
    if op[names[0]].linear or op[names[1]].linear:
        for operand, map_ in _bilinear(op, names, axes, out):
            local.append((operand, product(diagonal(op.shape, alpha), map_)))
    elif not (op[names[0]].zero or op[names[1]].zero):
        raise NotLinear
    return local


@rule(aten._trilinear.default)
def trilinear(op: Op) -> Local:
    """The product of three operands with new axes of size 1, summed along axes."""
    if len(op.linear) > 1:
        raise NotLinear
    expanded = {f"i{k}": op[f"expand{k}"] for k in (1, 2, 3)}
    rank = len(op["i1"].shape) + len(expanded["i1"])
    axes = {name: sorted(a % rank for a in axes_) for name, axes_ in expanded.items()}

    def unsqueezed(name: str, t: Tensor) -> Tensor:
        for axis in axes[name]:
            t = t.unsqueeze(axis)
        return t

    (name,) = [n for n in expanded if op[n].linear]
    constant = [unsqueezed(n, op[n].factors) for n in expanded if n != name]
    operand = op[name]
    aligned = unsqueezed(name, torch.empty(operand.shape, device="meta")).shape
    sizes = zip(aligned, *(t.shape for t in constant), strict=True)
    full = tuple(next((s for s in some if s != 1), 1) for some in sizes)
    factors = times(constant[0].expand(full), constant[1].expand(full))
    total = axis_sum(full, op["sumdim"])
    return [
        (
            operand,
            product(
                total,
                diagonal(full, factors),
                broadcast(full, aligned),
                reshape(aligned, operand.shape),
            ),
        )
    ]
