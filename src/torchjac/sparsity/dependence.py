"""Dependences: the rows of J that each element of a tensor depends on, in structured form.

A value of the linear graph is a linear function of the cotangent u, which has an element for every
row of J. Its matrix is a sum of terms `Diagonal(factors) x IndexMap(positions) x table`: element i
of the value is `factors[i]` times row `positions[i]` of a table (the identity until the first sum).
Moving elements changes positions only. Elements that depend on the same rows share a row of the
table. Axes on which all elements are equal have stride 0 and are never materialized.
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
from torchjac.sparsity.csr import first_row, row_numbers

# Terms of a dependence: above this they are merged into one, as each term costs a pass over the
# elements (bundle adjustment of 31843 observations: 24 take 240 ms and 484 MB, 12 170 ms and 223
# MB).
_MAX_TERMS = 12
# Factors of a term in a sum: above this, known factors other than zero become unknown. Less
# precise, still sound.
_MAX_KNOWN = 2**22
# Factors of a term in a sum: above this, all factors become unknown. Less precise, still sound.
_MAX_ZEROS = 2**26
# Entries of one table: above this, every row gets the union of all rows.
_MAX_ENTRIES = 2**28


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """Element i is `factors[i]` times row `positions[i]` of the table.

    Attributes:
        positions: Row of the table for each element: integers of the value's shape, 32 bits if
            they fit.
        factors: Factor of each element: float64 of the value's shape, or one number for all.
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
        terms: The summands.
    """

    shape: Shape
    m: int
    terms: tuple[Term, ...]


def seed(shape: Shape, first: int, m: int) -> Dependence:
    """The cotangent of one output leaf, whose rows begin at `first`."""
    shape = tuple(shape)
    if math.prod(shape) == 0:
        return no_dependence(shape, m)
    kind = torch.int32 if m < 2**31 else torch.int64
    positions = torch.arange(first, first + math.prod(shape), dtype=kind).reshape(shape)
    return Dependence(shape, m, (Term(positions, 1.0, None),))


def no_dependence(shape: Shape, m: int) -> Dependence:
    """The dependence of a value that is independent of the cotangent."""
    return Dependence(tuple(shape), m, ())


def full_dependence(shape: Shape, m: int) -> Dependence:
    """The dependence of every element on every row of J."""
    shape = tuple(shape)
    if math.prod(shape) * m == 0:
        return no_dependence(shape, m)
    row = sparse.csr_array(np.full((1, m), np.nan))
    return Dependence(shape, m, (Term(first_row(shape), UNKNOWN, row),))


def sum_dependences(parts: list[Dependence]) -> Dependence:
    """The sum of dependences of the same shape."""
    if len(parts) == 1:
        return parts[0]
    terms: list[Term] = []
    term_numbers: dict[tuple[object, ...], int] = {}
    for part in parts:
        for term in part.terms:
            p = term.positions
            key = (p.data_ptr(), p.dtype, p.stride(), id(term.table))
            if key in term_numbers:
                other = terms[term_numbers[key]]
                factors = tables.add_factors_of_rows(other.factors, term.factors, term.table)
                terms[term_numbers[key]] = Term(p, factors, term.table)
            else:
                term_numbers[key] = len(terms)
                terms.append(term)
    left = tuple(t for t in terms if isinstance(t.factors, Tensor) or t.factors != 0)
    total = Dependence(parts[0].shape, parts[0].m, left)
    return merge_terms(total) if len(terms) > _MAX_TERMS else total


def merge_terms(value: Dependence) -> Dependence:
    """The dependence with all terms merged into one."""
    if len(value.terms) <= 1:
        return value
    table, positions = distinct_rows(value)
    return Dependence(value.shape, value.m, (Term(positions, 1.0, table),))


def distinct_rows(value: Dependence) -> tuple[sparse.csr_array, Tensor]:
    """The rows of a dependence without repetitions along constant axes.

    Returns:
        A CSR matrix, and for each element the number of its row (stride 0 along constant axes).
    """
    axes = range(len(value.shape))
    free = [
        i for i in axes if value.shape[i] > 1 and all(_is_constant_along(t, i) for t in value.terms)
    ]
    shape = tuple(1 if i in free else s for i, s in enumerate(value.shape))
    small = Dependence(shape, value.m, tuple(_narrow_to_first(t, free) for t in value.terms))
    return to_csr(small), row_numbers(shape).expand(value.shape)


def to_csr(value: Dependence) -> sparse.csr_array:
    """The dependence as a CSR matrix: a row per element, a column per row of J.

    Stored values are the factors; NaN where unknown. Column indices are sorted.
    """
    size = math.prod(value.shape)
    direct = [t for t in value.terms if t.table is None]
    table = None
    if direct:
        numbers = [t.factors if isinstance(t.factors, float) else t.factors.numpy() for t in direct]
        table = tables.from_columns([t.positions.numpy() for t in direct], numbers, value.m)
    indirect = [t for t in value.terms if t.table is not None]
    if len(indirect) > 1:
        columns = [t.positions.reshape(-1, 1).numpy() for t in indirect]
        scales = [expand_factors(t.factors, value.shape).reshape(-1, 1).numpy() for t in indirect]
        left, right = tables.as_product(columns, scales, [t.table for t in indirect], value.m)
        part = tables.multiply(left, right)
        return part if table is None else tables.add(table, part)
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
        table = part if table is None else tables.add(table, part)
    return sparse.csr_array((size, value.m)) if table is None else table


def apply(map_: LinearMap, value: Dependence) -> Dependence:
    """The dependence of `map_(value)`."""
    if not value.terms or 0 in map_.shape_out or 0 in map_.shape_in:
        return no_dependence(map_.shape_out, value.m)
    return _apply(map_, value)


@singledispatch
def _apply(map_: LinearMap, value: Dependence) -> Dependence:
    raise NotImplementedError(f"no application of {type(map_).__name__}")


@_apply.register
def _(map_: Zero, value: Dependence) -> Dependence:
    return no_dependence(map_.shape_out, value.m)


@_apply.register
def _(map_: Scaled, value: Dependence) -> Dependence:
    return value if map_.factor == 1 else _scale(value, map_.factor)


@_apply.register
def _(map_: Diagonal, value: Dependence) -> Dependence:
    return _scale(value, known(map_.factors))


@_apply.register
def _(map_: IndexMap, value: Dependence) -> Dependence:
    terms = []
    for term in value.terms:
        factors = term.factors
        if map_.fills or isinstance(factors, Tensor):
            factors = map_.run(expand_factors(factors, value.shape))
        terms.append(Term(map_.run(term.positions), factors, term.table))
    return Dependence(map_.shape_out, value.m, tuple(terms))


@_apply.register
def _(map_: Sum, value: Dependence) -> Dependence:
    return sum_dependences([apply(part, value) for part in map_.parts])


@_apply.register
def _(map_: Product, value: Dependence) -> Dependence:
    for factor in reversed(map_.factors):
        value = apply(factor, value)
    return value


@_apply.register
def _(map_: AxisSum, value: Dependence) -> Dependence:
    remaining = [i for i in range(len(value.shape)) if i not in map_.axes]
    terms = []
    groups: dict[tuple[object, ...], list[Term]] = {}  # terms that share one new table
    for term in value.terms:
        term = _limit_known_factors(term, map_.axes)
        free = [a for a in map_.axes if _is_constant_along(term, a)]
        count = math.prod(value.shape[a] for a in free)
        if count == 0:
            continue
        term = _narrow_to_first(term, free)
        if count > 1:
            term = Term(term.positions, times(term.factors, float(count)), term.table)
        if len(free) < len(map_.axes):
            lanes = tuple(i for i in remaining if _is_constant_along(term, i))
            groups.setdefault((lanes, term.table is None), []).append(term)
        else:
            shape = map_.shape_out
            factors = term.factors
            if isinstance(factors, Tensor):
                factors = factors.squeeze(map_.axes)
            terms.append(Term(term.positions.squeeze(map_.axes).expand(shape), factors, term.table))
    terms.extend(_sum_terms(group, remaining, value.m) for group in groups.values())
    return Dependence(map_.shape_out, value.m, tuple(terms))


@_apply.register
def _(map_: Scatter, value: Dependence) -> Dependence:
    shape, axis = map_.shape_out, map_.axis
    if len(value.terms) > 2:
        value = merge_terms(value)  # else every term would be sorted and materialized
    terms = []
    for term in value.terms:
        remaining = [i for i in range(len(shape)) if i != axis]
        free = [i for i in remaining if _is_constant_along(term, i)]
        small = _narrow_to_first(term, free)
        lanes = [1 if i in free else shape[i] for i in remaining]
        count = math.prod(lanes)
        order = [*remaining, axis]
        positions = small.positions.permute(order).reshape(count, -1).numpy()
        factors = (
            expand_factors(small.factors, small.positions.shape).permute(order).reshape(count, -1)
        )
        size = shape[axis]
        rows = (np.arange(count)[:, None] * size + map_.index.numpy()[None, :]).ravel()
        data = factors.contiguous().numpy().ravel()
        data = tables.summable_factors(data, positions.ravel(), term.table)
        width = value.m if term.table is None else term.table.shape[0]
        scattered = tables.from_entries(rows, positions.ravel(), data, (count * size, width))
        rows_of_elements = row_numbers((*lanes, size)).movedim(-1, axis).expand(shape)
        terms.append(_term_through(scattered, rows_of_elements, term.table))
    return Dependence(shape, value.m, tuple(terms))


@_apply.register
def _(map_: Dense, value: Dependence) -> Dependence:
    lanes = tuple(s for i, s in enumerate(value.shape) if i not in map_.axes_in)
    summed = value
    if map_.axes_in:
        unknown = _scale(value, UNKNOWN)  # factors of the map are unknown, so no sum cancels
        summed = apply(AxisSum(lanes, value.shape, map_.axes_in), unknown)
    terms = []
    for term in summed.terms:
        positions, factors = term.positions, expand_factors(term.factors, lanes)
        for axis in map_.axes_out:
            positions, factors = positions.unsqueeze(axis), factors.unsqueeze(axis)
        factors = factors.expand(map_.shape_out)
        terms.append(Term(positions.expand(map_.shape_out), times(factors, UNKNOWN), term.table))
    return Dependence(map_.shape_out, value.m, tuple(terms))


def _scale(value: Dependence, factors: Known) -> Dependence:
    terms = []
    for term in value.terms:
        scale = factors
        if isinstance(scale, Tensor) and isinstance(term.factors, float) and term.factors == 1:
            product: Known = scale
        else:
            if isinstance(scale, Tensor) and isinstance(term.factors, float):
                scale = scale.expand(value.shape)
            product = times(term.factors, scale)
        if not (isinstance(product, float) and product == 0):
            terms.append(Term(term.positions, product, term.table))
    return Dependence(value.shape, value.m, tuple(terms))


def _is_constant_along(term: Term, axis: int) -> bool:
    """Whether positions and factors of a term are constant along an axis."""
    if term.positions.shape[axis] == 1:
        return True
    fixed = isinstance(term.factors, float) or term.factors.stride(axis) == 0
    return fixed and term.positions.stride(axis) == 0


def _narrow_to_first(term: Term, axes: list[int]) -> Term:
    positions, factors = term.positions, term.factors
    for axis in axes:
        positions = positions.narrow(axis, 0, min(1, positions.shape[axis]))
        if isinstance(factors, Tensor):
            factors = factors.narrow(axis, 0, min(1, factors.shape[axis]))
    return Term(positions, factors, term.table)


def _limit_known_factors(term: Term, axes: Shape) -> Term:
    """The term, with known factors made unknown where a sum over them would cost too much."""
    factors = term.factors
    if isinstance(factors, float) or not any(not _is_constant_along(term, a) for a in axes):
        return term
    entries = math.prod(
        s
        for i, s in enumerate(term.positions.shape)
        if term.positions.stride(i) or factors.stride(i)
    )
    if entries <= max(_MAX_KNOWN, 4 * unexpanded(term.positions).numel()):
        return term
    if entries > _MAX_ZEROS or not bool((unexpanded(factors) == 0).any()):
        return Term(term.positions, UNKNOWN, term.table)
    return Term(term.positions, times(factors, UNKNOWN), term.table)


def _sum_terms(group: list[Term], remaining: list[int], m: int) -> Term:
    """The sum of terms over axes, as one term with a new table: a row per remaining element.

    Args:
        group: The terms, constant along the same remaining axes; either all have a table or none.
        remaining: The axes that are not summed.
        m: Number of elements of the cotangent.
    """
    shape = group[0].positions.shape
    free = [i for i in remaining if _is_constant_along(group[0], i)]
    order = [*remaining, *(i for i in range(len(shape)) if i not in remaining)]
    lanes = tuple(1 if i in free else shape[i] for i in remaining)
    columns: list[NDArray[Any]] = []
    factors: list[NDArray[Any]] = []
    for term in group:
        small = _narrow_to_first(term, free)
        scale = expand_factors(small.factors, small.positions.shape)
        for arrays, tensor in ((columns, small.positions), (factors, scale)):
            arrays.append(tensor.permute(order).reshape(math.prod(lanes), -1).numpy())
    left, right = tables.as_product(columns, factors, [t.table for t in group], m)
    left.data = tables.summable_factors(left.data, left.indices, right)
    rows_of_elements = row_numbers(lanes).expand([shape[i] for i in remaining])
    return _term_through(tables.sum_duplicates(left), rows_of_elements, right)


def _term_through(
    left: sparse.csr_array, positions: Tensor, right: sparse.csr_array | None
) -> Term:
    """The term whose table is `left x right`; None stands for the identity."""
    if right is None:
        return Term(positions, 1.0, left)
    if left.nnz and int(np.diff(right.indptr)[left.indices].sum()) > _MAX_ENTRIES:
        row = sparse.csr_array(np.where(tables.columns_used(right), np.nan, 0.0)[None, :])
        return Term(first_row(tuple(positions.shape)), UNKNOWN, row)
    return Term(positions, 1.0, tables.multiply(left, right))
