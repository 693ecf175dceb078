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

# Seconds that an operation takes by itself, and that writing a number out takes.
_OPERATION, _NUMBER = 4e-6, 4e-9
# Merged adjoints may be this much larger than what they are made of.
_GROWTH = 1.5
# More entries than this are not looked at: sorting them takes longer than it saves.
_ENTRIES = 2**21


def merged(adjoint: Adjoint, m: int, below: int) -> Adjoint:
    """The same with one term, if that pays.

    Args:
        adjoint: A sum of terms.
        m: Number of rows of J.
        below: Operations that its terms will still go through.
    """
    found = adjoint.terms
    count = sum(math.prod(term.loop) for term in found)
    if len(found) < 2 or not below or count > _ENTRIES:
        return adjoint
    with real_values():
        made = _laid_out(adjoint, m)
    if made is None:
        return adjoint
    rows, places, kept = made
    size = rows.numel()
    saved = below * (len(found) - 1) * _OPERATION
    if size > _GROWTH * sum(term.size for term in found) and size * _NUMBER > saved:
        return adjoint
    if not _overlap(found, size) and size * _NUMBER > saved:
        return adjoint
    like = torch.ones((), dtype=found[0].dtype)
    values = [
        flat if some is None else flat.index_select(0, some)
        for flat, some in zip((t.value(x, like).reshape(-1) for x in found), kept, strict=True)
    ]
    flat = torch.cat(values)
    whole = placed(size, places, flat).reshape(rows.shape)
    with real_values():
        rows = _compressed(rows, len(adjoint.shape))
    term = Term(tuple(whole.shape), rows, found[0].dtype, (whole,))
    return Adjoint(adjoint.shape, (term,))


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
