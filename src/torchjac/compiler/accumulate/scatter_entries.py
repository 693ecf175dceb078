"""From the terms of the gradients to the finished Jacobian: every entry goes to its place once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchjac._torch.modes import real_values
from torchjac.compiler.accumulate import adjoint as t
from torchjac.compiler.accumulate.addresses import Block, Regular, Slots
from torchjac.compiler.accumulate.adjoint import Adjoint, Term
from torchjac.compiler.accumulate.merge import assembled, placed


def dense(adjoint: Adjoint | None, block: Block, like: Tensor) -> Tensor:
    """All entries of a block, flat.

    Args:
        adjoint: The gradient of the input leaf; None is zero.
        block: The block.
        like: A tensor of its dtype and device.
    """
    size = block.size
    terms = () if adjoint is None else adjoint.terms
    with real_values():
        regular = [_regular(term, block) for term in terms]
    orders = [
        None if found is None else found.order(term.loop, size)
        for term, found in zip(terms, regular, strict=True)
    ]
    whole = next((i for i, order in enumerate(orders) if order is not None), None)
    if whole is not None:
        values = t.value(terms[whole], like).permute(orders[whole] or [])
        made = values.reshape(-1)
        if len(terms) > 1 or not values.is_contiguous():
            made = made.clone(memory_format=torch.contiguous_format)
        for i, term in enumerate(terms):
            if i != whole:
                made = _added(made, term, block, regular[i], like)
        return made
    with real_values():
        fresh, full = _untouched(terms, regular, size)
    make = torch.empty if full else torch.zeros
    made = make(size, dtype=like.dtype, device=like.device)
    for i, term in enumerate(terms):
        made = _added(made, term, block, regular[i], like, fresh[i])
    return made


# More entries than this are not marked one by one to see which come first at their place.
_MARKED = 2**26


def _untouched(
    terms: Sequence[Term], regular: Sequence[Regular | None], size: int
) -> tuple[list[bool], bool]:
    """Which terms come first at all of their places, and whether they fill everything once."""
    fresh = [False] * len(terms)
    if size > _MARKED:
        return fresh, False
    marks = torch.zeros(size, dtype=torch.bool)
    for i, (term, found) in enumerate(zip(terms, regular, strict=True)):
        if found is None or not found.disjoint(term.loop):
            return fresh, False
        part = marks.as_strided(term.loop, found.steps, found.start)
        fresh[i] = not bool(part.any())
        part.fill_(True)
    return fresh, all(fresh) and bool(marks.all())


def _regular(term: Term, block: Block) -> Regular | None:
    """The steps of a term, if places are even and all in the block."""
    rows = term.rows
    start = int(rows[(0,) * rows.ndim]) - block.first
    found = t.even(rows)
    small = t.compact(rows, [a for a in range(rows.ndim) if t.is_free(rows, a)]) - block.first
    if start < 0 or found is None or int(small.max()) >= block.seeds:
        return None
    own = [math.prod(block.shape[a + 1 :]) for a in range(len(block.shape))]
    elements = (0, [*own, *[0] * (rows.ndim - len(own))])
    if term.target is not None:
        placed_at = t.even(term.target.expand(term.loop))
        if placed_at is None or block.samples is not None:
            return None
        elements = placed_at
    if block.samples is not None and len(block.shape):
        sample = small.div(block.per_sample[0], rounding_mode="floor")
        mine = torch.arange(term.loop[0]).reshape(-1, *[1] * (rows.ndim - 1))
        if not bool((sample == mine).all()):
            return None
    row, column = (start, elements[0]) if block.mode == "reverse" else (elements[0], start)
    return Regular(row * block.width + column, block.steps(found[1], elements[1]))


def _added(
    made: Tensor,
    term: Term,
    block: Block,
    regular: Regular | None,
    like: Tensor,
    first: bool = False,
) -> Tensor:
    """The entries of a term added where they belong; written there if they come first."""
    values = t.value(term, like)
    if regular is not None and regular.disjoint(term.loop):
        part = made.as_strided(term.loop, regular.steps, regular.start)
        _ = part.copy_(values) if first else part.add_(values)
        return made
    with real_values():
        places = block.places(term)
        kept = (places >= 0).nonzero().flatten()
        every = len(kept) == len(places)
        places = places if every else places[kept]
    flat = values.reshape(-1)
    if len(places):
        made.index_add_(0, places, flat if every else flat.index_select(0, kept))
    return made


def sparse(
    adjoints: Sequence[tuple[Adjoint, int]],
    slots: Slots,
    like: Tensor,
    varies: Callable[[Tensor], bool],
) -> Tensor:
    """The values of the structural nonzeros, in the order of the pattern.

    Args:
        adjoints: Those of the leaves, each with the number of its first element.
        slots: Places of the entries.
        like: A tensor of their dtype and device.
        varies: Whether a running tensor is another one for other inputs.
    """
    count = len(slots.keys)
    fixed: list[tuple[Tensor, Tensor]] = []
    running: list[tuple[Tensor, Tensor]] = []
    for adjoint, first in adjoints:
        for term in adjoint.terms:
            values = t.value(term, like)
            with real_values():
                elements = t.elements(term, adjoint.shape).reshape(-1).numpy() + first
                seeds = term.rows.expand(term.loop).reshape(-1).numpy()
                found = torch.from_numpy(slots.find(seeds, elements)).reshape(term.loop)
            (running if varies(values) else fixed).append((found, values))
    if not running and not fixed:
        return torch.zeros(count, dtype=like.dtype, device=like.device)
    onto = None
    if fixed:
        places, values = _joined(assembled(fixed))
        made = placed(count, places, values)
        if not running:
            return made
        with real_values():
            taken = torch.zeros(count, dtype=torch.bool)
            taken[places[places >= 0]] = True
        onto = made, taken
    return placed(count, *_joined(assembled(running)), onto)


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Places and values of several terms."""
    with real_values():
        places = torch.cat([found for found, _ in parts])
    return places, parts[0][1] if len(parts) == 1 else torch.cat([flat for _, flat in parts])
