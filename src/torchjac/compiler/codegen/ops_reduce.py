"""Sums and products of tensors on codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchjac._torch.operators import aten, known, prims
from torchjac._torch.trace.ir import Value
from torchjac.compiler.codegen.element_ids import BITS, Expanding, apart, dtype_of, groups
from torchjac.compiler.codegen.scalar_ir import ONE, Granularity, Places, Sizes
from torchjac.errors import PlanRefused

# Sums, and products of matrices, up to this length are written out.
_LONG, _INNER = 9, 64


def _copy(do: Expanding, target: Value, source: Value, non_blocking: bool = False) -> Tensor:
    code = do.code(target)
    return code.copy_(do.cast(source, dtype_of(target)))


def _sum(
    do: Expanding, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Tensor:
    return _reduced(do, "add", 0.0, x, dim, keepdim, dtype)


def _prod(
    do: Expanding, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Tensor:
    axes = [dim] if isinstance(dim, int) else dim
    return _reduced(do, "mul", 1.0, x, axes, keepdim, dtype)


def _amax(do: Expanding, x: Value, dim: Any = None, keepdim: bool = False) -> Tensor:
    return _reduced(do, "maximum", None, x, dim, keepdim)


def _amin(do: Expanding, x: Value, dim: Any = None, keepdim: bool = False) -> Tensor:
    return _reduced(do, "minimum", None, x, dim, keepdim)


def _reduced(
    do: Expanding,
    kind: str,
    empty: float | None,
    x: Value,
    dim: Any,
    keepdim: bool,
    dtype: Any = None,
) -> Tensor:
    """One operation along axes; `empty` is what it gives of nothing."""
    of = dtype_of(x)
    if dtype is not None and dtype != x.dtype:
        raise PlanRefused("a sum in another dtype")
    if of == "bool" and kind in ("add", "mul"):
        of = "int64"
    code = do.cast(x, of)
    axes = range(code.dim()) if dim is None or dim == [] else dim
    axes = sorted({a % max(code.dim(), 1) for a in axes}) if code.dim() else []
    rest = [a for a in range(code.dim()) if a not in axes]
    shape = [code.shape[a] for a in rest]
    count = math.prod(code.shape[a] for a in axes)
    if not count:
        if empty is None:
            raise PlanRefused("the largest of no elements")
        made = torch.full(shape, do.number(empty, of))
    else:
        made = _rows(do, kind, code.permute((*rest, *axes)).reshape(-1, count), of).view(shape)
    for axis in axes if keepdim else ():
        made = made.unsqueeze(axis)
    return made


def _mean(
    do: Expanding, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Tensor:
    made = _sum(do, x, dim, keepdim, dtype)
    count = math.prod(x.shape) // max(made.numel(), 1)
    return do.apply("div", dtype_of(x), [made, torch.tensor(do.number(count, dtype_of(x)))])


def _prims(reduce: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduced(do: Expanding, x: Value, dims: Any, *, output_dtype: Any = None) -> Tensor:
        if output_dtype is not None and output_dtype != x.dtype:
            raise PlanRefused("a sum in another dtype")
        return reduce(do, x, dims)

    return reduced


def _var(
    do: Expanding, x: Value, dims: Any, correction: float = 1, *, output_dtype: Any = None
) -> Tensor:
    of, code = dtype_of(x), do.code(x)
    axes = sorted({a % code.dim() for a in (range(code.dim()) if dims is None else dims)})
    rest = [a for a in range(code.dim()) if a not in axes]
    rows = code.permute((*rest, *axes)).reshape(math.prod(code.shape[a] for a in rest), -1)

    def over(sums: Tensor, count: float) -> Tensor:
        return do.apply("div", of, [sums, torch.tensor(do.number(count, of))])

    mean = over(_rows(do, "add", rows, of), rows.shape[1])
    apart = do.apply("sub", of, [rows, mean[:, None]])
    squares = _rows(do, "add", do.apply("mul", of, [apart, apart]), of)
    found = over(squares, rows.shape[1] - correction)
    return found.view([code.shape[a] for a in rest])


def _extreme(kind: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The largest or smallest element along an axis, and where the first one is."""

    def found(do: Expanding, x: Value, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
        of, code = dtype_of(x), do.code(x)
        if not code.dim() or (code.shape[dim] > _LONG and not do.granularity.unrolls):
            raise PlanRefused("the largest of many elements")
        columns = code.unbind(dim)
        best, place = columns[0], torch.full(columns[0].shape, do.number(0, "int64"))
        for k, column in enumerate(columns[1:], 1):
            more = do.apply(kind, "bool", [column, best])
            best = do.apply("where", of, [more, column, best])
            here = torch.tensor(do.number(k, "int64"))
            place = do.apply("where", "int64", [more, here, place])
        return (best.unsqueeze(dim), place.unsqueeze(dim)) if keepdim else (best, place)

    return found


def _broadcast(do: Expanding, x: Value, shape: Sequence[int], axes: Sequence[int]) -> Tensor:
    code = do.code(x)
    sizes = [1] * len(shape)
    for axis, size in zip(axes, code.shape, strict=True):
        sizes[axis] = size
    return code.reshape(sizes).expand(list(shape))


def _converted(do: Expanding, x: Value, dtype: torch.dtype) -> Tensor:
    return do.cast(x, str(dtype).removeprefix("torch."))


def _convolution(
    do: Expanding,
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
    of, code, kernel = dtype_of(x), do.code(x), do.code(weight)
    spatial = kernel.shape[2:]
    sizes = [n + 2 * p for n, p in zip(code.shape[2:], padding, strict=True)]
    padded = torch.full((*code.shape[:2], *sizes), do.number(0.0, of))
    inner = [slice(p, p + n) for n, p in zip(code.shape[2:], padding, strict=True)]
    padded[(slice(None), slice(None), *inner)] = code
    for axis, (size, step, gap) in enumerate(zip(spatial, stride, dilation, strict=True)):
        windows = padded.unfold(2 + axis, (size - 1) * gap + 1, step)
        padded = windows[..., ::gap]
    outer = padded.shape[2 : 2 + len(spatial)]
    # Samples and places are columns, channels and places of the kernel are contracted.
    batch = len(code)
    axes = [1, *range(2 + len(spatial), padded.dim()), 0, *range(2, 2 + len(spatial))]
    right = padded.permute(axes).reshape(groups, -1, batch * math.prod(outer))
    left = kernel.reshape(groups, kernel.shape[0] // groups, -1)
    made = _product(do, left, right, of).reshape(kernel.shape[0], batch, *outer).transpose(0, 1)
    if bias is None:
        return made
    places = (1, -1, *[1] * len(outer))
    return do.apply("add", of, [made, do.code(bias).view(places)])


def _rows(do: Expanding, kind: str, rows: Tensor, dtype: str) -> Tensor:
    """One operation along each row of a matrix."""
    longest = _INNER if do.granularity is Granularity.MATRICES and kind != "add" else _LONG
    if do.granularity.unrolls or rows.shape[1] <= longest:
        found = rows[:, 0]
        for column in rows.unbind(1)[1:]:
            found = do.apply(kind, dtype, [found, column])
        return found
    if kind != "add":
        raise PlanRefused("a long product, or the largest of many elements")
    starts = np.arange(len(rows) + 1) * rows.shape[1]
    return _ragged(do, rows.reshape(-1), starts, dtype)


def _ragged(do: Expanding, codes: Tensor, starts: Places, dtype: str) -> Tensor:
    """Sums of consecutive elements, which are many."""
    numbers, places = apart(codes.numpy())
    owner = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    made: Tensor | None = None
    for (number,), chosen in groups([numbers]):
        of = owner if chosen is None else owner[chosen]
        ends = np.searchsorted(of, np.arange(len(starts)))
        if do.expressions.value(number) == 0:
            continue
        if do.expressions.all[number].lanes is ONE:  # the same number, so many times
            times = torch.tensor([do.number(count, dtype) for count in np.diff(ends).tolist()])
            part = do.apply("mul", dtype, [torch.full_like(times, number << BITS), times])
        else:
            lanes = places if chosen is None else places[chosen]
            found = do.expressions.segments(number, lanes, ends)
            part = (found << BITS) + torch.arange(len(starts) - 1)
        made = part if made is None else do.apply("add", dtype, [made, part])
    if made is None:
        return torch.full((len(starts) - 1,), do.number(0.0, dtype))
    return made


def _mm(do: Expanding, a: Value, b: Value) -> Tensor:
    return _product(do, do.matrix(a)[None], do.matrix(b)[None], dtype_of(a))[0]


def _bmm(do: Expanding, a: Value, b: Value) -> Tensor:
    return _product(do, do.matrix(a), do.matrix(b), dtype_of(a))


def _mv(do: Expanding, a: Value, b: Value) -> Tensor:
    return _product(do, do.matrix(a)[None], do.code(b)[None, :, None], dtype_of(a))[0, :, 0]


def _product(do: Expanding, a: Tensor, b: Tensor, dtype: str) -> Tensor:
    inner = a.shape[2]
    if not inner:
        return torch.full((a.shape[0], a.shape[1], b.shape[2]), do.number(0.0, dtype))
    if do.granularity is Granularity.MATRICES and (kept := _whole(do, a, b, dtype)) is not None:
        return kept
    if (
        inner > (_LONG if do.granularity is Granularity.MATRICES else _INNER)
        and not do.granularity.unrolls
    ):
        raise PlanRefused("large matrix products are for BLAS")
    found: Tensor | None = None
    for k in range(inner):
        part = do.apply("mul", dtype, [a[:, :, k, None], b[:, None, k, :]])
        found = part if found is None else do.apply("add", dtype, [found, part])
    assert found is not None
    return found


def _whole(do: Expanding, a: Tensor, b: Tensor, dtype: str) -> Tensor | None:
    """A product of matrices as one expression; None if they are not elements of one each."""
    sides = []
    for matrix in (a, b):
        numbers, places = apart(matrix.reshape(-1).numpy())
        if (numbers != numbers[0]).any() or do.expressions.all[numbers[0]].lanes is ONE:
            return None
        sides.append((int(numbers[0]), places))
    sizes = Sizes(a.shape[0], a.shape[1], a.shape[2], b.shape[2])
    number = do.expressions.product(dtype, sides[0], sides[1], sizes)
    count = sizes[0] * sizes[1] * sizes[3]
    return ((number << BITS) + torch.arange(count)).view(sizes[0], sizes[1], sizes[3])


def _index_add(
    do: Expanding, x: Value, dim: int, index: Value, source: Value, alpha: float = 1
) -> Tensor:
    if alpha != 1:
        raise PlanRefused("index_add with a factor")
    made = do.code(x).clone()
    _add_at(do, made, dim, do.known(index), do.cast(source, dtype_of(x)), dtype_of(x))
    return made


def _index_add_(
    do: Expanding, x: Value, dim: int, index: Value, source: Value, alpha: float = 1
) -> Tensor:
    if alpha != 1:
        raise PlanRefused("index_add with a factor")
    code = do.code(x)
    _add_at(do, code, dim, do.known(index), do.cast(source, dtype_of(x)), dtype_of(x))
    return code


def _add_at(do: Expanding, to: Tensor, dim: int, index: Tensor, source: Tensor, dtype: str) -> None:
    """Adds slices of a tensor to slices of another: in order, or as sums of many."""
    if to.dim() == 0:
        raise PlanRefused("index_add of a number")
    to, source = to.movedim(dim, 0), source.movedim(dim, 0)
    order = torch.argsort(index, stable=True)
    where, counts = torch.unique_consecutive(index[order], return_counts=True)
    if not len(where):
        return
    first = torch.cumsum(counts, 0) - counts
    alike = int(counts.min()) == int(counts.max()) <= _LONG
    if do.granularity.unrolls or alike:
        for turn in range(int(counts.max())):
            now = counts > turn
            rows = where[now]
            taken = source[order[first[now] + turn]]
            to[rows] = do.apply("add", dtype, [to[rows], taken])
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
