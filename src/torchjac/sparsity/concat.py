"""Concatenation of many dependences: loops over elements or time steps end in one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from scipy import sparse
from torch import Tensor

from torchjac.linear.maps.factors import Known, expand_factors
from torchjac.sparsity.dependence import Dependence, Term, distinct_rows, merge_terms, no_dependence

_MAX_TERMS = 12  # terms: above this, all are merged into one


def concat(parts: Sequence[Dependence], axis: int) -> Dependence:
    """Concatenates dependences in one step, so that the cost is linear in their number.

    Args:
        parts: Dependences whose shapes differ at most along the axis.
        axis: Axis of the concatenation.
    """
    m = parts[0].m
    sizes = [p.shape[axis] for p in parts]
    shape = (*parts[0].shape[:axis], sum(sizes), *parts[0].shape[axis + 1 :])
    count = max(len(p.terms) for p in parts)
    if count == 0:
        return no_dependence(shape, m)
    if any(t.table is not None for p in parts for t in p.terms):
        return Dependence(shape, m, (_stack_tables(parts, axis),))
    terms = []
    for k in range(count):
        column = [p.terms[k] if k < len(p.terms) else _zero_term(p) for p in parts]
        positions = torch.cat([t.positions for t in column], axis)
        terms.append(Term(positions, _factors(column, axis), None))
    dependence = Dependence(shape, m, tuple(terms))
    return merge_terms(dependence) if count > _MAX_TERMS else dependence


def _zero_term(part: Dependence) -> Term:
    """A term with factor zero."""
    dtype = torch.int32 if part.m < 2**31 else torch.int64
    return Term(torch.zeros((), dtype=dtype).expand(part.shape), 0.0, None)


def _factors(terms: Sequence[Term], axis: int) -> Known:
    """The concatenated factors of the terms; one number if all terms have the same number."""
    numbers = {t.factors for t in terms if isinstance(t.factors, float)}
    if len(numbers) == 1 and all(isinstance(t.factors, float) for t in terms):
        return numbers.pop()
    return torch.cat([expand_factors(t.factors, tuple(t.positions.shape)) for t in terms], axis)


def _stack_tables(parts: Sequence[Dependence], axis: int) -> Term:
    """One term, whose table stacks the tables of all parts."""
    tables = [distinct_rows(p) for p in parts]
    starts = accumulate((table.shape[0] for table, _ in tables), initial=0)
    table = sparse.vstack([table for table, _ in tables], format="csr")
    dtype = torch.int32 if table.shape[0] < 2**31 else torch.int64
    positions: list[Tensor] = [
        rows.to(dtype) + start for (_, rows), start in zip(tables, starts, strict=False)
    ]
    return Term(torch.cat(positions, axis), 1.0, table)
