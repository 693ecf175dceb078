"""Move: elements go to other positions. No formulas: the operation itself runs on positions."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchjac._torch.operators import aten
from torchjac.linear.maps import UNKNOWN, axis_sum, broadcast, diagonal, index_map, product
from torchjac.linear.maps import reshape as reshaped
from torchjac.linear.maps import scatter as scattered
from torchjac.linear.rules.registry import Local, NotLinear, Op, Operand, rule


def movement(op: Op, name: str = "self", *, fills: bool = False) -> Local:
    """The index map of an operation that only moves elements of one operand."""
    operand = op.only(name)
    rest = op.arguments_without(name)

    def run(t: Tensor) -> Tensor:
        result: Tensor = op.target(**{name: t}, **rest)
        return result

    return [(operand, index_map(run, op.shape, operand.shape, fills))]


@rule(
    aten.view.default,
    aten.view_copy.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten._reshape_alias.default,
    aten._reshape_copy.default,
    aten._reshape_alias_copy.default,
)
def view(op: Op) -> Local:
    """The same elements in another shape."""
    operand = op.only("self")
    return [(operand, reshaped(op.shape, operand.shape))]


@rule(
    aten.t.default,
    aten.t_copy.default,
    aten.transpose.int,
    aten.transpose_copy.int,
    aten.permute.default,
    aten.permute_copy.default,
    aten.movedim.int,
    aten.expand.default,
    aten.expand_copy.default,
    aten.unsqueeze.default,
    aten.unsqueeze_copy.default,
    aten.squeeze.default,
    aten.squeeze_copy.default,
    aten.squeeze.dim,
    aten.squeeze_copy.dim,
    aten.squeeze.dims,
    aten.squeeze_copy.dims,
    aten.slice.Tensor,
    aten.slice_copy.Tensor,
    aten.select.int,
    aten.select_copy.int,
    aten.narrow.default,
    aten.narrow_copy.default,
    aten.diagonal.default,
    aten.diagonal_copy.default,
    aten.unfold.default,
    aten.unfold_copy.default,
    aten.flip.default,
    aten.roll.default,
    aten.rot90.default,
    aten.repeat.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.channel_shuffle.default,
)
def rearranged(op: Op) -> Local:
    """Elements of the argument in another order, some left out or repeated."""
    return movement(op)


@rule(aten.tril.default, aten.triu.default, aten.diag_embed.default)
def masked(op: Op) -> Local:
    """Elements of the argument, zeros elsewhere."""
    return movement(op, fills=True)


@rule(aten.slice_backward.default, aten.select_backward.default, aten.diagonal_backward.default)
def embedded(op: Op) -> Local:
    """The backward of a view: elements at their position in the base, zeros elsewhere."""
    return movement(op, "grad_output", fills=True)


@rule(aten.trace.default)
def trace(op: Op) -> Local:
    """The sum of the diagonal."""
    operand = op.only("self")
    count = min(operand.shape)
    diagonal_ = index_map(lambda t: t.diagonal(), (count,), operand.shape, False)
    return [(operand, product(axis_sum((count,), [0]), diagonal_))]


@rule(aten.unfold_backward.default)
def unfold_backward(op: Op) -> Local:
    """Windows along an axis added to the elements that they were read from."""
    operand, shape = op.only("grad_in"), op.shape
    if not shape:
        return [(operand, product(reshaped((), ()), axis_sum(operand.shape, [0])))]
    axis = op["dim"] % len(shape)
    positions = torch.arange(shape[axis]).unfold(0, op["size"], op["step"]).reshape(-1)
    windows_shape = (*shape[:axis], *operand.shape[axis : axis + 1], op["size"], *shape[axis + 1 :])
    windows = index_map(lambda t: t.movedim(-1, axis + 1), windows_shape, operand.shape, False)
    flat = (*shape[:axis], len(positions), *shape[axis + 1 :])
    scatter_add = scattered(shape, flat, axis, positions)
    return [(operand, product(scatter_add, reshaped(flat, windows_shape), windows))]


@rule(aten.constant_pad_nd.default)
def constant_pad(op: Op) -> Local:
    """Padding with zeros; negative padding crops."""
    if op["value"] not in (0, None):
        raise NotLinear
    return movement(op, fills=True)


@rule(
    aten.split.Tensor,
    aten.split_copy.Tensor,
    aten.split_with_sizes.default,
    aten.split_with_sizes_copy.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
    aten.unbind.int,
    aten.unbind_copy.int,
    aten.chunk.default,
    aten.unsafe_chunk.default,
)
def split(op: Op) -> tuple[Local, ...]:
    """Parts of the argument, each a result of its own."""
    operand = op.only("self")
    rest = op.arguments_without("self")

    def run(k: int, t: Tensor) -> Tensor:
        parts: list[Tensor] = op.target(t, **rest)
        return parts[k]

    return tuple(
        [(operand, index_map(partial(run, k), tuple(v.shape), operand.shape, False))]
        for k, v in enumerate(op.node.meta["val"])
    )


@rule(aten.as_strided.default, aten.as_strided_copy.default)
def as_strided(op: Op) -> Local:
    """Elements by their cell in storage."""
    operand = op.only("self")
    storage = Storage(operand)
    picked = storage.places(op["size"], op["stride"], op["storage_offset"])
    if not storage.holds(picked):
        raise NotLinear  # the view reads elements of another tensor
    return [(operand, index_map(lambda t: storage.of(t)[picked], op.shape, operand.shape, False))]


@rule(aten.as_strided_scatter.default)
def as_strided_scatter(op: Op) -> Local:
    """A tensor with elements replaced by their cell in storage."""
    target, source = op["self"], op["src"]
    if not (target.linear or target.zero) or not (source.linear or source.zero):
        raise NotLinear
    storage = Storage(target)
    picked = storage.places(op["size"], op["stride"], op["storage_offset"])
    if not storage.holds(picked) or bool((picked.reshape(-1).bincount() > 1).any()):
        raise NotLinear

    def keep_target(t: Tensor) -> Tensor:
        cells = storage.of(t)
        cells[picked] = 0
        return cells[storage.own]

    def write_source(t: Tensor) -> Tensor:
        cells = torch.zeros(storage.cells, dtype=t.dtype)
        cells[picked] = t
        return cells[storage.own]

    return [
        (o, index_map(run, op.shape, o.shape, True))
        for o, run in ((target, keep_target), (source, write_source))
        if o.linear
    ]


class Storage:
    """The storage of a tensor, one cell per element.

    Attributes:
        cells: Number of cells.
        own: Cell of each element of the tensor.
    """

    def __init__(self, operand: Operand):
        """Reads the layout of the traced tensor."""
        value = operand.node.meta["val"]
        self._offset = int(value.storage_offset())
        self.cells = int(value.untyped_storage().nbytes()) // value.element_size()
        self.own = self.places(value.shape, value.stride(), self._offset)

    def places(self, size: Any, stride: Any, offset: int | None) -> Tensor:
        """The cells of a view by `as_strided`."""
        first = self._offset if offset is None else offset
        return torch.arange(self.cells).as_strided(tuple(size), tuple(stride), first)

    def holds(self, picked: Tensor) -> bool:
        """Whether every cell belongs to an element of the tensor."""
        mine = torch.zeros(self.cells, dtype=torch.bool)
        mine[self.own] = True
        return bool(mine[picked].all())

    def of(self, t: Tensor) -> Tensor:
        """The content of all cells: elements of a tensor of the same shape, zero elsewhere."""
        cells = torch.zeros(self.cells, dtype=t.dtype)
        cells[self.own] = t
        return cells


@rule(aten.view_as_real.default, aten.view_as_real_copy.default)
def view_as_real(op: Op) -> Local:
    """Real and imaginary part of each complex element."""
    operand = op.only("self")
    apart = reshaped((*operand.shape, 1), operand.shape)
    both = broadcast(op.shape, apart.shape_out)
    return [(operand, product(diagonal(op.shape, UNKNOWN), both, apart))]


@rule(aten.view_as_complex.default, aten.view_as_complex_copy.default)
def view_as_complex(op: Op) -> Local:
    """A complex element from its real and imaginary part."""
    operand = op.only("self")
    both = axis_sum(operand.shape, [-1])
    return [(operand, product(diagonal(op.shape, UNKNOWN), both, diagonal(operand.shape, UNKNOWN)))]


@rule(aten.real.default, aten.imag.default)
def part(op: Op) -> Local:
    """The real or imaginary part of each element."""
    operand = op.only("self")
    return [(operand, diagonal(op.shape, UNKNOWN))]


@rule(aten.complex.default)
def complex_(op: Op) -> Local:
    """Complex elements from tensors of real and imaginary parts."""
    local: Local = []
    for name in ("real", "imag"):
        operand = op[name]
        if operand.linear:
            broadcast_map = broadcast(op.shape, operand.shape)
            local.append((operand, product(diagonal(op.shape, UNKNOWN), broadcast_map)))
        elif not operand.zero:
            raise NotLinear
    return local
