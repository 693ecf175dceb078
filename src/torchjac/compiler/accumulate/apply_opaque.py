"""Operations whose local Jacobian is not known in numbers are run on the adjoint itself."""

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
from torchjac.compiler.accumulate.apply import by_element
from torchjac.errors import PlanRefused
from torchjac.linear.maps import (
    AxisSum,
    Dense,
    Diagonal,
    IndexMap,
    LinearMap,
    Product,
    Scaled,
    Shape,
    Sum,
)


def operated(
    map_: LinearMap,
    adjoint: Adjoint,
    run: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    most: int,
) -> Adjoint:
    """The adjoint of the result of an operation, which is run on all columns at once.

    Args:
        map_: Its local Jacobian, whose factors are not known.
        adjoint: The adjoint of its operand.
        run: The operation.
        dtype: What its operand is made of.
        most: Numbers that this may take.

    Raises:
        PlanRefused: It would take too much.
    """
    found = []
    for term in adjoint.terms:
        prepared = _prepared(map_, by_element(term, adjoint.shape), len(adjoint.shape), most)
        found.append(_run(map_, prepared, len(adjoint.shape), run, dtype))
    return Adjoint(map_.shape_out, tuple(found))


def _prepared(map_: LinearMap, term: Term, ndim: int, most: int) -> Term:
    """A term with rows that stay the same wherever the operation mixes elements."""
    if _carried(map_, term, ndim) is not None:
        return term
    bound = [a for a in range(ndim) if not t.is_free(term.rows, a)]
    choices = [bound[1:], bound] if bound[:1] == [0] and len(bound) > 1 else [bound]
    for axes in choices:
        columns = math.prod(term.loop[a] for a in axes)
        if columns * math.prod(term.loop) > most:
            raise PlanRefused("an operation would be run on too many columns")
        made = _spread(term, axes)
        if _carried(map_, made, ndim) is not None:
            return made
    raise PlanRefused("an operation whose local Jacobian is not known mixes rows")


def _spread(term: Term, axes: list[int]) -> Term:
    """The same entries, with axes of the value once more as axes of their own."""
    sizes = [term.loop[a] for a in axes]
    loop = (*term.loop, *sizes)
    ndim = len(term.loop)
    with real_values():
        rows = term.rows
        same = torch.ones((), dtype=torch.float64)
        for k, axis in enumerate(axes):
            rows = rows.unsqueeze(-1).transpose(axis, -1)
            shape = [1] * len(loop)
            shape[axis] = shape[ndim + k] = loop[axis]
            same = same * torch.eye(loop[axis], dtype=torch.float64).reshape(shape)
        rows = rows.expand(loop)
    factors = [f.reshape((*f.shape, *[1] * len(sizes))).expand(loop) for f in term.factors]
    eye = same.to(term.dtype)
    return Term(loop, rows, term.dtype, (*factors, eye.expand(loop)), term.scale, table=term.table)


def _run(
    map_: LinearMap, term: Term, ndim: int, run: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> Term:
    rows = _carried(map_, term, ndim)
    assert rows is not None
    columns = t.entries(term)
    rest = term.loop[ndim:]
    free = [a for a in range(ndim, len(term.loop)) if t.is_free(columns, a)]
    small = t.compact(columns, free)
    sizes = small.shape[ndim:]
    flat = small.reshape((*small.shape[:ndim], -1))
    flat = flat.movedim(-1, 0).contiguous().to(dtype)
    if len(flat) == 1:
        made = run(flat[0]).unsqueeze(-1)
    else:
        with without_loop_warnings():
            made = torch.func.vmap(run, out_dims=-1)(flat)
    loop = (*map_.shape_out, *rest)
    made = made.reshape((*map_.shape_out, *sizes)).expand(loop)
    return Term(loop, rows, term.dtype, (made,), table=term.table)


def _carried(map_: LinearMap, term: Term, ndim: int) -> Tensor | None:
    """Rows of the result where elements that are mixed have the same ones, else None."""
    with real_values():
        return _carry(map_, term.rows, ndim)


@singledispatch
def _carry(map_: LinearMap, rows: Tensor, ndim: int) -> Tensor | None:
    return None


@_carry.register(Scaled)
@_carry.register(Diagonal)
def _(map_: LinearMap, rows: Tensor, ndim: int) -> Tensor | None:
    return rows


@_carry.register
def _(map_: Product, rows: Tensor, ndim: int) -> Tensor | None:
    found: Tensor | None = rows
    for factor in reversed(map_.factors):
        if found is None:
            return None
        found = _carry(factor, found, len(factor.shape_in))
    return found


@_carry.register
def _(map_: Sum, rows: Tensor, ndim: int) -> Tensor | None:
    found = [_carry(part, rows, ndim) for part in map_.parts]
    first = found[0]
    if first is None or any(f is None or not torch.equal(f, first) for f in found):
        return None
    return first


def _freed(rows: Tensor, axes: tuple[int, ...], shape: Shape) -> Tensor | None:
    """Rows without axes along which they are the same, which become others; else None."""
    if not all(t.is_free(rows, a) for a in axes):
        return None
    for axis in sorted(axes, reverse=True):
        rows = rows.select(axis, 0)
    return rows


@_carry.register
def _(map_: AxisSum, rows: Tensor, ndim: int) -> Tensor | None:
    return _freed(rows, map_.axes, map_.shape_out)


@_carry.register
def _(map_: IndexMap, rows: Tensor, ndim: int) -> Tensor | None:
    if all(t.is_free(rows, a) for a in range(ndim)):
        rest = rows.shape[ndim:]
        for _ in range(ndim):
            rows = rows.select(0, 0)
        return rows.expand((*map_.shape_out, *rest))
    return None if map_.fills else t.moved(map_.run, rows, ndim, map_.shape_out)


@_carry.register
def _(map_: Dense, rows: Tensor, ndim: int) -> Tensor | None:
    found = _freed(rows, map_.axes_in, map_.shape_out)
    if found is None:
        return None
    for axis in map_.axes_out:
        found = found.unsqueeze(axis)
    return found.expand((*map_.shape_out, *rows.shape[ndim:]))
