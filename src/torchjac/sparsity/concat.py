"""Many values side by side, as loops over elements or time steps leave them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from scipy import sparse
from torch import Tensor

from torchjac.linear.maps.factors import Known, spread
from torchjac.sparsity.dependence import Dependence, Term, distinct, merged, nothing

# More terms than this are merged into one.
_TERMS = 12


def beside(parts: Sequence[Dependence], axis: int) -> Dependence:
    """Concatenates values: what each depends on is looked at once, however many there are.

    Args:
        parts: Values whose shapes differ along the axis at most.
        axis: Along which they follow each other.
    """
    m = parts[0].m
    sizes = [p.shape[axis] for p in parts]
    shape = (*parts[0].shape[:axis], sum(sizes), *parts[0].shape[axis + 1 :])
    count = max(len(p.terms) for p in parts)
    if count == 0:
        return nothing(shape, m)
    if any(t.table is not None for p in parts for t in p.terms):
        return Dependence(shape, m, (_stacked(parts, axis),))
    terms = []
    for k in range(count):
        given = [p.terms[k] if k < len(p.terms) else _none(p) for p in parts]
        terms.append(Term(torch.cat([t.positions for t in given], axis), _all(given, axis), None))
    made = Dependence(shape, m, tuple(terms))
    return merged(made) if count > _TERMS else made


def _none(part: Dependence) -> Term:
    """A term that adds nothing."""
    kind = torch.int32 if part.m < 2**31 else torch.int64
    return Term(torch.zeros((), dtype=kind).expand(part.shape), 0.0, None)


def _all(terms: Sequence[Term], axis: int) -> Known:
    numbers = {t.factors for t in terms if isinstance(t.factors, float)}
    if len(numbers) == 1 and all(isinstance(t.factors, float) for t in terms):
        return numbers.pop()
    return torch.cat([spread(t.factors, tuple(t.positions.shape)) for t in terms], axis)


def _stacked(parts: Sequence[Dependence], axis: int) -> Term:
    """One term, whose table holds the rows of all parts, one beneath the other."""
    found = [distinct(p) for p in parts]
    starts = accumulate((table.shape[0] for table, _ in found), initial=0)
    table = sparse.vstack([table for table, _ in found], format="csr")
    kind = torch.int32 if table.shape[0] < 2**31 else torch.int64
    positions: list[Tensor] = [
        rows.to(kind) + start for (_, rows), start in zip(found, starts, strict=False)
    ]
    return Term(torch.cat(positions, axis), 1.0, table)
