"""From the terms of the gradients to the finished Jacobian: every entry goes to its place once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Block:
    """Where the entries between one output and one input leaf go, in a buffer of their own.

    Entry (row, column) is element `(row - first) * width + column % width` of the buffer.

    Attributes:
        first: First row of the output leaf.
        rows: How many it has.
        shape: Shape of the input leaf.
        samples: Size of the batch that both begin with; None without one.
    """

    first: int
    rows: int
    shape: Shape
    samples: int | None = None

    @property
    def width(self) -> int:
        """Columns that a row has: those of its sample, with a batch."""
        return math.prod(self.shape if self.samples is None else self.shape[1:])

    @property
    def steps(self) -> list[int]:
        """How far each axis of the input leaf steps."""
        steps = [1] * len(self.shape)
        for a in range(len(self.shape) - 2, -1, -1):
            steps[a] = steps[a + 1] * self.shape[a + 1]
        if self.samples is not None:
            steps[0] = 0
        return steps

    def places(self, term: Term) -> Tensor:
        """Place of each entry; -1 for entries of other blocks, and between samples."""
        rows = term.rows.expand(term.loop) - self.first
        columns = t.elements(term, self.shape)
        valid = (rows >= 0) & (rows < self.rows) & (term.rows.expand(term.loop) >= 0)
        if self.samples is not None:
            per = max(self.rows // max(self.samples, 1), 1)
            valid &= rows.div(per, rounding_mode="floor") == columns.div(
                max(self.width, 1), rounding_mode="floor"
            )
            columns = columns % max(self.width, 1)
        return torch.where(valid, rows * self.width + columns, -1).reshape(-1)


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
    size = block.rows * block.width
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
    found, columns = t.even(rows), (0, [*block.steps, *[0] * (rows.ndim - len(block.shape))])
    small = t.compact(rows, [a for a in range(rows.ndim) if t.is_free(rows, a)]) - block.first
    if start < 0 or found is None or int(small.max()) >= block.rows:
        return None
    if term.target is not None:
        placed_at = t.even(term.target.expand(term.loop))
        if placed_at is None or block.samples is not None:
            return None
        columns = placed_at
    steps = [s * block.width + o for s, o in zip(found[1], columns[1], strict=True)]
    if block.samples is not None and len(block.shape):
        per = max(block.rows // max(block.samples, 1), 1)
        sample = small.div(per, rounding_mode="floor")
        mine = torch.arange(term.loop[0]).reshape(-1, *[1] * (rows.ndim - 1))
        if not bool((sample == mine).all()):
            return None
    return Regular(start * block.width + columns[0], steps)


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
    """

    keys: np.ndarray
    n: int

    @classmethod
    def of(cls, pattern: Pattern) -> Slots:
        """Of the structural nonzeros of a pattern."""
        n = pattern.shape[1]
        return cls(pattern.rows.astype(np.int64) * n + pattern.columns, n)

    def find(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """The number of each entry; -1 for one that is structurally zero."""
        wanted = rows * self.n + columns
        if not len(self.keys):
            return np.full(wanted.shape, -1)
        at = np.searchsorted(self.keys, wanted)
        at[at == len(self.keys)] = 0
        return np.where((self.keys[at] == wanted) & (rows >= 0), at, -1)


def sparse(
    adjoints: Sequence[tuple[Adjoint, int]],
    slots: Slots,
    like: Tensor,
    varies: Callable[[Tensor], bool],
) -> Tensor:
    """The values of the structural nonzeros, in the order of the pattern.

    Args:
        adjoints: Gradients, each with the number of its first column.
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
                columns = t.elements(term, adjoint.shape).reshape(-1).numpy() + first
                rows = term.rows.expand(term.loop).reshape(-1).numpy()
                found = torch.from_numpy(slots.find(rows, columns)).reshape(term.loop)
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
