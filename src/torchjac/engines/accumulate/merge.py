"""Several terms written out as one, where that makes what comes after it cheaper."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torchjac._torch.modes import real_values
from torchjac.engines.accumulate import terms as t
from torchjac.engines.accumulate.place import placed
from torchjac.engines.accumulate.terms import Adjoint, Term
from torchjac.structure.maps import Shape

# Seconds that an operation takes by itself, and that writing a number out takes.
_OPERATION, _NUMBER = 4e-6, 4e-9
# Merged adjoints may be this much larger than what they are made of.
_GROWTH = 1.5
# More entries than this are not looked at: sorting them takes longer than it saves.
_ENTRIES = 2**21


def merged(adjoint: Adjoint, m: int, below: int) -> Adjoint:
    """The same with one term for each waist, where that pays.

    Args:
        adjoint: A sum of terms.
        m: Number of rows of J.
        below: Operations that its terms will still go through.
    """
    if len(adjoint.terms) < 2 or not below:
        return adjoint
    groups: dict[int, list[Term]] = {}
    for term in adjoint.terms:
        groups.setdefault(id(term.table), []).append(term)
    found: list[Term] = []
    for group in groups.values():
        table = group[0].table
        height = m if table is None else math.prod(table.adjoint.shape)
        found += _one(group, adjoint.shape, height, below)
    return Adjoint(adjoint.shape, tuple(found))


def _one(terms: list[Term], shape: Shape, m: int, below: int) -> list[Term]:
    """Terms with the same kind of rows as one term, if that pays."""
    if len(terms) < 2 or sum(math.prod(term.loop) for term in terms) > _ENTRIES:
        return terms
    with real_values():
        made = _laid_out(Adjoint(shape, tuple(terms)), m)
    if made is None:
        return terms
    rows, places, kept = made
    size = rows.numel()
    saved = below * (len(terms) - 1) * _OPERATION
    grows = size > _GROWTH * sum(term.size for term in terms) or not _overlap(terms, size)
    if grows and size * _NUMBER > saved:
        return terms
    values = [
        flat if some is None else flat.index_select(0, some)
        for flat, some in zip((t.entries(x).reshape(-1) for x in terms), kept, strict=True)
    ]
    whole = placed(size, places, torch.cat(values)).reshape(rows.shape)
    with real_values():
        rows = _compressed(rows, len(shape))
    first = terms[0]
    return [Term(tuple(whole.shape), rows, first.dtype, (whole,), table=first.table)]


def _overlap(terms: Sequence[Term], size: int) -> bool:
    """Whether terms have entries in common."""
    return sum(math.prod(term.loop) for term in terms) > 1.2 * size


def _laid_out(adjoint: Adjoint, m: int) -> tuple[Tensor, Tensor, list[Tensor | None]] | None:
    """Rows that each element has, the place of every entry, and which entries of a term are any."""
    size = math.prod(adjoint.shape)
    keys, kept = [], []
    for term in adjoint.terms:
        rows = term.rows.expand(term.loop).reshape(-1).numpy()
        elements = t.elements(term, adjoint.shape).reshape(-1).numpy()
        some = rows >= 0
        key = elements * m + rows
        kept.append(None if some.all() else torch.from_numpy(some.nonzero()[0]))
        keys.append(key[some])
    every, inverse = np.unique(np.concatenate(keys), return_inverse=True)
    if not len(every):
        return None
    element, row = every // m, every % m
    count = np.bincount(element, minlength=size)
    width = int(count.max())
    begin = np.cumsum(count) - count
    slot = element * width + np.arange(len(every)) - begin[element]
    rows = np.full(size * width, -1)
    rows[slot] = row
    shaped = torch.from_numpy(rows).reshape((*adjoint.shape, width))
    return shaped, torch.from_numpy(slot[inverse]), kept


def _compressed(rows: Tensor, ndim: int) -> Tensor:
    """The same with strides of 0 along axes on which they are the same."""
    for axis in range(ndim):
        first = rows.narrow(axis, 0, 1)
        if rows.shape[axis] > 1 and torch.equal(rows, first.expand(rows.shape)):
            rows = first.expand(rows.shape)
    return rows
