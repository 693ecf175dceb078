"""Tensors that are broadcast: stride 0 along axes on which they are constant, without memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from torchjac._torch.modes import real_values
from torchjac.linear.maps import Shape
from torchjac.linear.maps.factors import map_unexpanded


def varying_axes(tensor: Tensor) -> frozenset[int]:
    """Axes along which a tensor is not broadcast."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return frozenset(i for i, (size, stride) in enumerate(sizes) if size > 1 and stride)


def is_broadcast(tensor: Tensor, axis: int) -> bool:
    """Whether a tensor is constant along an axis, as its strides say."""
    return tensor.shape[axis] == 1 or tensor.stride(axis) == 0


def broadcast_axes(tensor: Tensor, axes: Iterable[int] | None = None) -> list[int]:
    """Those of some axes (default: all) along which a tensor is broadcast."""
    axes = range(tensor.ndim) if axes is None else axes
    return [a for a in axes if is_broadcast(tensor, a)]


def collapse(tensor: Tensor, axes: Iterable[int]) -> Tensor:
    """The first slice along axes, which keep size 1."""
    for axis in axes:
        if tensor.shape[axis] > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def append_axes(tensor: Tensor, loop: Shape) -> Tensor:
    """A tensor broadcast along the axes of a loop that come after its own."""
    return tensor.reshape((*tensor.shape, *[1] * (len(loop) - tensor.ndim))).expand(loop)


def with_zero_strides(tensor: Tensor, axes: Iterable[int] | None = None) -> Tensor:
    """The same values, broadcast along those of some axes (default: all) with equal slices."""
    for axis in range(tensor.ndim) if axes is None else axes:
        if tensor.shape[axis] > 1 and not is_broadcast(tensor, axis):
            first = tensor.narrow(axis, 0, 1)
            if torch.equal(tensor, first.expand(tensor.shape)):
                tensor = first.expand(tensor.shape)
    return tensor


def affine_strides(positions: Tensor) -> tuple[int, list[int]] | None:
    """Offset and stride of each axis, if positions are an affine function of the loop indices."""
    offset = int(positions[(0,) * positions.ndim])
    expected = torch.full((), offset)
    strides = []
    for axis, size in enumerate(positions.shape):
        stride = 0
        if not is_broadcast(positions, axis):
            second = [0] * positions.ndim
            second[axis] = 1
            stride = int(positions[tuple(second)]) - offset
            line = [1] * positions.ndim
            line[axis] = size
            expected = expected + (torch.arange(size) * stride).reshape(line)
        strides.append(stride)
    small = collapse(positions, broadcast_axes(positions))
    return (offset, strides) if torch.equal(small, expected.expand(small.shape)) else None


def product(factors: Sequence[Tensor]) -> Tensor:
    """The product of factors of the same shape, computed once where all are broadcast."""
    total = factors[0]
    for factor in factors[1:]:
        total = map_unexpanded(torch.mul, total, factor)
    return total


def contract(factors: Sequence[Tensor], axes: frozenset[int]) -> Tensor:
    """The sum over axes of the product of one or two factors; the axes keep size 1.

    Args:
        factors: Tensors of the same shape.
        axes: Axes along which at least one of the factors varies.
    """
    loop = factors[0].shape
    operands = []
    for factor in factors:
        rest = frozenset().union(*(varying_axes(f) for f in factors if f is not factor))
        alone = [a for a in axes & varying_axes(factor) if a not in rest]
        small = collapse(factor, broadcast_axes(factor))
        operands.append(small.sum(alone, keepdim=True) if alone else small)
    shape = [1 if i in axes else s for i, s in enumerate(loop)]
    if len(operands) == 1:
        return operands[0].expand(shape)
    shared = [a for a in axes if all(x.shape[a] > 1 for x in operands)]
    if not shared:
        return map_unexpanded(torch.mul, *(x.expand(shape) for x in operands))
    return _matmul(operands[0], operands[1], shared).expand(shape)


def _matmul(x: Tensor, y: Tensor, shared: Sequence[int]) -> Tensor:
    """The sum of x * y over shared axes, by one (batched) matrix product.

    The remaining axes are sorted: those of both factors are the batch, those of x alone are rows,
    those of y alone are columns.
    """
    if x.dtype != y.dtype:
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(dtype), y.to(dtype)
    ndim = x.ndim
    batch = [a for a in range(ndim) if x.shape[a] > 1 and y.shape[a] > 1 and a not in shared]
    left = [a for a in range(ndim) if x.shape[a] > 1 and y.shape[a] == 1]
    right = [a for a in range(ndim) if y.shape[a] > 1 and x.shape[a] == 1]
    ones = [a for a in range(ndim) if x.shape[a] == 1 and y.shape[a] == 1]
    sizes = [[t.shape[a] for a in axes] for t, axes in ((x, batch), (x, left), (y, right))]
    inner = math.prod(x.shape[a] for a in shared)
    b, m, n = map(math.prod, sizes)
    first = x.permute([*ones, *batch, *left, *right, *shared])
    second = y.permute([*ones, *batch, *left, *shared, *right])
    if batch:
        total = torch.bmm(first.reshape(b, m, inner), second.reshape(b, inner, n))
    else:
        total = torch.mm(first.reshape(m, inner), second.reshape(inner, n))
    order = [*ones, *batch, *left, *right, *shared]
    shape = [*[1] * len(ones), *sizes[0], *sizes[1], *sizes[2], *[1] * len(shared)]
    return total.reshape(shape).permute([order.index(i) for i in range(ndim)])


def move_elements(
    run: Callable[[Tensor], Tensor], tensor: Tensor, ndim: int, shape: Shape
) -> Tensor:
    """Runs an operation that moves elements on the first axes of a tensor.

    Args:
        run: The operation, from `ndim` axes to `shape`.
        tensor: Its operand, with any number of axes after the first `ndim`.
        ndim: Number of axes that the operation acts on.
        shape: Sizes of the result.
    """
    trailing = tuple(tensor.shape[ndim:])
    if not trailing:
        return run(tensor)
    free = broadcast_axes(tensor, range(ndim, tensor.ndim))
    bound = [a for a in range(ndim, tensor.ndim) if a not in free]
    small = tensor
    for axis in reversed(free):
        small = small.select(axis, 0)
    varying = [a - ndim for a in bound]
    if not bound:
        result = run(small)
    else:
        flat = small.flatten(ndim) if len(bound) > 1 else small
        try:
            result = torch.func.vmap(run, in_dims=-1, out_dims=-1)(flat)
        except RuntimeError:  # the operation has no batching rule
            result = _gather(run, flat, shape)
        if len(bound) > 1:
            result = result.reshape((*result.shape[:-1], *(trailing[a] for a in varying)))
    for axis in range(len(trailing)):
        if axis not in varying:
            result = result.unsqueeze(len(shape) + axis)
    return result.expand((*shape, *trailing))


def _gather(run: Callable[[Tensor], Tensor], flat: Tensor, shape: Shape) -> Tensor:
    """The same movement of every column by one gather: `run` on positions gives its indices.

    Position 0 holds a zero, for elements that the operation fills in.
    """
    sizes = flat.shape[:-1]
    with real_values():
        source = run(torch.arange(1, math.prod(sizes) + 1).reshape(sizes)).reshape(-1)
    padded = torch.cat([flat.new_zeros(1, flat.shape[-1]), flat.reshape(-1, flat.shape[-1])])
    return padded.index_select(0, source).reshape((*shape, flat.shape[-1]))
