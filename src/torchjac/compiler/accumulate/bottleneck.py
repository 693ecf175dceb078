"""Bottlenecks: values with fewer elements than rows of J that meet in them.

From a bottleneck on, later values are accumulated as if the bottleneck were the output: its
elements take the place of rows, and the adjoint of the bottleneck waits until the end. So
`x + g(x.mean())` stays a diagonal and a product of two vectors, and a layer of 20 between layers
of 1000 costs 20 columns, not 1000. The products that remain are those of a chain of matrices, each
multiplied from the cheaper side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from torchjac._torch.modes import real_values
from torchjac.compiler.accumulate import adjoint as t
from torchjac.compiler.accumulate.adjoint import Adjoint, Bottleneck, Term
from torchjac.compiler.accumulate.apply import group_by_element, sum_terms
from torchjac.compiler.accumulate.broadcast import (
    append_axes,
    broadcast_axes,
    collapse,
    is_broadcast,
    varying_axes,
)
from torchjac.compiler.accumulate.strided_index import StridedIndex
from torchjac.errors import PlanRefused
from torchjac.linear.maps import Shape
from torchjac.linear.maps.factors import map_unexpanded

# A value is a bottleneck if, on average, at least this many rows meet in an element:
_NARROW = 2  # for each element of a sample
_LEAST_ROWS = 4  # however few elements a sample has
# Below this many entries splitting costs more than it saves, unless the adjoint is dense, J large.
_FEW_ENTRIES = 4096
_LARGE_BLOCK = 2**15  # entries of J, of one sample: above, J is large
_DENSE = 0.6  # share of all entries above which an adjoint counts as dense


def split_if_narrow(
    adjoint: Adjoint, number: int, block: tuple[int, int], columns: int, remaining: int, most: int
) -> Adjoint:
    """The adjoint of a value in terms of its own elements, if the value is a bottleneck.

    Args:
        adjoint: The adjoint of the value.
        number: Number of the bottleneck.
        block: Rows and columns of J, of one sample.
        columns: Number of columns of J.
        remaining: Number of operations that its terms still go through.
        most: Largest number of elements of a product.
    """
    size = math.prod(adjoint.shape)
    entries = sum(math.prod(term.loop) for term in adjoint.terms)
    dense = entries >= _DENSE * block[0] * size and math.prod(block) >= _LARGE_BLOCK
    if not remaining or (entries < _FEW_ENTRIES and not dense):
        return adjoint
    if entries < max(_LEAST_ROWS, _NARROW * _elements_per_sample(adjoint)) * size:
        return adjoint
    identity = split(adjoint, number)
    if identity is None or size > columns:  # with more elements, the product comes last
        return adjoint if identity is None else identity
    (term,) = identity.terms
    assert term.bottleneck is not None
    bottleneck = term.bottleneck
    bottleneck = replace(bottleneck, adjoint=eliminate_all(bottleneck.adjoint, most))
    return replace(identity, terms=(replace(term, bottleneck=bottleneck),))


def split(adjoint: Adjoint, number: int) -> Adjoint | None:
    """The identity on a value's own elements, which keeps the adjoint as that of a bottleneck.

    None if the elements have rows of very different numbers.
    """
    try:
        terms = [group_by_element(term, adjoint.shape) for term in adjoint.terms]
    except PlanRefused:
        return None
    rows = torch.arange(math.prod(adjoint.shape)).reshape(adjoint.shape)
    bottleneck = Bottleneck(number, Adjoint(adjoint.shape, tuple(terms)))
    identity = Term(adjoint.shape, rows, terms[0].dtype, bottleneck=bottleneck)
    return Adjoint(adjoint.shape, (identity,))


def is_dense(adjoint: Adjoint, samples: int, m: int) -> bool:
    """Whether nearly all rows of a sample meet in each element: rows of J, or of one bottleneck."""
    bottlenecks = {id(term.bottleneck): term.bottleneck for term in adjoint.terms}
    if len(bottlenecks) != 1:
        return False
    (bottleneck,) = bottlenecks.values()
    rows = (m if bottleneck is None else math.prod(bottleneck.adjoint.shape)) // samples
    entries = sum(math.prod(term.loop) for term in adjoint.terms)
    return entries >= _DENSE * rows * math.prod(adjoint.shape)


def _elements_per_sample(adjoint: Adjoint) -> int:
    """Number of elements that share rows: those of a sample, if the first axis is the batch."""
    size, shape = math.prod(adjoint.shape), adjoint.shape
    if len(shape) < 1 or shape[0] < 2 or any(x.elements is not None for x in adjoint.terms):
        return size
    with real_values():
        low = torch.full((shape[0],), 2**62)
        high = torch.full((shape[0],), -1)
        for term in adjoint.terms:
            if term.bottleneck is not None or is_broadcast(term.rows, 0):
                return size
            free = broadcast_axes(term.rows, range(1, len(term.loop)))
            flat = collapse(term.rows, free).reshape(shape[0], -1)
            low = torch.minimum(low, _reduce_columns(torch.minimum, flat))
            high = torch.maximum(high, _reduce_columns(torch.maximum, flat))
        order = torch.argsort(low)
        apart = bool((high[order][:-1] < low[order][1:]).all())
    return size // shape[0] if apart else size


def _reduce_columns(choose: Callable[[Tensor, Tensor], Tensor], flat: Tensor) -> Tensor:
    """The minimum or maximum of each row, by halves: torch's own reduction is slow on short rows.

    Args:
        choose: `torch.minimum` or `torch.maximum`.
        flat: The rows.
    """
    while flat.shape[1] > 1:
        half = flat.shape[1] // 2
        flat = torch.cat([choose(flat[:, :half], flat[:, half : 2 * half]), flat[:, 2 * half :]], 1)
    return flat[:, 0]


def eliminate_all(adjoint: Adjoint, most: int) -> Adjoint:
    """The same adjoint in terms of rows of J: every bottleneck is eliminated, the latest first.

    Args:
        adjoint: An adjoint.
        most: Largest number of elements of a product.

    Raises:
        PlanRefused: A product would fill in.
    """
    while True:
        bottlenecks = [x.bottleneck for x in adjoint.terms if x.bottleneck is not None]
        if not bottlenecks:
            return adjoint
        adjoint = eliminate(adjoint, max(b.number for b in bottlenecks), most)


def eliminate(adjoint: Adjoint, number: int, most: int) -> Adjoint:
    """The same adjoint without one bottleneck: its terms are multiplied by the bottleneck's own.

    Args:
        adjoint: An adjoint.
        number: Number of the bottleneck.
        most: Largest number of elements of a product.

    Raises:
        PlanRefused: A product would fill in.
    """
    terms: list[Term] = []
    for term in adjoint.terms:
        if term.bottleneck is not None and term.bottleneck.number == number:
            terms += _multiply(term, term.bottleneck.adjoint, adjoint.shape, most)
        else:
            terms.append(term)
    return sum_terms(adjoint.shape, terms)


def _multiply(term: Term, inner: Adjoint, shape: Shape, most: int) -> list[Term]:
    """The product of a term and the adjoint of the value whose elements are its rows."""
    index = StridedIndex.of(term.rows, inner.shape)
    own = 0 if term.elements is not None else len(shape)
    products = []
    for other in inner.terms:
        trailing = other.loop[len(inner.shape) :]
        loop = (*term.loop, *trailing)
        if math.prod(loop[a] for a in _product_axes(term, other, len(inner.shape))) > most:
            raise PlanRefused("a product of Jacobians would fill in")
        with real_values():
            rows = index.gather(other.rows, trailing)
            if bool((term.rows < 0).any()):
                outer = append_axes(term.rows, loop)
                rows = map_unexpanded(lambda p, r: torch.where(p < 0, -1, r), outer, rows)
            elements = None if term.elements is None else append_axes(term.elements, loop)
        scale = term.scale * other.scale
        total = Term(loop, rows, term.dtype, (), scale, elements, other.bottleneck)
        for factor in term.factors:
            total = t.multiply(total, append_axes(factor, loop))
        for factor in other.factors:
            total = t.multiply(total, index.gather(factor, trailing))
        free = broadcast_axes(rows, range(own, len(term.loop)))
        free = free if elements is None else broadcast_axes(elements, free)
        products.append(t.sum_axes(total, free) if free else total)
    return products


def _product_axes(term: Term, other: Term, ndim: int) -> set[int]:
    """Axes along which the product of two terms varies.

    Args:
        term: The outer term, whose rows are elements of a bottleneck.
        other: The inner term: one of the bottleneck's adjoint.
        ndim: Number of axes of the bottleneck.
    """
    varying = {a for tensor in (other.rows, *other.factors) for a in varying_axes(tensor)}
    trailing = {a + len(term.loop) - ndim for a in varying if a >= ndim}
    return trailing | varying_axes(term.rows) | term.support
