"""A program of one sample as loops over what is made alike, each over a strip of samples.

A *strip* is as many samples as fit into a register of the processor: every value is an array whose
last axis they are. Products of matrices stay whole, so that networks with wide layers are a few
loops, however wide; what is computed after each other goes from one to the next in the nearest
cache. (Structure of arrays; the products are tiled as in Goto and van de Geijn, "Anatomy of
high-performance matrix multiplication", 2008, section 6, the strip being the packed operand.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from torchjac.compiler.codegen.scalar_ir import (
    ONE,
    ArrayRef,
    Expression,
    Map,
    Places,
    Sizes,
    loaded,
    multiplied,
    summed,
)
from torchjac.errors import PlanRefused


@dataclass(frozen=True, slots=True, eq=False)
class Home:
    """Which lanes belong to which sample.

    Attributes:
        sample: For each lane its sample.
        order: For each sample its lanes, in order.
        rank: For each lane where in its sample it is.
    """

    sample: Places
    order: Places
    rank: Places

    @property
    def width(self) -> int:
        """Lanes of one sample."""
        return int(self.order.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """An operand of a product, of one sample.

    Attributes:
        start: Where its first element is, for each matrix.
        across: From one of its rows (of a left operand; of a right one from a column) to the next.
        along: From one number that is multiplied to the next.
    """

    start: tuple[int, ...]
    across: int
    along: int


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """A product of matrices, of one sample.

    Attributes:
        sizes: Its sizes.
        left: The left operand.
        right: The right one.
    """

    sizes: Sizes
    left: Matrix
    right: Matrix


class Strips:
    """What of each expression belongs to one sample.

    Args:
        every: All expressions.
        numbers: Those that are needed, arguments first.
        count: How many samples there are.
        per_sample: Arrays that hold samples.

    Attributes:
        homes: The lanes of expressions that differ from sample to sample; None for others.
        products: The products.
        levels: How often values go through memory before each expression.
        stored: Expressions whose values do.
    """

    def __init__(
        self,
        every: Sequence[Expression],
        numbers: Sequence[int],
        count: int,
        per_sample: frozenset[ArrayRef],
    ):
        """Looks at all of them.

        Raises:
            PlanRefused: Samples are not computed alike, or not one by one.
        """
        self._all = every
        self._count = count
        self._per_sample = per_sample
        self._known: dict[int, list[Home]] = {}
        self.homes: dict[int, Home | None] = {}
        self.products: dict[int, Product] = {}
        self.levels: dict[int, int] = {}
        self.stored: set[int] = set()
        for number in numbers:
            self.homes[number] = self._home(number)
            self._level(number)

    def lanes(self, number: int, by: Map | None, home: Home | None) -> Places | None:
        """For each place in a sample which value of an argument it takes; None for the same.

        Args:
            number: The argument.
            by: How lanes go to its lanes.
            home: The lanes of what takes it; of what does not differ from sample to sample None.

        Raises:
            PlanRefused: That depends on the sample.
        """
        own = self.homes[number]
        if self._all[number].lanes is ONE:
            return np.zeros(1, dtype=np.int64)
        if home is None:
            return None if by is None else by.places
        if by is None and own is home:
            return None
        places = home.order if by is None else by.places[home.order]
        found = places if own is None else own.rank[places]
        if (found != found[:1]).any():
            raise PlanRefused("samples are not computed alike")
        return np.asarray(found[0])

    def _home(self, number: int) -> Home | None:
        expression = self._all[number]
        if expression.kind == "constant" or expression.lanes is ONE:
            return None
        if expression.kind == "load":
            array, step, start = loaded(expression)
            if array not in self._per_sample:
                return None
            size = expression.lanes.size
            if step != 1 or start or size % self._count:
                raise PlanRefused("samples are not next to each other")
            return self._of(expression, np.arange(size) // (size // self._count))
        if expression.kind == "product":
            return self._multiplied(number)
        if expression.kind == "segments":
            return self._added(number)
        found: Places | None = None
        for argument, by in expression.arguments:
            own = self.homes[argument]
            if own is None:
                continue
            sample = own.sample if by is None else own.sample[by.places]
            if found is not None and not np.array_equal(found, sample):
                raise PlanRefused("a sample looks at another")
            found = sample
        return None if found is None else self._of(expression, found)

    def _of(self, expression: Expression, sample: Places) -> Home:
        """The same object for the same lanes."""
        known = self._known.setdefault(id(expression.lanes), [])
        for home in known:
            if np.array_equal(home.sample, sample):
                return home
        if (np.bincount(sample, minlength=self._count) * self._count != len(sample)).any():
            raise PlanRefused("samples are not computed alike")
        order = np.argsort(sample, kind="stable").reshape(self._count, -1)
        rank = np.empty_like(sample)
        rank[order] = np.arange(order.shape[1])
        known.append(Home(sample, order, rank))
        return known[-1]

    def _added(self, number: int) -> Home | None:
        """Of sums over lanes."""
        expression = self._all[number]
        argument, lanes, starts = summed(expression)
        own = self.homes[argument]
        if own is None:
            return None
        counts = np.diff(starts)
        if not counts.all():
            raise PlanRefused("a sum of nothing")
        sample = own.sample[lanes]
        first = sample[starts[:-1]]
        if (sample != np.repeat(first, counts)).any():
            raise PlanRefused("a sample looks at another")
        return self._of(expression, first)

    def terms(self, number: int) -> tuple[Places, Places]:
        """Of a sum over lanes what is added, for each place in a sample, and where that begins.

        Raises:
            PlanRefused: That depends on the sample.
        """
        expression, home = self._all[number], self.homes[number]
        argument, lanes, starts = summed(expression)
        if home is None:
            return lanes, starts
        own = self.homes[argument]
        assert own is not None
        rank, counts = own.rank[lanes], np.diff(starts)[home.order]
        if (counts != counts[:1]).any():
            raise PlanRefused("samples are not computed alike")
        begins = np.append(0, np.cumsum(counts[0]))
        offset = np.arange(begins[-1]) - np.repeat(begins[:-1], counts[0])
        taken = rank[np.repeat(starts[:-1][home.order], counts[0], axis=1) + offset]
        if (taken != taken[:1]).any():
            raise PlanRefused("samples are not computed alike")
        return np.asarray(taken[0]), begins

    def _multiplied(self, number: int) -> Home | None:
        """Of a product of matrices."""
        expression = self._all[number]
        sizes = multiplied(expression)
        count, rows, inner, columns = sizes
        (left, to_left), (right, to_right) = expression.arguments
        assert to_left is not None
        assert to_right is not None
        a = to_left.places.reshape(count, rows, inner)
        b = to_right.places.reshape(count, inner, columns).transpose(0, 2, 1)
        of_rows, of_columns = (
            None if own is None else _same_along(own.sample[x])
            for own, x in ((self.homes[left], a), (self.homes[right], b))
        )
        parts = [x[:, :, None] for x in (of_rows,) if x is not None]
        parts += [x[:, None, :] for x in (of_columns,) if x is not None]
        if not parts:
            self.products[number] = Product(sizes, *self._shared(left, right, a, b))
            return None
        sampled, other = (np.broadcast_to(x, (count, rows, columns)) for x in (parts[0], parts[-1]))
        if not np.array_equal(sampled, other):
            raise PlanRefused("a sample looks at another")
        home = self._of(expression, sampled.reshape(-1))
        within = self._within(sampled)
        self.products[number] = Product(
            Sizes(len(within[0][0]), len(within[1][0]), inner, len(within[2][0])),
            self._operand(left, a, within[0], within[1]),
            self._operand(right, b, within[0], within[2]),
        )
        return home

    def _within(self, sampled: Places) -> list[Places]:
        """For each sample, and each axis of its matrices, which places on it are its own."""
        found = []
        for axis, size in enumerate(sampled.shape):
            moved = np.moveaxis(sampled, axis, 0).reshape(size, -1)
            if (moved == moved[:, :1]).all() and (moved[:, 0] != moved[0, 0]).any():
                each = [np.flatnonzero(moved[:, 0] == k) for k in range(self._count)]
                if len({len(x) for x in each}) > 1:
                    raise PlanRefused("samples are not computed alike")
                found.append(np.stack(each))
            else:
                found.append(np.tile(np.arange(size), (self._count, 1)))
        if math.prod(x.shape[1] for x in found) * self._count != sampled.size:
            raise PlanRefused("samples are along several axes of a product, or along none")
        return found

    def _shared(self, left: int, right: int, a: Places, b: Places) -> tuple[Matrix, Matrix]:
        """The operands of a product that no sample differs in."""
        matrices = np.arange(len(a))[None]
        return (
            self._operand(left, a, matrices, np.arange(a.shape[1])[None]),
            self._operand(right, b, matrices, np.arange(b.shape[1])[None]),
        )

    def _operand(self, number: int, places: Places, matrices: Places, across: Places) -> Matrix:
        """Where the elements of an operand are, in one sample."""
        own = self.homes[number]
        found = [
            places[np.ix_(m, r)] if own is None else own.rank[places[np.ix_(m, r)]]
            for m, r in zip(matrices, across, strict=True)
        ]
        if any(not np.array_equal(x, found[0]) for x in found):
            raise PlanRefused("samples are not computed alike")
        one = found[0]
        step = int(one[0, 1, 0] - one[0, 0, 0]) if one.shape[1] > 1 else 0
        along = int(one[0, 0, 1] - one[0, 0, 0]) if one.shape[2] > 1 else 0
        start = one[:, :1, :1]
        line = start + step * np.arange(one.shape[1])[:, None] + along * np.arange(one.shape[2])
        if (one != line).any():
            raise PlanRefused("elements of a matrix are not at equal distances")
        return Matrix(tuple(start.reshape(-1).tolist()), step, along)

    def _level(self, number: int) -> None:
        """How often values go through memory before an expression, and which do for it."""
        expression, home = self._all[number], self.homes[number]
        level = 0
        for argument, by in expression.arguments:
            of, own = self._all[argument], self.homes[argument]
            if of.kind == "constant" or of.lanes is ONE:
                continue
            if own is None and of.kind == "load":  # read where it is
                continue
            if self._is_beside(number, argument, by):
                level = max(level, self.levels[argument])
                continue
            self.stored.add(argument)
            if own is not None or home is None:
                level = max(level, self.levels[argument] + 1)
        self.levels[number] = level
        for argument, by in expression.arguments:
            if self._is_beside(number, argument, by) and self.levels[argument] < level:
                self.stored.add(argument)

    def _is_beside(self, number: int, argument: int, by: Map | None) -> bool:
        """Whether it is computed in the same turn of the same loop, if at the same level."""
        loops = ("product", "segments", "load")
        return (
            by is None
            and self.homes[number] is self.homes[argument]
            and self._all[number].kind not in loops
            and self._all[argument].kind not in (*loops, "constant")
            and self._all[argument].lanes is self._all[number].lanes
        )


def _same_along(sample: Places) -> Places:
    """The samples of the rows of operands.

    Raises:
        PlanRefused: A row is of several.
    """
    if (sample != sample[..., :1]).any():
        raise PlanRefused("a sample looks at another")
    return np.asarray(sample[..., 0])
