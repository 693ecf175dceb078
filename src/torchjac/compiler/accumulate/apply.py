"""What a local Jacobian makes of an adjoint: products of maps and terms, in numbers."""

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
from torchjac.compiler.accumulate.strided_index import Walk, compressed
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

# Terms that one adjoint may have: a program whose intermediates fill in has more and more.
_TERMS = 64
# A table of rows of different lengths is padded if that makes it no more than this much larger.
_PADDING = 4


class NoNumbers(Exception):
    """The factors of a map are not to be had; the operation itself must be run."""


def apply(map_: LinearMap, adjoint: Adjoint) -> Adjoint:
    """The adjoint of `map_(value)`.

    Raises:
        NoNumbers: Factors of the map are not known.
        PlanRefused: It would fill in.
    """
    found: list[Term] = []
    if 0 in map_.shape_out:
        return Adjoint(map_.shape_out, ())
    for term in adjoint.terms:
        found += _acted(map_, adjoint.shape, term)
    return joined(map_.shape_out, found)


def joined(shape: Shape, terms: Sequence[Term]) -> Adjoint:
    """The sum of terms; those with the same rows are added up.

    Raises:
        PlanRefused: There are too many.
    """
    kept: list[Term] = []
    for term in terms:
        if not term.scale or 0 in term.loop:
            continue
        for i, other in enumerate(kept):
            if _alike(term, other):
                kept[i] = _added(other, term)
                break
        else:
            kept.append(term)
    if len(kept) > _TERMS:
        raise PlanRefused("intermediate values fill in: more and more rows meet in an element")
    return Adjoint(shape, tuple(kept))


def _alike(one: Term, other: Term) -> bool:
    """Whether entries of two terms are in the same places."""
    if one.table is not other.table or one.loop != other.loop:
        return False
    if (one.target is None) != (other.target is None):
        return False
    if one.target is not None and not _equal(one.target, other.target):
        return False
    return _equal(one.rows, other.rows)


def _equal(x: Tensor, y: Tensor | None) -> bool:
    assert y is not None
    if x is y or (x.data_ptr() == y.data_ptr() and x.stride() == y.stride()):
        return True
    axes = range(x.ndim)
    if t.changing(x) != t.changing(y):
        return False
    free = [a for a in axes if t.is_free(x, a)]
    with real_values():
        return torch.equal(t.compact(x, free), t.compact(y, free))


def _added(one: Term, other: Term) -> Term:
    """Two terms with entries in the same places as one."""
    if not one.factors and not other.factors:
        return replace(one, scale=one.scale + other.scale)
    if not one.factors or (other.factors and other.scale == 1):
        one, other = other, one
    axes = one.support | other.support
    free = [a for a in range(len(one.loop)) if a not in axes]
    x = t.compact(t.product(one.factors), free)
    ratio = other.scale / one.scale
    if not other.factors:
        made = x + ratio
    else:
        made = torch.add(x, t.compact(t.product(other.factors), free), alpha=ratio)
    return replace(one, factors=(made.expand(one.loop),))


@singledispatch
def _acted(map_: LinearMap, shape: Shape, term: Term) -> list[Term]:
    raise NoNumbers


@_acted.register
def _(map_: Zero, shape: Shape, term: Term) -> list[Term]:
    return []


@_acted.register
def _(map_: Scaled, shape: Shape, term: Term) -> list[Term]:
    if math.isnan(map_.factor):
        raise NoNumbers
    return [replace(term, scale=term.scale * map_.factor)]


@_acted.register
def _(map_: Sum, shape: Shape, term: Term) -> list[Term]:
    return [made for part in map_.parts for made in _acted(part, shape, term)]


@_acted.register
def _(map_: Product, shape: Shape, term: Term) -> list[Term]:
    found = [term]
    for factor in reversed(map_.factors):
        found = [made for one in found for made in _acted(factor, shape, one)]
        shape = factor.shape_out
    return found


@_acted.register
def _(map_: Diagonal, shape: Shape, term: Term) -> list[Term]:
    factors = map_.factors
    if not isinstance(factors, ComputedFactors) and is_unknown(factors):
        raise NoNumbers
    if isinstance(factors, ComputedFactors):
        made = factors.value
    else:
        made = map_unexpanded(lambda x: x.to(term.dtype), factors)
    if term.target is None:
        rest = len(term.loop) - len(shape)
        made = made.reshape((*shape, *[1] * rest)) if rest else made
        return [t.scaled(term, made.expand(term.loop))]
    taken = Walk.of(term.target, shape).take(made, ())
    return [t.scaled(term, taken)]


@_acted.register
def _(map_: IndexMap, shape: Shape, term: Term) -> list[Term]:
    ndim, out = len(shape), map_.shape_out
    rest = term.loop[ndim:]
    loop = (*out, *rest)
    whole = term.target is None and all(t.is_free(term.rows, a) for a in range(ndim))
    if term.target is not None or map_.fills:
        found = _moved_target(map_, shape, term)
        if found is not None:
            return found
        if term.target is not None:
            return _acted(map_, shape, by_element(term, shape))
    factors = [t.moved(map_.run, f, ndim, out) for f in term.factors]
    with real_values():
        if whole:
            rows = term.rows
            for _ in range(ndim):
                rows = rows.select(0, 0)
            rows = rows.expand(loop)
        else:
            shift = 1 if map_.fills else 0
            rows = t.moved(map_.run, _shifted(term.rows, shift), ndim, out)
            rows = _shifted(rows, -shift)
    made = Term(loop, rows, term.dtype, (), term.scale, table=term.table)
    if whole and map_.fills and not term.factors:  # where nothing came from, entries are zero
        like = torch.ones((), dtype=term.dtype).expand(shape)
        mask = map_.run(like).reshape((*out, *[1] * len(rest))).expand(loop)
        return [t.scaled(made, mask)]
    for factor in factors:
        made = t.scaled(made, factor.expand(loop))
    return [made]


def _shifted(rows: Tensor, by: int) -> Tensor:
    return map_unexpanded(lambda x: x + by, rows) if by else rows


def _moved_target(map_: IndexMap, shape: Shape, term: Term) -> list[Term] | None:
    """Entries stay in their loop and their elements are listed.

    None where an element goes to several places that are not those along an axis.
    """
    with real_values():
        positions = map_.positions()
        source = positions.reshape(-1)
        size = math.prod(shape)
        same = source.numel() == size and torch.equal(source, torch.arange(size))
        if term.target is not None and same:
            return [term]
        free = [a for a in range(positions.ndim) if t.is_free(positions, a)]
        free = [a for a in free if positions.shape[a] > 1]
        numbers = torch.arange(positions.numel()).reshape(positions.shape)
        source = t.compact(positions, free).reshape(-1)
        place = t.compact(numbers, free).reshape(-1)
        used = (source >= 0).nonzero().flatten()
        count = torch.bincount(source[used], minlength=size)
        if bool((count > 1).any()):
            return None
        goes = torch.full((size,), -1)
        goes[source[used]] = place[used]
        before = t.elements(term, shape)
        target = compressed(map_unexpanded(lambda x: goes[x], before))
        rows = map_unexpanded(
            lambda r, g: torch.where(g < 0, -1, r), term.rows, target.expand(term.loop)
        )
        target = map_unexpanded(lambda x: x.clamp(min=0), target)
        for axis in free:  # an element that is repeated: a loop of its own
            steps = torch.arange(positions.shape[axis])
            target = target.unsqueeze(-1) + steps * math.prod(map_.shape_out[axis + 1 :])
        loop = (*term.loop, *(positions.shape[a] for a in free))
        rows = _behind(compressed(rows), loop)
        made = replace(term, loop=loop, rows=rows, target=compressed(target), factors=())
    for factor in term.factors:
        made = t.scaled(made, _behind(factor, loop))
    return [made]


def _behind(tensor: Tensor, loop: Shape) -> Tensor:
    """A tensor with axes behind its own along which it is the same."""
    return tensor.reshape((*tensor.shape, *[1] * (len(loop) - tensor.ndim))).expand(loop)


@_acted.register
def _(map_: AxisSum, shape: Shape, term: Term) -> list[Term]:
    kept = [i for i in range(len(shape)) if i not in map_.axes]
    if term.target is not None:
        with real_values():
            places = torch.arange(math.prod(map_.shape_out)).reshape(map_.shape_out)
            for axis in map_.axes:
                places = places.unsqueeze(axis)
            flat = places.expand(shape).reshape(-1)
            target = compressed(map_unexpanded(lambda x: flat[x], term.target))
            both = [a for a in range(target.ndim) if t.is_free(target, a)]
            both = [a for a in both if t.is_free(term.rows, a) and term.loop[a] > 1]
        made = replace(term, target=target)
        return [t.summed(made, both) if both else made]
    free = [a for a in map_.axes if t.is_free(term.rows, a)]
    bound = [a for a in map_.axes if a not in free]
    rest = range(len(shape), len(term.loop))
    order = [*kept, *rest, *bound]
    made = t.summed(term, free) if free else term
    numbers = [i for i in range(len(term.loop)) if i not in free]
    where = [numbers.index(i) for i in order]
    if where == list(range(len(where))):
        return [made]
    return [
        Term(
            tuple(made.loop[i] for i in where),
            made.rows.permute(where),
            made.dtype,
            tuple(f.permute(where) for f in made.factors),
            made.scale,
            table=made.table,
        )
    ]


@_acted.register
def _(map_: Scatter, shape: Shape, term: Term) -> list[Term]:
    """Entries keep their place in the loop; their elements are listed."""
    out, axis = map_.shape_out, map_.axis
    with real_values():
        goes = torch.arange(math.prod(out)).reshape(out).index_select(axis, map_.index)
        if term.target is not None:
            flat = goes.reshape(-1)
            return [replace(term, target=map_unexpanded(lambda x: flat[x], term.target))]
        rest = [1] * (len(term.loop) - len(shape))
        return [replace(term, target=goes.reshape((*shape, *rest)).expand(term.loop))]


def _filled(term: Term, target: Tensor, shape: Shape) -> Term:
    """Entries of elements that all have the same rows, with zeros for the other elements."""
    own, rest = sorted(t.changing(target)), sorted(t.changing(term.rows))
    with real_values():
        others = [a for a in range(len(term.loop)) if a not in own]
        where = t.compact(target, others).reshape(-1)
        sizes = [term.loop[a] for a in rest]
        kept = [a for a in range(len(term.loop)) if a not in rest]
        loop = (*shape, *sizes)
        rows = t.compact(term.rows, kept).reshape((*[1] * len(shape), *sizes)).expand(loop)
    both = [a for a in range(len(term.loop)) if a not in own and a not in rest]
    values = t.entries(t.summed(term, both) if both else term)
    axes = [a for a in range(len(term.loop)) if a not in both]
    values = values.permute([axes.index(a) for a in (*own, *rest)]).reshape(len(where), -1)
    whole = values.new_zeros((math.prod(shape), values.shape[1])).index_add(0, where, values)
    return Term(loop, rows, term.dtype, (whole.reshape(loop),), table=term.table)


def by_element(term: Term, shape: Shape) -> Term:
    """A term whose first axes are those of the value: entries of an element, padded.

    Raises:
        PlanRefused: Some elements have many more entries than others.
    """
    if term.target is None:
        return term
    size = math.prod(shape)
    if not t.changing(term.target) & t.changing(term.rows):
        return _filled(term, term.target, shape)
    with real_values():
        target = term.target.expand(term.loop).reshape(-1)
        rows = term.rows.expand(term.loop).reshape(-1)
        target = torch.where(rows < 0, size, target)
        order = torch.argsort(target, stable=True)
        count = torch.bincount(target, minlength=size + 1)[:size]
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
        return Term(loop, rows, term.dtype, (), term.scale, table=term.table)
    made = t.product(term.factors).reshape(-1).index_select(0, entry.reshape(-1))
    return Term(loop, rows, term.dtype, (made.reshape(loop),), term.scale, table=term.table)
