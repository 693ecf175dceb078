"""The layout of a program over a few samples: the points and the loops of one sample.

A program runs over SIMD batches: as many samples as a register holds. Every value is an array
whose last axis are the samples of a batch. Matrix products stay whole, so that networks with wide
layers are a few loops, however wide; intermediate values stay in the nearest cache. (Structure of
arrays; the products are tiled as in Goto and van de Geijn, "Anatomy of high-performance matrix
multiplication", 2008, section 6; the batch is the packed operand.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from torchjac.compiler.codegen.scalar_ir import (
    SCALAR,
    ArrayRef,
    Expression,
    IndexMap,
    Indices,
    MatmulSizes,
    load_of,
    matmul_sizes_of,
    segments_of,
)
from torchjac.errors import PlanRefused


@dataclass(frozen=True, slots=True, eq=False)
class SampleLayout:
    """The points of a domain, divided by samples.

    Attributes:
        sample: For each point its sample.
        order: For each sample its points, in order.
        rank: For each point its position within its sample.
    """

    sample: Indices
    order: Indices
    rank: Indices

    @property
    def width(self) -> int:
        """The number of points of one sample."""
        return int(self.order.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class MatrixLayout:
    """The elements of a factor of a matrix product, within one sample.

    Attributes:
        start: The first element of each matrix.
        across: The distance between rows of a left factor, or columns of a right factor.
        along: The distance between elements along the contracted axis.
    """

    start: tuple[int, ...]
    across: int
    along: int


@dataclass(frozen=True, slots=True, eq=False)
class Matmul:
    """A batch of matrix products, within one sample.

    Attributes:
        sizes: The sizes.
        left: The left factor.
        right: The right factor.
    """

    sizes: MatmulSizes
    left: MatrixLayout
    right: MatrixLayout


class BatchLayout:
    """The part of each expression that belongs to one sample.

    Args:
        every: All expressions.
        numbers: The expressions that are needed, arguments first.
        count: The number of samples.
        per_sample: The arrays that hold samples.

    Attributes:
        layouts: The layout of each expression that differs between samples; None for the rest.
        matmuls: The matrix products.
        levels: The number of buffers before each expression.
        stored: The expressions that have a buffer.
    """

    def __init__(
        self,
        every: Sequence[Expression],
        numbers: Sequence[int],
        count: int,
        per_sample: frozenset[ArrayRef],
    ):
        """Computes the layout of all expressions.

        Raises:
            PlanRefused: Samples depend on each other, or are computed differently.
        """
        self._all = every
        self._count = count
        self._per_sample = per_sample
        self._known: dict[int, list[SampleLayout]] = {}
        self.layouts: dict[int, SampleLayout | None] = {}
        self.matmuls: dict[int, Matmul] = {}
        self.levels: dict[int, int] = {}
        self.stored: set[int] = set()
        for number in numbers:
            self.layouts[number] = self._home(number)
            self._level(number)

    def argument_points(
        self, number: int, by: IndexMap | None, layout: SampleLayout | None
    ) -> Indices | None:
        """For each point of a sample the point of an argument; None for the identity.

        Args:
            number: The argument.
            by: The index map of the argument.
            layout: The layout of the user; None if the user does not differ between samples.

        Raises:
            PlanRefused: The points depend on the sample.
        """
        own = self.layouts[number]
        if self._all[number].domain is SCALAR:
            return np.zeros(1, dtype=np.int64)
        if layout is None:
            return None if by is None else by.indices
        if by is None and own is layout:
            return None
        indices = layout.order if by is None else by.indices[layout.order]
        result = indices if own is None else own.rank[indices]
        if (result != result[:1]).any():
            raise PlanRefused("samples are not computed alike")
        return np.asarray(result[0])

    def _home(self, number: int) -> SampleLayout | None:
        expression = self._all[number]
        if expression.kind == "constant" or expression.domain is SCALAR:
            return None
        if expression.kind == "load":
            array, step, start = load_of(expression)
            if array not in self._per_sample:
                return None
            size = expression.domain.size
            if step != 1 or start or size % self._count:
                raise PlanRefused("samples are not next to each other")
            return self._of(expression, np.arange(size) // (size // self._count))
        if expression.kind == "product":
            return self._multiplied(number)
        if expression.kind == "segments":
            return self._added(number)
        result: Indices | None = None
        for argument, by in expression.arguments:
            own = self.layouts[argument]
            if own is None:
                continue
            sample = own.sample if by is None else own.sample[by.indices]
            if result is not None and not np.array_equal(result, sample):
                raise PlanRefused("a sample looks at another")
            result = sample
        return None if result is None else self._of(expression, result)

    def _of(self, expression: Expression, sample: Indices) -> SampleLayout:
        """The layout of a domain, one object for equal layouts."""
        known = self._known.setdefault(id(expression.domain), [])
        for layout in known:
            if np.array_equal(layout.sample, sample):
                return layout
        if (np.bincount(sample, minlength=self._count) * self._count != len(sample)).any():
            raise PlanRefused("samples are not computed alike")
        order = np.argsort(sample, kind="stable").reshape(self._count, -1)
        rank = np.empty_like(sample)
        rank[order] = np.arange(order.shape[1])
        known.append(SampleLayout(sample, order, rank))
        return known[-1]

    def _added(self, number: int) -> SampleLayout | None:
        """The layout of a segment sum."""
        expression = self._all[number]
        argument, points, starts = segments_of(expression)
        own = self.layouts[argument]
        if own is None:
            return None
        counts = np.diff(starts)
        if not counts.all():
            raise PlanRefused("a sum of nothing")
        sample = own.sample[points]
        first = sample[starts[:-1]]
        if (sample != np.repeat(first, counts)).any():
            raise PlanRefused("a sample looks at another")
        return self._of(expression, first)

    def terms(self, number: int) -> tuple[Indices, Indices]:
        """The terms of a segment sum within one sample, and the first term of each point.

        Raises:
            PlanRefused: The terms depend on the sample.
        """
        expression, layout = self._all[number], self.layouts[number]
        argument, points, starts = segments_of(expression)
        if layout is None:
            return points, starts
        own = self.layouts[argument]
        assert own is not None
        rank, counts = own.rank[points], np.diff(starts)[layout.order]
        if (counts != counts[:1]).any():
            raise PlanRefused("samples are not computed alike")
        begins = np.append(0, np.cumsum(counts[0]))
        offset = np.arange(begins[-1]) - np.repeat(begins[:-1], counts[0])
        terms = rank[np.repeat(starts[:-1][layout.order], counts[0], axis=1) + offset]
        if (terms != terms[:1]).any():
            raise PlanRefused("samples are not computed alike")
        return np.asarray(terms[0]), begins

    def _multiplied(self, number: int) -> SampleLayout | None:
        """The layout of a matrix product."""
        expression = self._all[number]
        sizes = matmul_sizes_of(expression)
        count, rows, inner, columns = sizes
        (left, to_left), (right, to_right) = expression.arguments
        assert to_left is not None
        assert to_right is not None
        a = to_left.indices.reshape(count, rows, inner)
        b = to_right.indices.reshape(count, inner, columns).transpose(0, 2, 1)
        of_rows, of_columns = (
            None if own is None else _same_along(own.sample[x])
            for own, x in ((self.layouts[left], a), (self.layouts[right], b))
        )
        parts = [x[:, :, None] for x in (of_rows,) if x is not None]
        parts += [x[:, None, :] for x in (of_columns,) if x is not None]
        if not parts:
            self.matmuls[number] = Matmul(sizes, *self._shared(left, right, a, b))
            return None
        sample_of, other = (
            np.broadcast_to(x, (count, rows, columns)) for x in (parts[0], parts[-1])
        )
        if not np.array_equal(sample_of, other):
            raise PlanRefused("a sample looks at another")
        layout = self._of(expression, sample_of.reshape(-1))
        within = self._within(sample_of)
        self.matmuls[number] = Matmul(
            MatmulSizes(len(within[0][0]), len(within[1][0]), inner, len(within[2][0])),
            self._operand(left, a, within[0], within[1]),
            self._operand(right, b, within[0], within[2]),
        )
        return layout

    def _within(self, sample_of: Indices) -> list[Indices]:
        """For each axis of a product the indices of each sample on that axis."""
        result = []
        for axis, size in enumerate(sample_of.shape):
            moved = np.moveaxis(sample_of, axis, 0).reshape(size, -1)
            if (moved == moved[:, :1]).all() and (moved[:, 0] != moved[0, 0]).any():
                each = [np.flatnonzero(moved[:, 0] == k) for k in range(self._count)]
                if len({len(x) for x in each}) > 1:
                    raise PlanRefused("samples are not computed alike")
                result.append(np.stack(each))
            else:
                result.append(np.tile(np.arange(size), (self._count, 1)))
        if math.prod(x.shape[1] for x in result) * self._count != sample_of.size:
            raise PlanRefused("samples are along several axes of a product, or along none")
        return result

    def _shared(
        self, left: int, right: int, a: Indices, b: Indices
    ) -> tuple[MatrixLayout, MatrixLayout]:
        """The factors of a product that is the same for all samples."""
        matrices = np.arange(len(a))[None]
        return (
            self._operand(left, a, matrices, np.arange(a.shape[1])[None]),
            self._operand(right, b, matrices, np.arange(b.shape[1])[None]),
        )

    def _operand(
        self, number: int, indices: Indices, matrices: Indices, across: Indices
    ) -> MatrixLayout:
        """The layout of a factor, within one sample."""
        own = self.layouts[number]
        result = [
            indices[np.ix_(m, r)] if own is None else own.rank[indices[np.ix_(m, r)]]
            for m, r in zip(matrices, across, strict=True)
        ]
        if any(not np.array_equal(x, result[0]) for x in result):
            raise PlanRefused("samples are not computed alike")
        one = result[0]
        step = int(one[0, 1, 0] - one[0, 0, 0]) if one.shape[1] > 1 else 0
        along = int(one[0, 0, 1] - one[0, 0, 0]) if one.shape[2] > 1 else 0
        start = one[:, :1, :1]
        line = start + step * np.arange(one.shape[1])[:, None] + along * np.arange(one.shape[2])
        if (one != line).any():
            raise PlanRefused("elements of a matrix are not at equal distances")
        return MatrixLayout(tuple(start.reshape(-1).tolist()), step, along)

    def _level(self, number: int) -> None:
        """Sets the level of an expression, and the arguments that need a buffer."""
        expression, layout = self._all[number], self.layouts[number]
        level = 0
        for argument, by in expression.arguments:
            of, own = self._all[argument], self.layouts[argument]
            if of.kind == "constant" or of.domain is SCALAR:
                continue
            if own is None and of.kind == "load":  # is read from its array
                continue
            if self._is_same_loop(number, argument, by):
                level = max(level, self.levels[argument])
                continue
            self.stored.add(argument)
            if own is not None or layout is None:
                level = max(level, self.levels[argument] + 1)
        self.levels[number] = level
        for argument, by in expression.arguments:
            if self._is_same_loop(number, argument, by) and self.levels[argument] < level:
                self.stored.add(argument)

    def _is_same_loop(self, number: int, argument: int, by: IndexMap | None) -> bool:
        """Whether one loop computes an argument and its user together, if levels are equal."""
        loops = ("product", "segments", "load")
        return (
            by is None
            and self.layouts[number] is self.layouts[argument]
            and self._all[number].kind not in loops
            and self._all[argument].kind not in (*loops, "constant")
            and self._all[argument].domain is self._all[number].domain
        )


def _same_along(sample: Indices) -> Indices:
    """The sample of each row of a factor.

    Raises:
        PlanRefused: A row has several samples.
    """
    if (sample != sample[..., :1]).any():
        raise PlanRefused("a sample looks at another")
    return np.asarray(sample[..., 0])
