"""Reductions, matrix products and index additions on element ids."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchjac._torch.operators import aten, known, prims
from torchjac._torch.trace.ir import Value
from torchjac.compiler.codegen.element_ids import (
    BITS,
    LoweringContext,
    dtype_of,
    group_by_expression,
    split_ids,
)
from torchjac.compiler.codegen.scalar_ir import SCALAR, Granularity, Indices, MatmulSizes
from torchjac.errors import PlanRefused

_UNROLLED_TERMS = 9  # terms of a reduction: up to as many become scalar statements
_UNROLLED_INNER = 64  # terms of an inner product: up to as many become scalar statements


def _copy(do: LoweringContext, target: Value, source: Value, non_blocking: bool = False) -> Tensor:
    ids = do.ids(target)
    return ids.copy_(do.cast(source, dtype_of(target)))


# The result of an operation along axes without elements.
_EMPTY = {"add": 0.0, "mul": 1.0}


def _sum(
    do: LoweringContext, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Tensor:
    return _reduced(do, "add", x, dim, keepdim, dtype)


def _prod(
    do: LoweringContext, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Tensor:
    axes = [dim] if isinstance(dim, int) else dim
    return _reduced(do, "mul", x, axes, keepdim, dtype)


def _amax(do: LoweringContext, x: Value, dim: Any = None, keepdim: bool = False) -> Tensor:
    return _reduced(do, "maximum", x, dim, keepdim)


def _amin(do: LoweringContext, x: Value, dim: Any = None, keepdim: bool = False) -> Tensor:
    return _reduced(do, "minimum", x, dim, keepdim)


def _reduced(
    do: LoweringContext,
    kind: str,
    x: Value,
    dim: Any,
    keepdim: bool,
    dtype: Any = None,
) -> Tensor:
    """One operation along axes."""
    of = dtype_of(x)
    if dtype is not None and dtype != x.dtype:
        raise PlanRefused("a sum in another dtype")
    if of == "bool" and kind in ("add", "mul"):
        of = "int64"
    ids = do.cast(x, of)
    axes = range(ids.dim()) if dim is None or dim == [] else dim
    axes = sorted({a % max(ids.dim(), 1) for a in axes}) if ids.dim() else []
    rest = [a for a in range(ids.dim()) if a not in axes]
    shape = [ids.shape[a] for a in rest]
    count = math.prod(ids.shape[a] for a in axes)
    if not count:
        if kind not in _EMPTY:
            raise PlanRefused("the largest of no elements")
        result = torch.full(shape, do.constant_id(_EMPTY[kind], of))
    else:
        result = _rows(do, kind, ids.permute((*rest, *axes)).reshape(-1, count), of).view(shape)
    for axis in axes if keepdim else ():
        result = result.unsqueeze(axis)
    return result


def _mean(
    do: LoweringContext, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Tensor:
    result = _sum(do, x, dim, keepdim, dtype)
    count = math.prod(x.shape) // max(result.numel(), 1)
    return do.apply("div", dtype_of(x), [result, torch.tensor(do.constant_id(count, dtype_of(x)))])


def _prims(reduce: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduced(do: LoweringContext, x: Value, dims: Any, *, output_dtype: Any = None) -> Tensor:
        if output_dtype is not None and output_dtype != x.dtype:
            raise PlanRefused("a sum in another dtype")
        return reduce(do, x, dims)

    return reduced


def _var(
    do: LoweringContext, x: Value, dims: Any, correction: float = 1, *, output_dtype: Any = None
) -> Tensor:
    of, ids = dtype_of(x), do.ids(x)
    axes = sorted({a % ids.dim() for a in (range(ids.dim()) if dims is None else dims)})
    rest = [a for a in range(ids.dim()) if a not in axes]
    rows = ids.permute((*rest, *axes)).reshape(math.prod(ids.shape[a] for a in rest), -1)

    def over(sums: Tensor, count: float) -> Tensor:
        return do.apply("div", of, [sums, torch.tensor(do.constant_id(count, of))])

    mean = over(_rows(do, "add", rows, of), rows.shape[1])
    split_ids = do.apply("sub", of, [rows, mean[:, None]])
    squares = _rows(do, "add", do.apply("mul", of, [split_ids, split_ids]), of)
    total = over(squares, rows.shape[1] - correction)
    return total.view([ids.shape[a] for a in rest])


def _extreme(kind: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The largest or smallest element along an axis, and the index of the first one."""

    def total(
        do: LoweringContext, x: Value, dim: int, keepdim: bool = False
    ) -> tuple[Tensor, Tensor]:
        of, ids = dtype_of(x), do.ids(x)
        if not ids.dim() or (ids.shape[dim] > _UNROLLED_TERMS and not do.granularity.unrolls):
            raise PlanRefused("the largest of many elements")
        columns = ids.unbind(dim)
        best, place = columns[0], torch.full(columns[0].shape, do.constant_id(0, "int64"))
        for k, column in enumerate(columns[1:], 1):
            more = do.apply(kind, "bool", [column, best])
            best = do.apply("where", of, [more, column, best])
            here = torch.tensor(do.constant_id(k, "int64"))
            place = do.apply("where", "int64", [more, here, place])
        return (best.unsqueeze(dim), place.unsqueeze(dim)) if keepdim else (best, place)

    return total


def _broadcast(do: LoweringContext, x: Value, shape: Sequence[int], axes: Sequence[int]) -> Tensor:
    ids = do.ids(x)
    sizes = [1] * len(shape)
    for axis, size in zip(axes, ids.shape, strict=True):
        sizes[axis] = size
    return ids.reshape(sizes).expand(list(shape))


def _converted(do: LoweringContext, x: Value, dtype: torch.dtype) -> Tensor:
    return do.cast(x, str(dtype).removeprefix("torch."))


def _convolution(
    do: LoweringContext,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    if transposed or len(weight.shape) < 3:
        raise PlanRefused("a transposed convolution")
    of, ids, kernel = dtype_of(x), do.ids(x), do.ids(weight)
    spatial = kernel.shape[2:]
    sizes = [n + 2 * p for n, p in zip(ids.shape[2:], padding, strict=True)]
    padded = torch.full((*ids.shape[:2], *sizes), do.constant_id(0.0, of))
    inner = [slice(p, p + n) for n, p in zip(ids.shape[2:], padding, strict=True)]
    padded[(slice(None), slice(None), *inner)] = ids
    for axis, (size, step, gap) in enumerate(zip(spatial, stride, dilation, strict=True)):
        windows = padded.unfold(2 + axis, (size - 1) * gap + 1, step)
        padded = windows[..., ::gap]
    outer = padded.shape[2 : 2 + len(spatial)]
    # Samples and output pixels are columns, channels and kernel pixels are contracted.
    batch = len(ids)
    axes = [1, *range(2 + len(spatial), padded.dim()), 0, *range(2, 2 + len(spatial))]
    right = padded.permute(axes).reshape(groups, -1, batch * math.prod(outer))
    left = kernel.reshape(groups, kernel.shape[0] // groups, -1)
    result = _product(do, left, right, of).reshape(kernel.shape[0], batch, *outer).transpose(0, 1)
    if bias is None:
        return result
    indices = (1, -1, *[1] * len(outer))
    return do.apply("add", of, [result, do.ids(bias).view(indices)])


def _rows(do: LoweringContext, kind: str, rows: Tensor, dtype: str) -> Tensor:
    """One operation along each row."""
    longest = (
        _UNROLLED_INNER
        if do.granularity is Granularity.MATRICES and kind != "add"
        else _UNROLLED_TERMS
    )
    if do.granularity.unrolls or rows.shape[1] <= longest:
        total = rows[:, 0]
        for column in rows.unbind(1)[1:]:
            total = do.apply(kind, dtype, [total, column])
        return total
    if kind != "add":
        raise PlanRefused("a long product, or the largest of many elements")
    starts = np.arange(len(rows) + 1) * rows.shape[1]
    return _ragged(do, rows.reshape(-1), starts, dtype)


def _ragged(do: LoweringContext, ids: Tensor, starts: Indices, dtype: str) -> Tensor:
    """Sums of consecutive elements, as segment sums."""
    numbers, indices = split_ids(ids.numpy())
    owner = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    result: Tensor | None = None
    for (number,), chosen in group_by_expression([numbers]):
        of = owner if chosen is None else owner[chosen]
        ends = np.searchsorted(of, np.arange(len(starts)))
        if do.expressions.constant_value(number) == 0:
            continue
        if do.expressions.all[number].domain is SCALAR:  # one number, repeated
            times = torch.tensor([do.constant_id(count, dtype) for count in np.diff(ends).tolist()])
            part = do.apply("mul", dtype, [torch.full_like(times, number << BITS), times])
        else:
            points = indices if chosen is None else indices[chosen]
            total = do.expressions.segment_sum(number, points, ends)
            part = (total << BITS) + torch.arange(len(starts) - 1)
        result = part if result is None else do.apply("add", dtype, [result, part])
    if result is None:
        return torch.full((len(starts) - 1,), do.constant_id(0.0, dtype))
    return result


def _mm(do: LoweringContext, a: Value, b: Value) -> Tensor:
    return _product(do, do.matmul_ids(a)[None], do.matmul_ids(b)[None], dtype_of(a))[0]


def _bmm(do: LoweringContext, a: Value, b: Value) -> Tensor:
    return _product(do, do.matmul_ids(a), do.matmul_ids(b), dtype_of(a))


def _mv(do: LoweringContext, a: Value, b: Value) -> Tensor:
    return _product(do, do.matmul_ids(a)[None], do.ids(b)[None, :, None], dtype_of(a))[0, :, 0]


def _product(do: LoweringContext, a: Tensor, b: Tensor, dtype: str) -> Tensor:
    inner = a.shape[2]
    if not inner:
        return torch.full((a.shape[0], a.shape[1], b.shape[2]), do.constant_id(0.0, dtype))
    if do.granularity is Granularity.MATRICES and (whole := _whole(do, a, b, dtype)) is not None:
        return whole
    if (
        inner > (_UNROLLED_TERMS if do.granularity is Granularity.MATRICES else _UNROLLED_INNER)
        and not do.granularity.unrolls
    ):
        raise PlanRefused("large matrix products are for BLAS")
    total: Tensor | None = None
    for k in range(inner):
        part = do.apply("mul", dtype, [a[:, :, k, None], b[:, None, k, :]])
        total = part if total is None else do.apply("add", dtype, [total, part])
    assert total is not None
    return total


def _whole(do: LoweringContext, a: Tensor, b: Tensor, dtype: str) -> Tensor | None:
    """A matrix product as one expression; None if a factor has several expressions."""
    sides = []
    for matrix in (a, b):
        numbers, indices = split_ids(matrix.reshape(-1).numpy())
        if (numbers != numbers[0]).any() or do.expressions.all[numbers[0]].domain is SCALAR:
            return None
        sides.append((int(numbers[0]), indices))
    sizes = MatmulSizes(a.shape[0], a.shape[1], a.shape[2], b.shape[2])
    number = do.expressions.matmul(dtype, sides[0], sides[1], sizes)
    count = sizes[0] * sizes[1] * sizes[3]
    return ((number << BITS) + torch.arange(count)).view(sizes[0], sizes[1], sizes[3])


def _index_add(
    do: LoweringContext, x: Value, dim: int, index: Value, source: Value, alpha: float = 1
) -> Tensor:
    if alpha != 1:
        raise PlanRefused("index_add with a factor")
    result = do.ids(x).clone()
    _add_at(do, result, dim, do.fixed_values(index), do.cast(source, dtype_of(x)), dtype_of(x))
    return result


def _index_add_(
    do: LoweringContext, x: Value, dim: int, index: Value, source: Value, alpha: float = 1
) -> Tensor:
    if alpha != 1:
        raise PlanRefused("index_add with a factor")
    ids = do.ids(x)
    _add_at(do, ids, dim, do.fixed_values(index), do.cast(source, dtype_of(x)), dtype_of(x))
    return ids


def _add_at(
    do: LoweringContext, to: Tensor, dim: int, index: Tensor, source: Tensor, dtype: str
) -> None:
    """Adds slices of a tensor to slices of another tensor: in order, or as segment sums."""
    if to.dim() == 0:
        raise PlanRefused("index_add of a number")
    to, source = to.movedim(dim, 0), source.movedim(dim, 0)
    order = torch.argsort(index, stable=True)
    where, counts = torch.unique_consecutive(index[order], return_counts=True)
    if not len(where):
        return
    first = torch.cumsum(counts, 0) - counts
    alike = int(counts.min()) == int(counts.max()) <= _UNROLLED_TERMS
    if do.granularity.unrolls or alike:
        for k in range(int(counts.max())):
            now = counts > k
            rows = where[now]
            terms = source[order[first[now] + k]]
            to[rows] = do.apply("add", dtype, [to[rows], terms])
        return
    width = source[0].numel()
    flat = source[order].reshape(len(order), width).t().reshape(-1)
    starts = np.append((first[None] + torch.arange(width)[:, None] * len(order)), flat.numel())
    sums = _ragged(do, flat, starts, dtype).view(width, len(where)).t()
    to[where] = do.apply("add", dtype, [to[where], sums.reshape(to[where].shape)])


CONTRACTIONS: Mapping[Any, Callable[..., Any]] = known(
    {
        aten.copy_.default: _copy,
        aten.sum.default: _sum,
        aten.sum.dim_IntList: _sum,
        aten.mean.default: _mean,
        aten.mean.dim: _mean,
        aten.mm.default: _mm,
        aten.bmm.default: _bmm,
        aten.mv.default: _mv,
        aten.index_add.default: _index_add,
        aten.index_add_.default: _index_add_,
        aten.amax.default: _amax,
        aten.max.default: _amax,
        aten.min.default: _amin,
        aten.amin.default: _amin,
        aten.prod.default: _prod,
        aten.prod.dim_int: _prod,
        aten.convolution.default: _convolution,
        prims.sum.default: _prims(_sum),
        prims.prod.default: _prims(_prod),
        prims.amax.default: _prims(_amax),
        prims.amin.default: _prims(_amin),
        prims.var.default: _var,
        prims.broadcast_in_dim.default: _broadcast,
        prims.convert_element_type.default: _converted,
        prims.copy_to.default: _copy,
        aten.max.dim: _extreme("gt"),
        aten.min.dim: _extreme("lt"),
    }
)
