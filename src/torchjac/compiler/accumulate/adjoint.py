"""The adjoint of a value of the linear graph, as a sum of terms.

A value of the linear graph is a linear function of the cotangent, which has one element for each
row of J. The matrix of that function is a sum of terms. A term is a loop over some axes; at each
point of the loop the product of the factors is the entry between one row of J and one element of
the value. Rows and elements are constants of the plan, factors are tensors of the running program.
Along an axis of the loop on which a factor is constant its stride is 0: nothing is stored or
computed twice.

The first axes of the loop are those of the value itself, unless the term lists its elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchjac.compiler.accumulate.broadcast import contract, is_broadcast, product, varying_axes
from torchjac.errors import PlanRefused
from torchjac.linear.maps import Shape
from torchjac.linear.maps.factors import map_unexpanded


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One loop over entries.

    Attributes:
        loop: Sizes of the axes: those of the value (unless elements are listed), then all others.
        rows: Row of J at each point, int64; -1 where there is no entry. Not a running tensor.
        dtype: Dtype of the cotangent.
        factors: Running tensors of the loop's shape; the entry is their product.
        scale: A constant factor of every entry.
        elements: Element of the value at each point; None if the first axes are the value's.
        bottleneck: The value whose elements `rows` counts; None for rows of J.
    """

    loop: Shape
    rows: Tensor
    dtype: torch.dtype
    factors: tuple[Tensor, ...] = ()
    scale: float = 1.0
    elements: Tensor | None = None
    bottleneck: Bottleneck | None = None

    @property
    def support(self) -> frozenset[int]:
        """Axes along which a factor varies."""
        return frozenset().union(*map(varying_axes, self.factors))

    @property
    def size(self) -> int:
        """Number of elements of the product of all factors."""
        return math.prod(self.loop[a] for a in self.support)


@dataclass(frozen=True, slots=True, eq=False)
class Adjoint:
    """A linear function of the cotangent.

    Attributes:
        shape: Shape of the value.
        terms: The summands.
    """

    shape: Shape
    terms: tuple[Term, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Bottleneck:
    """A value whose elements take the place of rows.

    Attributes:
        number: Position in the sweep: later bottlenecks have higher numbers.
        adjoint: The adjoint of the value.
    """

    number: int
    adjoint: Adjoint


def seed(shape: Shape, first: int, dtype: torch.dtype) -> Adjoint:
    """The adjoint of an output leaf: the identity, on rows from `first` on."""
    size = math.prod(shape)
    rows = torch.arange(first, first + size).reshape(shape)
    return Adjoint(shape, (Term(shape, rows, dtype),) if size else ())


def elements(term: Term, shape: Shape) -> Tensor:
    """Element of the value at each point of the loop, broadcast where the term lists none."""
    if term.elements is not None:
        return term.elements.expand(term.loop)
    flat = torch.arange(math.prod(shape)).reshape(shape)
    return flat.reshape((*shape, *[1] * (len(term.loop) - len(shape)))).expand(term.loop)


def entries(term: Term) -> Tensor:
    """The entries of a term, of the loop's shape."""
    if not term.factors:
        return torch.full((), term.scale, dtype=term.dtype).expand(term.loop)
    total = product(sorted(term.factors, key=lambda f: len(varying_axes(f))))
    return total if term.scale == 1 else map_unexpanded(lambda x: x * term.scale, total)


def entries_like(term: Term, like: Tensor) -> Tensor:
    """The entries of a term in the dtype of J.

    Args:
        term: The term.
        like: A tensor of the dtype of J.

    Raises:
        PlanRefused: The entries are complex, and J is real.
    """
    values = entries(term)
    if values.is_complex() and not like.is_complex():
        raise PlanRefused("complex values are taken for real ones in a way that is not followed")
    return (
        values if values.dtype == like.dtype else map_unexpanded(lambda x: x.to(like.dtype), values)
    )


def multiply(term: Term, factor: Tensor) -> Term:
    """A term times a running tensor of the loop's shape.

    Two factors are multiplied only if the product is no larger than one of them: a small factor may
    be multiplied more cheaply with one that is still to come.
    """
    axes = varying_axes(factor)
    if not axes and not term.factors:
        return replace(term, factors=(factor,))
    for i, other in enumerate(term.factors):
        own = varying_axes(other)
        if own == axes or (len(term.factors) > 1 and (own >= axes or own <= axes)):
            if own < axes and _has_smaller_host(term, i, axes):
                continue
            total = map_unexpanded(torch.mul, other, factor)
            return replace(term, factors=(*term.factors[:i], total, *term.factors[i + 1 :]))
    return replace(term, factors=(*term.factors, factor))


def _has_smaller_host(term: Term, i: int, axes: frozenset[int]) -> bool:
    """Whether factor `i` fits into another factor that is smaller than a tensor varying along axes.

    A diagonal between two matrices goes with the smaller matrix when they are multiplied.
    """
    own, size = varying_axes(term.factors[i]), math.prod(term.loop[a] for a in axes)
    hosts = [varying_axes(f) for k, f in enumerate(term.factors) if k != i]
    return any(
        own <= host and not host <= axes and math.prod(term.loop[a] for a in host) < size
        for host in hosts
    )


def sum_axes(term: Term, axes: Sequence[int]) -> Term:
    """The sum over axes of the loop along which rows are constant; the loop loses these axes.

    The sum is a matrix product where two factors vary along the axes.
    """
    count = math.prod(term.loop[a] for a in axes if all(is_broadcast(f, a) for f in term.factors))
    summed = frozenset(axes)
    outside = [f for f in term.factors if not varying_axes(f) & summed]
    inside = [f for f in term.factors if varying_axes(f) & summed]
    while len(inside) > 2:
        inside = _multiply_smallest_pair(inside)
    inside, outside = _absorb(inside, outside, summed, term.loop)
    if inside:
        outside.append(contract(inside, summed))

    def without(tensor: Tensor) -> Tensor:
        for axis in sorted(summed, reverse=True):
            tensor = tensor.select(axis, 0)
        return tensor

    total = Term(
        tuple(size for i, size in enumerate(term.loop) if i not in summed),
        without(term.rows),
        term.dtype,
        scale=term.scale * count,
        elements=None if term.elements is None else without(term.elements),
        bottleneck=term.bottleneck,
    )
    for factor in outside:
        total = multiply(total, without(factor))
    return total


def _absorb(
    inside: list[Tensor], outside: list[Tensor], axes: frozenset[int], loop: Shape
) -> tuple[list[Tensor], list[Tensor]]:
    """Multiplies outer factors into inner ones that are no larger than the result of the sum.

    Args:
        inside: Factors that vary along the axes of the sum.
        outside: Factors that do not.
        axes: The axes of the sum.
        loop: Sizes of all axes.

    Returns:
        The inner factors, and the outer factors that remain.
    """
    result_axes = frozenset().union(*map(varying_axes, inside)) - axes
    result = math.prod(loop[a] for a in result_axes)
    remaining = []
    for factor in outside:
        hosts = [
            (math.prod(loop[a] for a in varying_axes(f)), i)
            for i, f in enumerate(inside)
            if varying_axes(factor) <= varying_axes(f)
        ]
        if hosts and min(hosts)[0] <= result:
            i = min(hosts)[1]
            inside = [*inside[:i], map_unexpanded(torch.mul, inside[i], factor), *inside[i + 1 :]]
        else:
            remaining.append(factor)
    return inside, remaining


def _multiply_smallest_pair(factors: list[Tensor]) -> list[Tensor]:
    """The same factors, except that the two with the smallest product are multiplied."""
    shape = factors[0].shape
    pairs = [(i, j) for i in range(len(factors)) for j in range(i)]

    def size(pair: tuple[int, int]) -> int:
        axes = varying_axes(factors[pair[0]]) | varying_axes(factors[pair[1]])
        return math.prod(shape[a] for a in axes)

    i, j = min(pairs, key=size)
    rest = [f for k, f in enumerate(factors) if k not in (i, j)]
    return [*rest, map_unexpanded(torch.mul, factors[i], factors[j])]
