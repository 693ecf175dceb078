"""From the terms of the gradients to the finished Jacobian: every entry goes to its place once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from torchjac._torch.modes import real_values
from torchjac.engines.accumulate import terms as t
from torchjac.engines.accumulate.local import assembled
from torchjac.engines.accumulate.place import placed
from torchjac.engines.accumulate.terms import Adjoint, Term
from torchjac.structure import Pattern
from torchjac.structure.maps import Shape

Mode = Literal["reverse", "forward"]


@dataclass(frozen=True, slots=True)
class Block:
    """Where the entries between one output and one input leaf go, in a buffer of their own.

    Adjoints run from seeds to elements: in reverse mode seeds are rows of the block and elements
    its columns, in forward mode it is the other way round. Entry (row, column) is element
    `row * width + column % width` of the buffer.

    Attributes:
        first: Number of the first seed.
        seeds: How many there are.
        shape: Shape of the leaf that elements belong to.
        samples: Size of the batch that both leaves begin with; None without one.
        mode: What seeds are.
    """

    first: int
    seeds: int
    shape: Shape
    samples: int | None = None
    mode: Mode = "reverse"

    @property
    def width(self) -> int:
        """Columns that a row has: those of its sample, with a batch."""
        columns = math.prod(self.shape) if self.mode == "reverse" else self.seeds
        return columns // max(self.samples or 1, 1)

    @property
    def size(self) -> int:
        """Places in the buffer."""
        rows = self.seeds if self.mode == "reverse" else math.prod(self.shape)
        return rows * self.width

    @property
    def per_sample(self) -> tuple[int, int]:
        """Seeds and elements that belong to one sample; at least one."""
        samples = max(self.samples or 1, 1)
        return max(self.seeds // samples, 1), max(math.prod(self.shape) // samples, 1)

    def places(self, term: Term) -> Tensor:
        """Place of each entry; -1 for entries of other blocks, and between samples."""
        seeds = term.rows.expand(term.loop) - self.first
        elements = t.elements(term, self.shape)
        valid = (seeds >= 0) & (seeds < self.seeds) & (term.rows.expand(term.loop) >= 0)
        rows, columns = (seeds, elements) if self.mode == "reverse" else (elements, seeds)
        if self.samples is not None:
            mine, other = self.per_sample
            valid &= seeds.div(mine, rounding_mode="floor") == elements.div(
                other, rounding_mode="floor"
            )
            columns = columns % max(self.width, 1)
        return torch.where(valid, rows * self.width + columns, -1).reshape(-1)

    def steps(self, seeds: Sequence[int], elements: Sequence[int]) -> list[int]:
        """How far each axis of a loop steps in the buffer.

        Args:
            seeds: How far it steps along seeds.
            elements: How far it steps along elements; with a batch the first axis is the samples.
        """
        rows, columns = list(seeds), list(elements)
        if self.mode == "forward":
            rows, columns = columns, rows
        if self.samples is not None and columns:
            columns[0] -= self.width
        return [r * self.width + c for r, c in zip(rows, columns, strict=True)]


@dataclass(frozen=True, slots=True)
class Regular:
    """Places that each axis of a loop steps through evenly.

    Attributes:
        start: Place of the first entry.
        steps: Step of each axis.
    """

    start: int
    steps: list[int]

    def order(self, loop: Shape, size: int) -> list[int] | None:
        """The order of axes in which the loop fills a whole buffer, if it does."""
        if self.start != 0 or math.prod(loop) != size:
            return None
        order = sorted(range(len(loop)), key=lambda a: (-self.steps[a], -loop[a]))
        expected = 1
        for axis in reversed(order):
            if loop[axis] > 1:
                if self.steps[axis] != expected:
                    return None
                expected *= loop[axis]
        return order

    def disjoint(self, loop: Shape) -> bool:
        """Whether no place is met twice, as far as strides can say."""
        if min(self.steps, default=0) < 0:
            return False
        reach = 0
        for step, size in sorted((abs(s), size) for s, size in zip(self.steps, loop, strict=True)):
            if size > 1:
                if step <= reach:
                    return False
                reach += step * (size - 1)
        return True


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


@dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """Places of the entries of a sparse Jacobian.

    Attributes:
        keys: `row * n + column` of each, ascending.
        n: Number of columns.
        mode: What seeds are: rows in reverse mode, columns in forward mode.
    """

    keys: np.ndarray
    n: int
    mode: Mode

    @classmethod
    def of(cls, pattern: Pattern, mode: Mode) -> Slots:
        """Of the structural nonzeros of a pattern."""
        n = pattern.shape[1]
        return cls(pattern.rows.astype(np.int64) * n + pattern.columns, n, mode)

    def find(self, seeds: np.ndarray, elements: np.ndarray) -> np.ndarray:
        """The number of each entry; -1 for one that is structurally zero."""
        rows, columns = (seeds, elements) if self.mode == "reverse" else (elements, seeds)
        wanted = rows * self.n + columns
        if not len(self.keys):
            return np.full(wanted.shape, -1)
        at = np.searchsorted(self.keys, wanted)
        at[at == len(self.keys)] = 0
        return np.where((self.keys[at] == wanted) & (seeds >= 0), at, -1)


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
