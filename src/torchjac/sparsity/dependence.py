"""What each element of a tensor depends on: a map from all rows of J, kept in structured form.

A value of the linear graph is a linear function of the cotangent u, which has an element for every
row of J. Its matrix is kept as a sum of terms `Diagonal(factors) x IndexMap(positions) x table`:
element i of the value takes `factors[i]` times row `positions[i]` of a table (the identity, before
anything was summed). Moving elements touches positions only; elements that depend on the same
things share a row; what repeats along an axis has stride 0 and is never written out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from torchjac.linear.maps import (
    UNKNOWN,
    AxisSum,
    Dense,
    Diagonal,
    IndexMap,
    LinearMap,
    Product,
    Scaled,
    Scatter,
    Shape,
    Sum,
    Zero,
    times,
)
from torchjac.linear.maps.factors import Known, expand_factors, known, unexpanded
from torchjac.sparsity import csr as tables
from torchjac.sparsity.csr import first_row, numbered

# More terms than this are merged into one: each costs a pass over the elements (bundle adjustment
# of 31843 observations: 24 take 240 ms and 484 MB, 12 170 ms and 223 MB).
_TERMS = 12
# Known factors are followed as long as their number stays below this; after that only zeros are,
# and those as long as it stays below the second. Both bounds cost precision only.
_KNOWN = 2**22
_ZEROS = 2**26
# More entries than this in one table: everything in it is taken to depend on everything.
_ENTRIES = 2**28


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """Element i is `factors[i]` times row `positions[i]` of the table.

    Attributes:
        positions: Integers (32 bits where they fit), of the value's shape.
        factors: Float64 of that shape, or one number for all.
        table: CSR matrix with a column per row of J; None for the identity.
    """

    positions: Tensor
    factors: Known
    table: sparse.csr_array | None


@dataclass(frozen=True, slots=True, eq=False)
class Dependence:
    """A linear function of the cotangent.

    Attributes:
        shape: Shape of the value.
        m: Number of elements of the cotangent.
        terms: Added up.
    """

    shape: Shape
    m: int
    terms: tuple[Term, ...]


def seed(shape: Shape, first: int, m: int) -> Dependence:
    """The cotangent of one output leaf, whose rows begin at `first`."""
    shape = tuple(shape)
    if math.prod(shape) == 0:
        return nothing(shape, m)
    kind = torch.int32 if m < 2**31 else torch.int64
    positions = torch.arange(first, first + math.prod(shape), dtype=kind).reshape(shape)
    return Dependence(shape, m, (Term(positions, 1.0, None),))


def nothing(shape: Shape, m: int) -> Dependence:
    """A value that depends on nothing."""
    return Dependence(tuple(shape), m, ())


def everything(shape: Shape, m: int) -> Dependence:
    """A value of which nothing is known: every element may depend on every row."""
    shape = tuple(shape)
    if math.prod(shape) * m == 0:
        return nothing(shape, m)
    row = sparse.csr_array(np.full((1, m), np.nan))
    return Dependence(shape, m, (Term(first_row(shape), UNKNOWN, row),))


def joined(parts: list[Dependence]) -> Dependence:
    """The sum of dependences of the same shape."""
    if len(parts) == 1:
        return parts[0]
    terms: list[Term] = []
    where: dict[tuple[object, ...], int] = {}
    for part in parts:
        for term in part.terms:
            p = term.positions
            key = (p.data_ptr(), p.dtype, p.stride(), id(term.table))
            if key in where:
                other = terms[where[key]]
                total = tables.of_same_rows(other.factors, term.factors, term.table)
                terms[where[key]] = Term(p, total, term.table)
            else:
                where[key] = len(terms)
                terms.append(term)
    left = tuple(t for t in terms if isinstance(t.factors, Tensor) or t.factors != 0)
    made = Dependence(parts[0].shape, parts[0].m, left)
    return merged(made) if len(terms) > _TERMS else made


def merged(value: Dependence) -> Dependence:
    """The same with a single term."""
    if len(value.terms) <= 1:
        return value
    table, positions = distinct(value)
    return Dependence(value.shape, value.m, (Term(positions, 1.0, table),))


def distinct(value: Dependence) -> tuple[sparse.csr_array, Tensor]:
    """The rows of the dependence, repeated ones once where that shows, and which each element has.

    Returns:
        A CSR matrix, and for each element the number of its row; strides of 0 where it is the same.
    """
    axes = range(len(value.shape))
    free = [i for i in axes if value.shape[i] > 1 and all(_is_free(t, i) for t in value.terms)]
    shape = tuple(1 if i in free else s for i, s in enumerate(value.shape))
    small = Dependence(shape, value.m, tuple(_first_along(t, free) for t in value.terms))
    return matrix(small), numbered(shape).expand(value.shape)


def matrix(value: Dependence) -> sparse.csr_array:
    """The dependence as a CSR matrix: a row per element, a column per row of J.

    Stored values are the factors; NaN where they are not known. Column indices are sorted.
    """
    size = math.prod(value.shape)
    direct = [t for t in value.terms if t.table is None]
    made = None
    if direct:
        numbers = [t.factors if isinstance(t.factors, float) else t.factors.numpy() for t in direct]
        made = tables.stacked([t.positions.numpy() for t in direct], numbers, value.m)
    indirect = [t for t in value.terms if t.table is not None]
    if len(indirect) > 1:
        columns = [t.positions.reshape(-1, 1).numpy() for t in indirect]
        scales = [expand_factors(t.factors, value.shape).reshape(-1, 1).numpy() for t in indirect]
        left, right = tables.laid_out(columns, scales, [t.table for t in indirect], value.m)
        part = tables.times(left, right)
        return part if made is None else tables.added(made, part)
    for term in indirect:
        assert term.table is not None
        part = term.table[term.positions.reshape(-1).numpy()]
        if not (isinstance(term.factors, float) and term.factors == 1):
            scale = term.factors
            if isinstance(scale, Tensor):
                counts = torch.from_numpy(np.diff(part.indptr).astype(np.int64))
                scale = scale.reshape(-1).repeat_interleave(counts)
            scaled = times(torch.from_numpy(part.data), scale)
            part.data = expand_factors(scaled, part.data.shape).numpy()
            tables.drop_zeros(part)
        made = part if made is None else tables.added(made, part)
    return sparse.csr_array((size, value.m)) if made is None else made


def apply(map_: LinearMap, value: Dependence) -> Dependence:
    """The dependence of `map_(value)`."""
    if not value.terms or 0 in map_.shape_out or 0 in map_.shape_in:
        return nothing(map_.shape_out, value.m)
    return _applied(map_, value)


@singledispatch
def _applied(map_: LinearMap, value: Dependence) -> Dependence:
    raise NotImplementedError(f"no application of {type(map_).__name__}")


@_applied.register
def _(map_: Zero, value: Dependence) -> Dependence:
    return nothing(map_.shape_out, value.m)


@_applied.register
def _(map_: Scaled, value: Dependence) -> Dependence:
    return value if map_.factor == 1 else _scaled(value, map_.factor)


@_applied.register
def _(map_: Diagonal, value: Dependence) -> Dependence:
    return _scaled(value, known(map_.factors))


@_applied.register
def _(map_: IndexMap, value: Dependence) -> Dependence:
    terms = []
    for term in value.terms:
        factors = term.factors
        if map_.fills or isinstance(factors, Tensor):
            factors = map_.run(expand_factors(factors, value.shape))
        terms.append(Term(map_.run(term.positions), factors, term.table))
    return Dependence(map_.shape_out, value.m, tuple(terms))


@_applied.register
def _(map_: Sum, value: Dependence) -> Dependence:
    return joined([apply(part, value) for part in map_.parts])


@_applied.register
def _(map_: Product, value: Dependence) -> Dependence:
    for factor in reversed(map_.factors):
        value = apply(factor, value)
    return value


@_applied.register
def _(map_: AxisSum, value: Dependence) -> Dependence:
    kept = [i for i in range(len(value.shape)) if i not in map_.axes]
    terms = []
    groups: dict[tuple[object, ...], list[Term]] = {}  # what one table can hold
    for term in value.terms:
        term = _affordable(term, map_.axes)
        free = [a for a in map_.axes if _is_free(term, a)]
        count = math.prod(value.shape[a] for a in free)
        if count == 0:
            continue
        term = _first_along(term, free)
        if count > 1:
            term = Term(term.positions, times(term.factors, float(count)), term.table)
        if len(free) < len(map_.axes):
            lanes = tuple(i for i in kept if _is_free(term, i))
            groups.setdefault((lanes, term.table is None), []).append(term)
        else:
            shape = map_.shape_out
            factors = term.factors
            if isinstance(factors, Tensor):
                factors = factors.squeeze(map_.axes)
            terms.append(Term(term.positions.squeeze(map_.axes).expand(shape), factors, term.table))
    terms.extend(_gathered(group, kept, value.m) for group in groups.values())
    return Dependence(map_.shape_out, value.m, tuple(terms))


@_applied.register
def _(map_: Scatter, value: Dependence) -> Dependence:
    shape, axis = map_.shape_out, map_.axis
    if len(value.terms) > 2:
        value = merged(value)  # every term would be sorted and written out
    terms = []
    for term in value.terms:
        others = [i for i in range(len(shape)) if i != axis]
        free = [i for i in others if _is_free(term, i)]
        small = _first_along(term, free)
        lanes = [1 if i in free else shape[i] for i in others]
        count = math.prod(lanes)
        order = [*others, axis]
        positions = small.positions.permute(order).reshape(count, -1).numpy()
        factors = (
            expand_factors(small.factors, small.positions.shape).permute(order).reshape(count, -1)
        )
        size = shape[axis]
        rows = (np.arange(count)[:, None] * size + map_.index.numpy()[None, :]).ravel()
        data = factors.contiguous().numpy().ravel()
        data = tables.of_rows(data, positions.ravel(), term.table)
        width = value.m if term.table is None else term.table.shape[0]
        made = tables.by_rows(rows, positions.ravel(), data, (count * size, width))
        back = numbered((*lanes, size)).movedim(-1, axis).expand(shape)
        terms.append(_through(made, back, term.table))
    return Dependence(shape, value.m, tuple(terms))


@_applied.register
def _(map_: Dense, value: Dependence) -> Dependence:
    lanes = tuple(s for i, s in enumerate(value.shape) if i not in map_.axes_in)
    summed = value
    if map_.axes_in:
        unsigned = _scaled(value, UNKNOWN)  # factors of the map are unknown: nothing cancels
        summed = apply(AxisSum(lanes, value.shape, map_.axes_in), unsigned)
    terms = []
    for term in summed.terms:
        positions, factors = term.positions, expand_factors(term.factors, lanes)
        for axis in map_.axes_out:
            positions, factors = positions.unsqueeze(axis), factors.unsqueeze(axis)
        factors = factors.expand(map_.shape_out)
        terms.append(Term(positions.expand(map_.shape_out), times(factors, UNKNOWN), term.table))
    return Dependence(map_.shape_out, value.m, tuple(terms))


def _scaled(value: Dependence, factors: Known) -> Dependence:
    terms = []
    for term in value.terms:
        mine = factors
        if isinstance(mine, Tensor) and isinstance(term.factors, float) and term.factors == 1:
            product: Known = mine
        else:
            if isinstance(mine, Tensor) and isinstance(term.factors, float):
                mine = mine.expand(value.shape)
            product = times(term.factors, mine)
        if not (isinstance(product, float) and product == 0):
            terms.append(Term(term.positions, product, term.table))
    return Dependence(value.shape, value.m, tuple(terms))


def _is_free(term: Term, axis: int) -> bool:
    """Whether nothing changes along an axis."""
    if term.positions.shape[axis] == 1:
        return True
    fixed = isinstance(term.factors, float) or term.factors.stride(axis) == 0
    return fixed and term.positions.stride(axis) == 0


def _first_along(term: Term, axes: list[int]) -> Term:
    positions, factors = term.positions, term.factors
    for axis in axes:
        positions = positions.narrow(axis, 0, min(1, positions.shape[axis]))
        if isinstance(factors, Tensor):
            factors = factors.narrow(axis, 0, min(1, factors.shape[axis]))
    return Term(positions, factors, term.table)


def _affordable(term: Term, axes: Shape) -> Term:
    """The term with known factors forgotten where following them would cost too much."""
    factors = term.factors
    if isinstance(factors, float) or not any(not _is_free(term, a) for a in axes):
        return term
    entries = math.prod(
        s
        for i, s in enumerate(term.positions.shape)
        if term.positions.stride(i) or factors.stride(i)
    )
    if entries <= max(_KNOWN, 4 * unexpanded(term.positions).numel()):
        return term
    if entries > _ZEROS or not bool((unexpanded(factors) == 0).any()):
        return Term(term.positions, UNKNOWN, term.table)
    return Term(term.positions, times(factors, UNKNOWN), term.table)


def _gathered(group: list[Term], kept: list[int], m: int) -> Term:
    """The sum over all axes but the kept ones, which need a row of a new table each.

    Args:
        group: Terms, added up, along whose kept axes the same repeat; all with a table or none.
        kept: The axes that stay.
        m: Number of elements of the cotangent.
    """
    shape = group[0].positions.shape
    free = [i for i in kept if _is_free(group[0], i)]
    order = [*kept, *(i for i in range(len(shape)) if i not in kept)]
    lanes = tuple(1 if i in free else shape[i] for i in kept)
    columns: list[NDArray[Any]] = []
    factors: list[NDArray[Any]] = []
    for term in group:
        small = _first_along(term, free)
        scale = expand_factors(small.factors, small.positions.shape)
        for found, given in ((columns, small.positions), (factors, scale)):
            found.append(given.permute(order).reshape(math.prod(lanes), -1).numpy())
    made, right = tables.laid_out(columns, factors, [t.table for t in group], m)
    made.data = tables.of_rows(made.data, made.indices, right)
    back = numbered(lanes).expand([shape[i] for i in kept])
    return _through(tables.summed(made), back, right)


def _through(made: sparse.csr_array, positions: Tensor, right: sparse.csr_array | None) -> Term:
    """The term whose table is `made x right`; None is the identity."""
    if right is None:
        return Term(positions, 1.0, made)
    if made.nnz and int(np.diff(right.indptr)[made.indices].sum()) > _ENTRIES:
        row = sparse.csr_array(np.where(tables.columns_used(right), np.nan, 0.0)[None, :])
        return Term(first_row(tuple(positions.shape)), UNKNOWN, row)
    return Term(positions, 1.0, tables.times(made, right))
