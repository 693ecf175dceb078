"""Terms of the gradients scattered into the Jacobian: each entry goes to its position once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchjac._torch.modes import real_values
from torchjac.compiler.accumulate import adjoint as t
from torchjac.compiler.accumulate.addresses import Block, Regular, Slots
from torchjac.compiler.accumulate.adjoint import Adjoint, Term
from torchjac.compiler.accumulate.broadcast import affine_strides, broadcast_axes, collapse
from torchjac.compiler.accumulate.scatter import Part, coalesce, scatter

_MOST_MARKED = 2**26  # elements of a block: in larger ones first writes are not looked for


def dense(adjoint: Adjoint | None, block: Block, like: Tensor) -> Tensor:
    """All entries of a block, flat.

    Args:
        adjoint: The gradient of the input leaf; None is zero.
        block: The block.
        like: A tensor of the block's dtype and device.
    """
    size = block.size
    terms = () if adjoint is None else adjoint.terms
    with real_values():
        strided = [_strides(term, block) for term in terms]
    orders = [
        None if strides is None else strides.order(term.loop, size)
        for term, strides in zip(terms, strided, strict=True)
    ]
    whole = next((i for i, order in enumerate(orders) if order is not None), None)
    if whole is not None:
        values = t.entries_like(terms[whole], like).permute(orders[whole] or [])
        entries = values.reshape(-1)
        if len(terms) > 1 or not values.is_contiguous():
            entries = entries.clone(memory_format=torch.contiguous_format)
        for i, term in enumerate(terms):
            if i != whole:
                entries = _add(entries, term, block, strided[i], like)
        return entries
    with real_values():
        first, full = _first_writes(terms, strided, size)
    make = torch.empty if full else torch.zeros
    entries = make(size, dtype=like.dtype, device=like.device)
    for term, strides, is_first in zip(terms, strided, first, strict=True):
        if is_first and strides is not None:
            values = t.entries_like(term, like)
            _view(entries, term, strides).copy_(values)
        else:
            entries = _add(entries, term, block, strides, like)
    return entries


def _first_writes(
    terms: Sequence[Term], strided: Sequence[Regular | None], size: int
) -> tuple[list[bool], bool]:
    """Whether each term is the first at all of its positions, and whether all fill the block."""
    first = [False] * len(terms)
    if size > _MOST_MARKED:
        return first, False
    written = torch.zeros(size, dtype=torch.bool)
    for i, (term, strides) in enumerate(zip(terms, strided, strict=True)):
        if strides is None or not strides.disjoint(term.loop):
            return first, False
        part = _view(written, term, strides)
        first[i] = not bool(part.any())
        part.fill_(True)
    return first, all(first) and bool(written.all())


def _view(entries: Tensor, term: Term, strides: Regular) -> Tensor:
    """The positions of a term in a flat tensor, as a view of the loop's shape."""
    return entries.as_strided(term.loop, strides.steps, strides.start)


def _strides(term: Term, block: Block) -> Regular | None:
    """Strides of a term in a block; None if its positions have none, or leave the block."""
    rows = term.rows
    start = int(rows[(0,) * rows.ndim]) - block.first
    seeds = affine_strides(rows)
    small = collapse(rows, broadcast_axes(rows)) - block.first
    if start < 0 or seeds is None or int(small.max()) >= block.seeds:
        return None
    own = [math.prod(block.shape[a + 1 :]) for a in range(len(block.shape))]
    elements = (0, [*own, *[0] * (rows.ndim - len(own))])
    if term.elements is not None:
        listed = affine_strides(term.elements.expand(term.loop))
        if listed is None or block.samples is not None:
            return None
        elements = listed
    if block.samples is not None and len(block.shape):
        sample = small.div(block.per_sample[0], rounding_mode="floor")
        expected = torch.arange(term.loop[0]).reshape(-1, *[1] * (rows.ndim - 1))
        if not bool((sample == expected).all()):
            return None
    row, column = (start, elements[0]) if block.mode == "reverse" else (elements[0], start)
    return Regular(row * block.width + column, block.steps(seeds[1], elements[1]))


def _add(
    entries: Tensor, term: Term, block: Block, strides: Regular | None, like: Tensor
) -> Tensor:
    """The entries of a term added to those of a block, in place."""
    values = t.entries_like(term, like)
    if strides is not None and strides.disjoint(term.loop):
        _view(entries, term, strides).add_(values)
        return entries
    with real_values():
        positions = block.places(term)
        inside = (positions >= 0).nonzero().flatten()
        every = len(inside) == len(positions)
        positions = positions if every else positions[inside]
    flat = values.reshape(-1)
    if len(positions):
        entries.index_add_(0, positions, flat if every else flat.index_select(0, inside))
    return entries


def sparse(
    adjoints: Sequence[tuple[Adjoint, int]],
    slots: Slots,
    like: Tensor,
    varies: Callable[[Tensor], bool],
) -> Tensor:
    """The values of the structural nonzeros, in the order of the pattern.

    Args:
        adjoints: Gradients of the leaves, each with the number of its first element.
        slots: Positions of the entries.
        like: A tensor of their dtype and device.
        varies: Whether a running tensor depends on the inputs.
    """
    count = len(slots.keys)
    fixed: list[Part] = []
    running: list[Part] = []
    for adjoint, first in adjoints:
        for term in adjoint.terms:
            values = t.entries_like(term, like)
            with real_values():
                elements = t.elements(term, adjoint.shape).reshape(-1).numpy() + first
                seeds = term.rows.expand(term.loop).reshape(-1).numpy()
                positions = torch.from_numpy(slots.find(seeds, elements)).reshape(term.loop)
            (running if varies(values) else fixed).append((positions, values))
    if not running and not fixed:
        return torch.zeros(count, dtype=like.dtype, device=like.device)
    onto = None
    if fixed:
        positions, values = _concatenate(coalesce(fixed))
        constants = scatter(count, positions, values)
        if not running:
            return constants
        with real_values():
            nonzero = torch.zeros(count, dtype=torch.bool)
            nonzero[positions[positions >= 0]] = True
        onto = constants, nonzero
    return scatter(count, *_concatenate(coalesce(running)), onto)


def _concatenate(parts: list[Part]) -> Part:
    with real_values():
        positions = torch.cat([positions for positions, _ in parts])
    return positions, parts[0][1] if len(parts) == 1 else torch.cat([flat for _, flat in parts])
