"""Several terms written out as one, where that makes what comes after it cheaper."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torchjac._torch.modes import real_values
from torchjac.compiler.accumulate import adjoint as t
from torchjac.compiler.accumulate.adjoint import Adjoint, Term
from torchjac.host.costs import merge_savings, merge_seconds
from torchjac.linear.maps import Shape

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
    saved = merge_savings(below * (len(terms) - 1))
    grows = size > _GROWTH * sum(term.size for term in terms) or not _overlap(terms, size)
    if grows and merge_seconds(size) > saved:
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


def placed(
    size: int, places: Tensor, values: Tensor, onto: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Values put into their places in a flat tensor, added up where they share one.

    Which value comes first is decided here, once: the sum is the same on every run.

    Args:
        size: Number of places.
        places: Place of each value; negative for those that have none.
        values: A running tensor.
        onto: What is there already, and where it is not zero.
    """
    with real_values():
        order = torch.argsort(places, stable=True)
        order = order[int((places < 0).sum()) :]
        ascending = places[order]
        new = torch.ones(len(order), dtype=torch.bool)
        new[1:] = ascending[1:] != ascending[:-1]
        first, more = order[new], order[~new]
        every = len(first) == len(places)
        as_it_is = every and torch.equal(first, torch.arange(len(places)))
        clear = onto is None or not bool(onto[1][places[first]].any())
        where, added = places[first], places[more]
    if len(first) == size and onto is None:  # gathered: nothing is written twice
        made = values if as_it_is else values.index_select(0, first)
    else:
        base = values.new_zeros(size) if onto is None else onto[0]
        picked, there = (values, places) if every else (values.index_select(0, first), where)
        made = base.scatter(0, there, picked) if clear else base.index_add(0, there, picked)
    return made.index_add(0, added, values.index_select(0, more)) if len(more) else made


# Fewer elements than this along the common axis, or more entries for each: not worth it.
_LEAST, _MOST = 256, 1024


Part = tuple[Tensor, Tensor]


def assembled(parts: Sequence[Part]) -> list[Part]:
    """Places and values of several terms, with entries that share all of their places as one.

    Args:
        parts: Places, which are known, and running values of the same shape.
    """
    together: dict[int, list[Part]] = {}
    for part in parts:
        together.setdefault(max(part[0].shape, default=0), []).append(part)
    return [made for size, some in together.items() for made in _assembled(some, size)]


def _assembled(parts: list[Part], size: int) -> list[Part]:
    """The same for terms with an axis of this size."""
    as_they_are = [(places.reshape(-1), values.reshape(-1)) for places, values in parts]
    count = sum(places.numel() for places, _ in parts)
    if len(parts) < 2 or size < _LEAST or count > _MOST * size:
        return as_they_are
    columns: list[Part] = []
    for places, values in parts:
        axis = list(places.shape).index(size)
        with real_values():
            where = places.movedim(axis, -1).reshape(-1, size)
        flat = values.movedim(axis, -1).reshape(-1, size)
        columns += [(where[k], flat[k]) for k in range(len(where))]
    with real_values():
        groups = _alike([where for where, _ in columns])
    if len(groups) == len(columns):
        return as_they_are
    found = []
    for first, *others in groups:
        where, total = columns[first]
        for other in others:
            total = total + columns[other][1]
        found.append((where, total))
    return found


def _alike(columns: Sequence[Tensor]) -> list[list[int]]:
    """Numbers of columns that are the same, each group in order."""
    weight = np.random.default_rng(0).integers(1, 2**62, len(columns[0]), dtype=np.int64)
    groups: dict[int, list[list[int]]] = {}
    order: list[list[int]] = []
    for number, column in enumerate(columns):
        mark = int((column.numpy() * weight).sum())  # wraps around: only a first guess
        for group in groups.setdefault(mark, []):
            if torch.equal(columns[group[0]], column):
                group.append(number)
                break
        else:
            groups[mark].append([number])
            order.append(groups[mark][-1])
    return order
