"""Operations whose local Jacobian is not known in numbers: they run on the adjoint itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import singledispatch

import torch
from torch import Tensor

from torchjac._torch.modes import real_values
from torchjac._torch.vmap import without_loop_warnings
from torchjac.compiler.accumulate import adjoint as t
from torchjac.compiler.accumulate.adjoint import Adjoint, Term
from torchjac.compiler.accumulate.apply import group_by_element
from torchjac.compiler.accumulate.broadcast import (
    append_axes,
    broadcast_axes,
    collapse,
    is_broadcast,
    move_elements,
)
from torchjac.errors import PlanRefused
from torchjac.linear.maps import (
    AxisSum,
    Dense,
    Diagonal,
    IndexMap,
    LinearMap,
    Product,
    Scaled,
    Sum,
)


def apply_opaque(
    map_: LinearMap,
    adjoint: Adjoint,
    run: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    most: int,
) -> Adjoint:
    """The adjoint of an operation's result: the operation runs on all columns at once.

    Args:
        map_: The local Jacobian, whose factors are not known.
        adjoint: The adjoint of the operand.
        run: The operation.
        dtype: Dtype of the operand.
        most: Largest number of elements that the columns may have.

    Raises:
        PlanRefused: The columns would be too many, or rows would mix.
    """
    terms = []
    ndim = len(adjoint.shape)
    for term in adjoint.terms:
        separated = _separate_rows(map_, group_by_element(term, adjoint.shape), ndim, most)
        terms.append(_run_columns(map_, separated, ndim, run, dtype))
    return Adjoint(map_.shape_out, tuple(terms))


def _separate_rows(map_: LinearMap, term: Term, ndim: int, most: int) -> Term:
    """A term whose rows are constant along all axes along which the operation mixes elements."""
    if _rows_of_result(map_, term, ndim) is not None:
        return term
    bound = [a for a in range(ndim) if not is_broadcast(term.rows, a)]
    choices = [bound[1:], bound] if bound[:1] == [0] and len(bound) > 1 else [bound]
    for axes in choices:
        columns = math.prod(term.loop[a] for a in axes)
        if columns * math.prod(term.loop) > most:
            raise PlanRefused("an operation would be run on too many columns")
        separated = _append_diagonal(term, axes)
        if _rows_of_result(map_, separated, ndim) is not None:
            return separated
    raise PlanRefused("an operation whose local Jacobian is not known mixes rows")


def _append_diagonal(term: Term, axes: list[int]) -> Term:
    """The same entries on the diagonal between axes of the value and copies of these axes.

    Rows run along the copies, and are constant along the axes.
    """
    sizes = [term.loop[a] for a in axes]
    loop = (*term.loop, *sizes)
    ndim = len(term.loop)
    with real_values():
        rows = term.rows
        diagonal = torch.ones((), dtype=torch.float64)
        for k, axis in enumerate(axes):
            rows = rows.unsqueeze(-1).transpose(axis, -1)
            shape = [1] * len(loop)
            shape[axis] = shape[ndim + k] = loop[axis]
            diagonal = diagonal * torch.eye(loop[axis], dtype=torch.float64).reshape(shape)
        rows = rows.expand(loop)
    factors = [append_axes(f, loop) for f in term.factors]
    factors.append(diagonal.to(term.dtype).expand(loop))
    return Term(loop, rows, term.dtype, tuple(factors), term.scale, bottleneck=term.bottleneck)


def _run_columns(
    map_: LinearMap, term: Term, ndim: int, run: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> Term:
    """The term of an operation's result: the operation on every distinct column of entries."""
    rows = _rows_of_result(map_, term, ndim)
    assert rows is not None
    columns = t.entries(term)
    small = collapse(columns, broadcast_axes(columns, range(ndim, len(term.loop))))
    sizes = small.shape[ndim:]
    flat = small.reshape((*small.shape[:ndim], -1))
    flat = flat.movedim(-1, 0).contiguous().to(dtype)
    if len(flat) == 1:
        result = run(flat[0]).unsqueeze(-1)
    else:
        with without_loop_warnings():
            result = torch.func.vmap(run, out_dims=-1)(flat)
    loop = (*map_.shape_out, *term.loop[ndim:])
    result = result.reshape((*map_.shape_out, *sizes)).expand(loop)
    return Term(loop, rows, term.dtype, (result,), bottleneck=term.bottleneck)


def _rows_of_result(map_: LinearMap, term: Term, ndim: int) -> Tensor | None:
    """Rows of an operation's result; None where elements with different rows mix."""
    with real_values():
        return _map_rows(map_, term.rows, ndim)


@singledispatch
def _map_rows(map_: LinearMap, rows: Tensor, ndim: int) -> Tensor | None:
    return None


@_map_rows.register(Scaled)
@_map_rows.register(Diagonal)
def _(map_: LinearMap, rows: Tensor, ndim: int) -> Tensor | None:
    return rows


@_map_rows.register
def _(map_: Product, rows: Tensor, ndim: int) -> Tensor | None:
    mapped: Tensor | None = rows
    for factor in reversed(map_.factors):
        if mapped is None:
            return None
        mapped = _map_rows(factor, mapped, len(factor.shape_in))
    return mapped


@_map_rows.register
def _(map_: Sum, rows: Tensor, ndim: int) -> Tensor | None:
    mapped = [_map_rows(part, rows, ndim) for part in map_.parts]
    first = mapped[0]
    if first is None or any(x is None or not torch.equal(x, first) for x in mapped):
        return None
    return first


def _drop_axes(rows: Tensor, axes: tuple[int, ...]) -> Tensor | None:
    """Rows without axes along which they are constant; None if they vary along one."""
    if not all(is_broadcast(rows, a) for a in axes):
        return None
    for axis in sorted(axes, reverse=True):
        rows = rows.select(axis, 0)
    return rows


@_map_rows.register
def _(map_: AxisSum, rows: Tensor, ndim: int) -> Tensor | None:
    return _drop_axes(rows, map_.axes)


@_map_rows.register
def _(map_: IndexMap, rows: Tensor, ndim: int) -> Tensor | None:
    if all(is_broadcast(rows, a) for a in range(ndim)):
        trailing = rows.shape[ndim:]
        for _ in range(ndim):
            rows = rows.select(0, 0)
        return rows.expand((*map_.shape_out, *trailing))
    return None if map_.fills else move_elements(map_.run, rows, ndim, map_.shape_out)


@_map_rows.register
def _(map_: Dense, rows: Tensor, ndim: int) -> Tensor | None:
    mapped = _drop_axes(rows, map_.axes_in)
    if mapped is None:
        return None
    for axis in map_.axes_out:
        mapped = mapped.unsqueeze(axis)
    return mapped.expand((*map_.shape_out, *rows.shape[ndim:]))
