"""Local Jacobians applied to adjoints: products of maps and terms, in numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import singledispatch

import torch
from torch import Tensor

from torchjac._torch.modes import real_values
from torchjac.compiler.accumulate import adjoint as t
from torchjac.compiler.accumulate.adjoint import Adjoint, Term
from torchjac.compiler.accumulate.broadcast import (
    append_axes,
    broadcast_axes,
    collapse,
    is_broadcast,
    move_elements,
    product,
    varying_axes,
    with_zero_strides,
)
from torchjac.compiler.accumulate.strided_index import StridedIndex
from torchjac.errors import PlanRefused
from torchjac.linear.maps import (
    AxisSum,
    ComputedFactors,
    Diagonal,
    IndexMap,
    LinearMap,
    Product,
    Scaled,
    Scatter,
    Shape,
    Sum,
    Zero,
)
from torchjac.linear.maps.factors import is_unknown, map_unexpanded

_MOST_TERMS = 64  # terms of one adjoint: a program with more fills in
_PADDING = 4  # padded entries for each entry, in a table of rows of different lengths


class UnknownFactors(Exception):
    """Factors of a map are neither known nor computable; the operation itself must run."""


def apply(map_: LinearMap, adjoint: Adjoint) -> Adjoint:
    """The adjoint of `map_(value)`.

    Raises:
        UnknownFactors: Factors of the map are not known.
        PlanRefused: The adjoint would fill in.
    """
    terms: list[Term] = []
    if 0 in map_.shape_out:
        return Adjoint(map_.shape_out, ())
    for term in adjoint.terms:
        terms += _apply(map_, adjoint.shape, term)
    return sum_terms(map_.shape_out, terms)


def sum_terms(shape: Shape, terms: Sequence[Term]) -> Adjoint:
    """The sum of terms, of which those with the same entries are added up.

    Raises:
        PlanRefused: Too many terms remain.
    """
    summands: list[Term] = []
    for term in terms:
        if not term.scale or 0 in term.loop:
            continue
        for i, other in enumerate(summands):
            if _same_entries(term, other):
                summands[i] = _add(other, term)
                break
        else:
            summands.append(term)
    if len(summands) > _MOST_TERMS:
        raise PlanRefused("intermediate values fill in: more and more rows meet in an element")
    return Adjoint(shape, tuple(summands))


def _same_entries(one: Term, other: Term) -> bool:
    """Whether two terms have the same rows and elements at each point of their loops."""
    if one.bottleneck is not other.bottleneck or one.loop != other.loop:
        return False
    if (one.elements is None) != (other.elements is None):
        return False
    if one.elements is not None and not _equal(one.elements, other.elements):
        return False
    return _equal(one.rows, other.rows)


def _equal(x: Tensor, y: Tensor | None) -> bool:
    """Whether two tensors of numbers are equal and broadcast along the same axes."""
    assert y is not None
    if x is y or (x.data_ptr() == y.data_ptr() and x.stride() == y.stride()):
        return True
    if varying_axes(x) != varying_axes(y):
        return False
    free = broadcast_axes(x)
    with real_values():
        return torch.equal(collapse(x, free), collapse(y, free))


def _add(one: Term, other: Term) -> Term:
    """The sum of two terms with the same entries."""
    if not one.factors and not other.factors:
        return replace(one, scale=one.scale + other.scale)
    if not one.factors or (other.factors and other.scale == 1):
        one, other = other, one
    axes = one.support | other.support
    free = [a for a in range(len(one.loop)) if a not in axes]
    x = collapse(product(one.factors), free)
    ratio = other.scale / one.scale
    if not other.factors:
        total = x + ratio
    else:
        total = torch.add(x, collapse(product(other.factors), free), alpha=ratio)
    return replace(one, factors=(total.expand(one.loop),))


@singledispatch
def _apply(map_: LinearMap, shape: Shape, term: Term) -> list[Term]:
    """The terms of `map_` times one term of an adjoint of a shape."""
    raise UnknownFactors


@_apply.register
def _(map_: Zero, shape: Shape, term: Term) -> list[Term]:
    return []


@_apply.register
def _(map_: Scaled, shape: Shape, term: Term) -> list[Term]:
    if math.isnan(map_.factor):
        raise UnknownFactors
    return [replace(term, scale=term.scale * map_.factor)]


@_apply.register
def _(map_: Sum, shape: Shape, term: Term) -> list[Term]:
    return [result for part in map_.parts for result in _apply(part, shape, term)]


@_apply.register
def _(map_: Product, shape: Shape, term: Term) -> list[Term]:
    terms = [term]
    for factor in reversed(map_.factors):
        terms = [result for one in terms for result in _apply(factor, shape, one)]
        shape = factor.shape_out
    return terms


@_apply.register
def _(map_: Diagonal, shape: Shape, term: Term) -> list[Term]:
    factors = map_.factors
    if not isinstance(factors, ComputedFactors) and is_unknown(factors):
        raise UnknownFactors
    if isinstance(factors, ComputedFactors):
        diagonal = factors.value
    else:
        diagonal = map_unexpanded(lambda x: x.to(term.dtype), factors)
    if term.elements is None:
        trailing = len(term.loop) - len(shape)
        diagonal = diagonal.reshape((*shape, *[1] * trailing)) if trailing else diagonal
        return [t.multiply(term, diagonal.expand(term.loop))]
    return [t.multiply(term, StridedIndex.of(term.elements, shape).gather(diagonal, ()))]


@_apply.register
def _(map_: IndexMap, shape: Shape, term: Term) -> list[Term]:
    ndim, out = len(shape), map_.shape_out
    trailing = term.loop[ndim:]
    loop = (*out, *trailing)
    whole = term.elements is None and all(is_broadcast(term.rows, a) for a in range(ndim))
    if term.elements is not None or map_.fills:
        relabeled = _relabel_elements(map_, shape, term)
        if relabeled is not None:
            return relabeled
        if term.elements is not None:
            return _apply(map_, shape, group_by_element(term, shape))
    factors = [move_elements(map_.run, f, ndim, out) for f in term.factors]
    with real_values():
        if whole:
            rows = term.rows
            for _ in range(ndim):
                rows = rows.select(0, 0)
            rows = rows.expand(loop)
        else:
            shift = 1 if map_.fills else 0
            rows = move_elements(map_.run, _add_number(term.rows, shift), ndim, out)
            rows = _add_number(rows, -shift)
    moved = Term(loop, rows, term.dtype, (), term.scale, bottleneck=term.bottleneck)
    if whole and map_.fills and not term.factors:  # entries that the map fills in are zero
        like = torch.ones((), dtype=term.dtype).expand(shape)
        mask = map_.run(like).reshape((*out, *[1] * len(trailing))).expand(loop)
        return [t.multiply(moved, mask)]
    for factor in factors:
        moved = t.multiply(moved, factor.expand(loop))
    return [moved]


def _add_number(rows: Tensor, number: int) -> Tensor:
    return map_unexpanded(lambda x: x + number, rows) if number else rows


def _relabel_elements(map_: IndexMap, shape: Shape, term: Term) -> list[Term] | None:
    """The term with the same loop and factors, whose elements are listed anew.

    None where an element goes to several positions that are not those along an axis.
    """
    with real_values():
        positions = map_.positions()
        source = positions.reshape(-1)
        size = math.prod(shape)
        identity = source.numel() == size and torch.equal(source, torch.arange(size))
        if term.elements is not None and identity:
            return [term]
        free = [a for a in broadcast_axes(positions) if positions.shape[a] > 1]
        numbers = torch.arange(positions.numel()).reshape(positions.shape)
        source = collapse(positions, free).reshape(-1)
        destination = collapse(numbers, free).reshape(-1)
        used = (source >= 0).nonzero().flatten()
        count = torch.bincount(source[used], minlength=size)
        if bool((count > 1).any()):
            return None
        destination_of = torch.full((size,), -1)
        destination_of[source[used]] = destination[used]
        elements = with_zero_strides(
            map_unexpanded(lambda x: destination_of[x], t.elements(term, shape))
        )
        rows = map_unexpanded(
            lambda r, e: torch.where(e < 0, -1, r), term.rows, elements.expand(term.loop)
        )
        elements = map_unexpanded(lambda x: x.clamp(min=0), elements)
        for axis in free:  # a repeated element has entries along an axis of its own
            steps = torch.arange(positions.shape[axis])
            elements = elements.unsqueeze(-1) + steps * math.prod(map_.shape_out[axis + 1 :])
        loop = (*term.loop, *(positions.shape[a] for a in free))
        rows = append_axes(with_zero_strides(rows), loop)
        elements = with_zero_strides(elements)
        relabeled = replace(term, loop=loop, rows=rows, elements=elements, factors=())
    for factor in term.factors:
        relabeled = t.multiply(relabeled, append_axes(factor, loop))
    return [relabeled]


@_apply.register
def _(map_: AxisSum, shape: Shape, term: Term) -> list[Term]:
    """Axes with equal rows are summed; all other axes stay in the loop, as its last ones."""
    if term.elements is not None:
        return [_sum_listed(map_, shape, term)]
    free = broadcast_axes(term.rows, map_.axes)
    bound = [a for a in map_.axes if a not in free]
    outer = [i for i in range(len(shape)) if i not in map_.axes]
    trailing = range(len(shape), len(term.loop))
    total = t.sum_axes(term, free) if free else term
    remaining = [i for i in range(len(term.loop)) if i not in free]
    order = [remaining.index(i) for i in (*outer, *trailing, *bound)]
    if order == list(range(len(order))):
        return [total]
    return [
        Term(
            tuple(total.loop[i] for i in order),
            total.rows.permute(order),
            total.dtype,
            tuple(f.permute(order) for f in total.factors),
            total.scale,
            bottleneck=total.bottleneck,
        )
    ]


def _sum_listed(map_: AxisSum, shape: Shape, term: Term) -> Term:
    """A sum along axes of a term that lists its elements."""
    assert term.elements is not None
    with real_values():
        sums = torch.arange(math.prod(map_.shape_out)).reshape(map_.shape_out)
        for axis in map_.axes:
            sums = sums.unsqueeze(axis)
        flat = sums.expand(shape).reshape(-1)
        elements = with_zero_strides(map_unexpanded(lambda x: flat[x], term.elements))
        both = broadcast_axes(elements)
        both = [a for a in broadcast_axes(term.rows, both) if term.loop[a] > 1]
    term = replace(term, elements=elements)
    return t.sum_axes(term, both) if both else term


@_apply.register
def _(map_: Scatter, shape: Shape, term: Term) -> list[Term]:
    """The loop stays, and its elements are listed."""
    out, axis = map_.shape_out, map_.axis
    with real_values():
        destination = torch.arange(math.prod(out)).reshape(out).index_select(axis, map_.index)
        if term.elements is not None:
            flat = destination.reshape(-1)
            return [replace(term, elements=map_unexpanded(lambda x: flat[x], term.elements))]
        trailing = [1] * (len(term.loop) - len(shape))
        elements = destination.reshape((*shape, *trailing)).expand(term.loop)
        return [replace(term, elements=elements)]


def group_by_element(term: Term, shape: Shape) -> Term:
    """The same entries in a loop whose first axes are those of the value, padded.

    Raises:
        PlanRefused: Some elements have many more entries than others.
    """
    if term.elements is None:
        return term
    size = math.prod(shape)
    if not varying_axes(term.elements) & varying_axes(term.rows):
        return _fill_in(term, term.elements, shape)
    with real_values():
        elements = term.elements.expand(term.loop).reshape(-1)
        rows = term.rows.expand(term.loop).reshape(-1)
        elements = torch.where(rows < 0, size, elements)
        order = torch.argsort(elements, stable=True)
        count = torch.bincount(elements, minlength=size + 1)[:size]
        width = int(count.max()) if size else 0
        if size * width > _PADDING * len(rows) + 1024:
            raise PlanRefused("some elements collect many more entries than others")
        begin = torch.cumsum(count, 0) - count
        slot = begin[:, None] + torch.arange(width)
        valid = torch.arange(width) < count[:, None]
        entry = order[torch.where(valid, slot, 0)]
        rows = torch.where(valid, rows[entry], -1).reshape((*shape, width))
    loop = (*shape, width)
    if not term.factors:
        return Term(loop, rows, term.dtype, (), term.scale, bottleneck=term.bottleneck)
    values = product(term.factors).reshape(-1).index_select(0, entry.reshape(-1))
    factors = (values.reshape(loop),)
    return Term(loop, rows, term.dtype, factors, term.scale, bottleneck=term.bottleneck)


def _fill_in(term: Term, elements: Tensor, shape: Shape) -> Term:
    """The entries of elements that all have the same rows, and zeros for all other elements."""
    axes = range(len(term.loop))
    own, rest = sorted(varying_axes(elements)), sorted(varying_axes(term.rows))
    with real_values():
        where = collapse(elements, [a for a in axes if a not in own]).reshape(-1)
        sizes = [term.loop[a] for a in rest]
        loop = (*shape, *sizes)
        rows = collapse(term.rows, [a for a in axes if a not in rest])
        rows = rows.reshape((*[1] * len(shape), *sizes)).expand(loop)
    both = [a for a in axes if a not in own and a not in rest]
    values = t.entries(t.sum_axes(term, both) if both else term)
    remaining = [a for a in axes if a not in both]
    values = values.permute([remaining.index(a) for a in (*own, *rest)]).reshape(len(where), -1)
    dense = values.new_zeros((math.prod(shape), values.shape[1])).index_add(0, where, values)
    return Term(loop, rows, term.dtype, (dense.reshape(loop),), bottleneck=term.bottleneck)
