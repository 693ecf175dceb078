"""Several terms merged into one, where later operations become cheaper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchjac._torch.modes import real_values
from torchjac.compiler.accumulate import adjoint as t
from torchjac.compiler.accumulate.adjoint import Adjoint, Term
from torchjac.compiler.accumulate.broadcast import with_zero_strides
from torchjac.compiler.accumulate.scatter import scatter
from torchjac.host.costs import merge_savings, merge_seconds
from torchjac.linear.maps import Shape

_GROWTH = 1.5  # times the elements of its terms: larger merged adjoints must save time to be made
_OVERLAP = 1.2  # entries for each element of the merged term: above, terms have entries in common
_MOST_ENTRIES = 2**21  # entries: sorting more takes longer than merging saves


@dataclass(frozen=True, slots=True)
class _Layout:
    """The merged term of a group of terms.

    Attributes:
        rows: Rows of each element, padded with -1.
        positions: Position of each valid entry in `rows`, all terms one after the other.
        valid: Numbers of the valid entries of each term; None for all.
    """

    rows: Tensor
    positions: Tensor
    valid: list[Tensor | None]


def merge_terms(adjoint: Adjoint, m: int, remaining: int) -> Adjoint:
    """The same adjoint with one term for each bottleneck, where that pays.

    Args:
        adjoint: A sum of terms.
        m: Number of rows of J.
        remaining: Number of operations that its terms still go through.
    """
    if len(adjoint.terms) < 2 or not remaining:
        return adjoint
    groups: dict[int, list[Term]] = {}
    for term in adjoint.terms:
        groups.setdefault(id(term.bottleneck), []).append(term)
    terms: list[Term] = []
    for group in groups.values():
        bottleneck = group[0].bottleneck
        rows = m if bottleneck is None else math.prod(bottleneck.adjoint.shape)
        terms += _merge_group(group, adjoint.shape, rows, remaining)
    return Adjoint(adjoint.shape, tuple(terms))


def _merge_group(terms: list[Term], shape: Shape, m: int, remaining: int) -> list[Term]:
    """Terms with rows of the same bottleneck as one term, if that pays."""
    if len(terms) < 2 or sum(math.prod(term.loop) for term in terms) > _MOST_ENTRIES:
        return terms
    with real_values():
        layout = _lay_out(terms, shape, m)
    if layout is None:
        return terms
    size = layout.rows.numel()
    saved = merge_savings(remaining * (len(terms) - 1))
    grows = size > _GROWTH * sum(term.size for term in terms) or not _overlap(terms, size)
    if grows and merge_seconds(size) > saved:
        return terms
    values = [
        flat if valid is None else flat.index_select(0, valid)
        for flat, valid in zip((t.entries(x).reshape(-1) for x in terms), layout.valid, strict=True)
    ]
    merged = scatter(size, layout.positions, torch.cat(values)).reshape(layout.rows.shape)
    with real_values():
        rows = with_zero_strides(layout.rows, range(len(shape)))
    first = terms[0]
    return [Term(tuple(merged.shape), rows, first.dtype, (merged,), bottleneck=first.bottleneck)]


def _overlap(terms: Sequence[Term], size: int) -> bool:
    """Whether terms have many entries in common."""
    return sum(math.prod(term.loop) for term in terms) > _OVERLAP * size


def _lay_out(terms: Sequence[Term], shape: Shape, m: int) -> _Layout | None:
    """The layout of the merged term; None if no entry is valid.

    Args:
        terms: Terms of one adjoint, with rows of the same bottleneck.
        shape: Shape of the value.
        m: Number of rows.
    """
    size = math.prod(shape)
    keys: list[np.ndarray] = []
    valid: list[Tensor | None] = []
    for term in terms:
        rows = term.rows.expand(term.loop).reshape(-1).numpy()
        elements = t.elements(term, shape).reshape(-1).numpy()
        mask = rows >= 0
        key = elements * m + rows
        valid.append(None if mask.all() else torch.from_numpy(mask.nonzero()[0]))
        keys.append(key[mask])
    every, inverse = np.unique(np.concatenate(keys), return_inverse=True)
    if not len(every):
        return None
    element, row = every // m, every % m
    count = np.bincount(element, minlength=size)
    width = int(count.max())
    begin = np.cumsum(count) - count
    slot = element * width + np.arange(len(every)) - begin[element]
    padded = np.full(size * width, -1)
    padded[slot] = row
    rows_of_elements = torch.from_numpy(padded).reshape((*shape, width))
    return _Layout(rows_of_elements, torch.from_numpy(slot[inverse]), valid)
