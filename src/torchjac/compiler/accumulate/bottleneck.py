"""Waists: values with fewer elements than rows of J that meet in them.

From a waist on, what follows is accumulated as if the waist were the output: its elements take the
place of rows, and its own adjoint waits until the end. So `x + g(x.mean())` stays a diagonal and a
product of two vectors, and a layer of 20 between layers of 1000 costs 20 columns, not 1000. The
products that are left then are those of a chain of matrices, each taken from the cheaper side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from torchjac._torch.modes import real_values
from torchjac.compiler.accumulate import adjoint as t
from torchjac.compiler.accumulate.adjoint import Adjoint, Term, Waist
from torchjac.compiler.accumulate.apply import by_element, joined
from torchjac.compiler.accumulate.strided_index import Walk
from torchjac.errors import PlanRefused
from torchjac.linear.maps import Shape
from torchjac.linear.maps.factors import map_unexpanded

# Rows that meet in an element, for each element of a sample, that make a waist; and at least.
_NARROW, _LEAST = 2, 4
# Fewer entries than this cost less than the product at the end, unless all rows meet in them, and J
# has so many.
_SMALL, _RESULT = 4096, 2**15
# An adjoint with this share of all entries it could have is taken for dense.
_DENSE = 0.6


def narrowed(
    adjoint: Adjoint, number: int, block: tuple[int, int], columns: int, below: int, most: int
) -> Adjoint:
    """The adjoint of a value in terms of its own elements, where it is a waist.

    Args:
        adjoint: Its adjoint.
        number: For the waist, if it is one.
        block: Rows and columns of J, of one sample.
        columns: Number of columns of J.
        below: Operations that its terms will still go through.
        most: Numbers that a product may have.
    """
    size = math.prod(adjoint.shape)
    entries = sum(math.prod(term.loop) for term in adjoint.terms)
    all_meet = entries >= _DENSE * block[0] * size and math.prod(block) >= _RESULT
    if not below or (entries < _SMALL and not all_meet):
        return adjoint
    if entries < max(_LEAST, _NARROW * _own(adjoint)) * size:
        return adjoint
    made = opened(adjoint, number)
    if made is None or size > columns:  # else it is cheaper to come from the other side
        return adjoint if made is None else made
    (term,) = made.terms
    assert term.table is not None
    table = replace(term.table, adjoint=resolved(term.table.adjoint, most))
    return replace(made, terms=(replace(term, table=table),))


def opened(adjoint: Adjoint, number: int) -> Adjoint | None:
    """The adjoint of a value in terms of its own elements; None if rows are of many lengths."""
    try:
        terms = [by_element(term, adjoint.shape) for term in adjoint.terms]
    except PlanRefused:
        return None
    rows = torch.arange(math.prod(adjoint.shape)).reshape(adjoint.shape)
    waist = Waist(number, Adjoint(adjoint.shape, tuple(terms)))
    return Adjoint(adjoint.shape, (Term(adjoint.shape, rows, terms[0].dtype, table=waist),))


def is_dense(adjoint: Adjoint, samples: int, m: int) -> bool:
    """Whether nearly all rows of a sample meet in each element, rows of J or those of one waist."""
    tables = {id(term.table): term.table for term in adjoint.terms}
    if len(tables) != 1:
        return False
    (table,) = tables.values()
    rows = (m if table is None else math.prod(table.adjoint.shape)) // samples
    entries = sum(math.prod(term.loop) for term in adjoint.terms)
    return entries >= _DENSE * rows * math.prod(adjoint.shape)


def _own(adjoint: Adjoint) -> int:
    """Elements that share rows: those of a sample, where the first axis is one of samples."""
    size, shape = math.prod(adjoint.shape), adjoint.shape
    if len(shape) < 1 or shape[0] < 2 or any(x.target is not None for x in adjoint.terms):
        return size
    with real_values():
        low = torch.full((shape[0],), 2**62)
        high = torch.full((shape[0],), -1)
        for term in adjoint.terms:
            if term.table is not None or t.is_free(term.rows, 0):
                return size
            free = [a for a in range(1, len(term.loop)) if t.is_free(term.rows, a)]
            flat = t.compact(term.rows, free).reshape(shape[0], -1)
            low = torch.minimum(low, _along(torch.minimum, flat))
            high = torch.maximum(high, _along(torch.maximum, flat))
        order = torch.argsort(low)
        apart = bool((high[order][:-1] < low[order][1:]).all())
    return size // shape[0] if apart else size


def _along(choose: Callable[[Tensor, Tensor], Tensor], flat: Tensor) -> Tensor:
    """The least or largest element of each row; of short rows torch takes far longer."""
    while flat.shape[1] > 1:
        half = flat.shape[1] // 2
        flat = torch.cat([choose(flat[:, :half], flat[:, half : 2 * half]), flat[:, 2 * half :]], 1)
    return flat[:, 0]


def resolved(adjoint: Adjoint, most: int) -> Adjoint:
    """The same in terms of rows of J, by products of no more than `most` numbers.

    Raises:
        PlanRefused: It would fill in.
    """
    while True:
        waists = [term.table for term in adjoint.terms if term.table is not None]
        if not waists:
            return adjoint
        adjoint = closed(adjoint, max(w.number for w in waists), most)


def closed(adjoint: Adjoint, number: int, most: int) -> Adjoint:
    """The same without terms in terms of one waist, by products of no more than `most` numbers.

    Raises:
        PlanRefused: It would fill in.
    """
    found: list[Term] = []
    for term in adjoint.terms:
        if term.table is not None and term.table.number == number:
            found += _composed(term, term.table.adjoint, adjoint.shape, most)
        else:
            found.append(term)
    return joined(adjoint.shape, found)


def _composed(term: Term, inner: Adjoint, shape: Shape, most: int) -> list[Term]:
    """The product of a term and the adjoint whose elements are its rows."""
    placed = Walk.of(term.rows, inner.shape)
    own = 0 if term.target is not None else len(shape)
    found = []
    for other in inner.terms:
        more = other.loop[len(inner.shape) :]
        loop = (*term.loop, *more)
        behind = {a for t_ in (other.rows, *other.factors) for a in t.changing(t_)}
        along = {a + len(term.loop) - len(inner.shape) for a in behind if a >= len(inner.shape)}
        axes = along | t.changing(term.rows) | term.support
        if math.prod(loop[a] for a in axes) > most:
            raise PlanRefused("a product of Jacobians would fill in")
        with real_values():
            rows = placed.take(other.rows, more)
            if bool((term.rows < 0).any()):
                mine = _widened(term.rows, loop)
                rows = map_unexpanded(lambda p, r: torch.where(p < 0, -1, r), mine, rows)
            target = None if term.target is None else _widened(term.target, loop)
        made = Term(loop, rows, term.dtype, (), term.scale * other.scale, target, other.table)
        for factor in term.factors:
            made = t.scaled(made, _widened(factor, loop))
        for factor in other.factors:
            made = t.scaled(made, placed.take(factor, more))
        free = [
            a
            for a in range(own, len(term.loop))
            if t.is_free(rows, a) and (target is None or t.is_free(target, a))
        ]
        found.append(t.summed(made, free) if free else made)
    return found


def _widened(tensor: Tensor, loop: Shape) -> Tensor:
    """A tensor with axes behind its own along which it is the same."""
    return tensor.reshape((*tensor.shape, *[1] * (len(loop) - tensor.ndim))).expand(loop)
