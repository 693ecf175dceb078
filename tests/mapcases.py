"""Random structured maps, each with a matrix that was made from its definition, entry by entry.

Unknown factors are random numbers there. All numbers are small integers, so the matrices are exact.
Two families leave nothing to chance: in `KNOWN` every factor is known (of either sign, so entries
cancel), in `POSITIVE` factors may be unknown and none is negative (so nothing cancels).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from torchjac.linear.maps import (
    UNKNOWN,
    LinearMap,
    Shape,
    Zero,
    add,
    axis_sum,
    dense,
    diagonal,
    gather,
    index_map,
    product,
    reshape,
    scatter,
)

SIZES = st.sampled_from([1, 2, 3, 2, 4, 0])
SHAPES = st.lists(SIZES, max_size=3).map(tuple)
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Family:
    """Which factors occur.

    Attributes:
        numbers: Known ones.
        unknown: Whether there are unknown ones.
    """

    numbers: tuple[float, ...]
    unknown: bool


KNOWN = Family((1.0, -1.0, 2.0, -3.0, 0.0), False)
POSITIVE = Family((1.0, 2.0, 5.0, 0.0), True)
MIXED = Family((1.0, -1.0, 2.0, -2.0, 0.0), True)


@dataclass(frozen=True)
class Case:
    """A map and its matrix."""

    map: LinearMap
    matrix: Matrix


class _Maker:
    def __init__(self, draw: st.DrawFn, family: Family):
        self.draw = draw
        self.family = family

    def pick(self, *options: object) -> object:
        return self.draw(st.sampled_from(options))

    def number(self) -> float:
        options = [*self.family.numbers, *([UNKNOWN] * 2 if self.family.unknown else [])]
        return self.draw(st.sampled_from(options))

    def solved(self, factors: Tensor) -> Matrix:
        """The factors with random numbers for unknown ones."""
        matrix = factors.numpy().astype(np.float64).copy()
        holes = np.isnan(matrix)
        seed = self.draw(st.integers(0, 2**16))
        matrix[holes] = np.random.default_rng(seed).integers(3, 1000, size=int(holes.sum()))
        return matrix

    def axis(self, shape: Shape) -> int:
        return self.draw(st.integers(0, len(shape) - 1))

    def axes(self, shape: Shape) -> list[int]:
        return [i for i in range(len(shape)) if self.draw(st.booleans())]

    def index(self, count: int, size: int) -> Tensor:
        some = self.draw(st.lists(st.integers(0, size - 1), min_size=count, max_size=count))
        return torch.tensor(some, dtype=torch.int64)

    def scaled(self, shape: Shape) -> Case:
        factor = self.number()
        value = self.solved(torch.full((), factor, dtype=torch.float64))
        # One unknown number for all: the map does not say that they are the same.
        return Case(diagonal(shape, factor), np.eye(math.prod(shape)) * value)

    def diagonal(self, shape: Shape) -> Case:
        stored = [1 if self.draw(st.booleans()) else s for s in shape]
        numbers = [self.number() for _ in range(math.prod(stored))]
        factors = torch.tensor(numbers, dtype=torch.float64).reshape(stored).expand(shape)
        return Case(diagonal(shape, factors), np.diag(self.solved(factors).reshape(-1)))

    def zero(self, shape: Shape) -> Case:
        out = self.draw(SHAPES)
        return Case(Zero(out, shape), np.zeros((math.prod(out), math.prod(shape))))

    def moved(self, shape: Shape) -> Case:
        run, fills = self.movement(shape)
        out = tuple(run(torch.zeros(shape)).shape)
        map_ = index_map(run, out, shape, fills)
        return Case(map_, by_basis(run, out, shape))

    def movement(self, shape: Shape) -> tuple[Callable[[Tensor], Tensor], bool]:
        if not shape:
            return (lambda t: t.expand(3, 2)), False
        axis = self.axis(shape)
        size = shape[axis]
        kinds = ["permute", "flip", "roll", "flat", "expand", "pad", "tril", "diagonal"]
        kinds += ["select", "gather"] if size else []
        kind = self.pick(*kinds)
        order = self.draw(st.permutations(range(len(shape))))
        by = self.draw(st.integers(-min(size, 2), 2))
        index = self.index(self.draw(st.integers(0, 4)), size) if size else None
        widths = [0, 0] * (len(shape) - 1 - axis) + [1, by]
        runs: dict[object, Callable[[Tensor], Tensor]] = {
            "permute": lambda t: t.permute(order),
            "flip": lambda t: t.flip(axis),
            "roll": lambda t: t.roll(by, axis),
            "flat": lambda t: t.reshape(-1),
            "expand": lambda t: t.unsqueeze(axis).expand(*shape[:axis], 2, *shape[axis:]),
            "pad": lambda t: torch.constant_pad_nd(t, widths),
            "tril": lambda t: t.tril() if t.ndim > 1 else t * torch.tensor(1, dtype=t.dtype),
            "diagonal": lambda t: t.diagonal() if t.ndim > 1 else torch.diag_embed(t),
            "select": lambda t: t.select(axis, size - 1),
            "gather": lambda t: t.index_select(axis, index),
        }
        return runs[kind], kind in ("pad", "tril", "diagonal")

    def scattered(self, shape: Shape) -> Case:
        axis = self.axis(shape)
        size = self.draw(st.integers(1, 4))
        index = self.index(shape[axis], size)
        out = (*shape[:axis], size, *shape[axis + 1 :])

        def run(t: Tensor) -> Tensor:
            return torch.zeros(out, dtype=t.dtype).index_add(axis, index, t)

        return Case(scatter(out, shape, axis, index), by_basis(run, out, shape))

    def summed(self, shape: Shape) -> Case:
        axes = self.axes(shape)
        map_ = axis_sum(shape, axes)
        return Case(map_, by_basis(lambda t: t.sum(axes) if axes else t, map_.shape_out, shape))

    def all_pairs(self, shape: Shape) -> Case:
        axes_in = self.axes(shape)
        new = self.draw(st.lists(SIZES, max_size=2))
        out = [(s, i) for i, s in enumerate(shape) if i not in axes_in]
        for size in new:
            out.insert(self.draw(st.integers(0, len(out))), (size, -1))
        out_shape = tuple(s for s, _ in out)
        axes_out = [i for i, (_, lane) in enumerate(out) if lane < 0]
        mask = np.zeros((math.prod(out_shape), math.prod(shape)))
        for r, a in enumerate(np.ndindex(*out_shape)):
            for c, b in enumerate(np.ndindex(*shape)):
                mask[r, c] = all(a[i] == b[lane] for i, (_, lane) in enumerate(out) if lane >= 0)
        numbers = self.solved(torch.full(mask.shape, UNKNOWN, dtype=torch.float64))
        return Case(dense(out_shape, shape, axes_out, axes_in), mask * numbers)

    def across(self, out: Shape, shape: Shape) -> Case:
        """A map between tensors of any two shapes."""
        rows, columns = math.prod(out), math.prod(shape)
        if not (rows and columns):
            return Case(Zero(out, shape), np.zeros((rows, columns)))
        way = self.pick("gather", "scatter")
        if way == "gather":
            index = self.index(rows, columns)
            matrix = np.eye(columns)[index.numpy()]
            return Case(
                product(
                    reshape(out, (rows,)), gather((columns,), 0, index), reshape((columns,), shape)
                ),
                matrix,
            )
        index = self.index(columns, rows)
        put = scatter((rows,), (columns,), 0, index)
        return Case(
            product(reshape(out, (rows,)), put, reshape((columns,), shape)),
            np.eye(rows)[:, index.numpy()],
        )

    def leaf(self, shape: Shape) -> Case:
        makers = [self.scaled, self.diagonal, self.moved, self.summed, self.zero]
        makers += [self.diagonal, self.moved]
        makers += [self.scattered] if shape else []
        makers += [self.all_pairs] if self.family.unknown else []
        return self.draw(st.sampled_from(makers))(shape)

    def any(self, shape: Shape, depth: int) -> Case:
        kind = self.pick("leaf", "product", "product", "sum") if depth else "leaf"
        if kind == "leaf":
            return self.leaf(shape)
        first = self.any(shape, depth - 1)
        if kind == "product":
            return multiplied(self.any(first.map.shape_out, depth - 1), first)
        other = self.across(first.map.shape_out, shape)
        scale = self.diagonal(first.map.shape_out)
        return added(first, multiplied(scale, other))


def by_basis(run: Callable[[Tensor], Tensor], out: Shape, shape: Shape) -> Matrix:
    """The matrix of a linear function, column by column."""
    size = math.prod(shape)
    matrix = np.zeros((math.prod(out), size))
    for j in range(size):
        unit = torch.zeros(size, dtype=torch.float64)
        unit[j] = 1
        matrix[:, j] = run(unit.reshape(shape)).reshape(-1).numpy()
    return matrix


def multiplied(*cases: Case) -> Case:
    """The product of cases."""
    matrix = cases[0].matrix
    for case in cases[1:]:
        matrix = matrix @ case.matrix
    return Case(product(*(c.map for c in cases)), matrix)


def added(*cases: Case) -> Case:
    """The sum of cases."""
    return Case(add(*(c.map for c in cases)), sum(c.matrix for c in cases))


@st.composite
def cases(draw: st.DrawFn, family: Family, depth: int = 2) -> Case:
    """A map of any kind between tensors of any shapes."""
    return _Maker(draw, family).any(draw(SHAPES), depth)


@st.composite
def chains(draw: st.DrawFn, family: Family, count: int, depth: int = 1) -> list[Case]:
    """Maps that can be multiplied, the last acting first."""
    maker = _Maker(draw, family)
    maps = [maker.any(draw(SHAPES), depth)]
    while len(maps) < count:
        maps.insert(0, maker.any(maps[0].map.shape_out, depth))
    return maps


@st.composite
def parallel(draw: st.DrawFn, family: Family, depth: int = 1) -> tuple[Case, Case]:
    """Two maps between the same tensors."""
    maker = _Maker(draw, family)
    first = maker.any(draw(SHAPES), depth)
    across = maker.across(first.map.shape_out, first.map.shape_in)
    return first, multiplied(maker.diagonal(first.map.shape_out), across)


def dense_of(table: sparse.csr_array) -> Matrix:
    """A table with nothing stored that is zero, as a dense array; NaN is unknown."""
    assert table.has_sorted_indices
    assert (table.data != 0).all()
    keys = list(itertools.pairwise(table.indices))
    ends = set(table.indptr.tolist())
    assert all(a < b or k + 1 in ends for k, (a, b) in enumerate(keys))
    return table.toarray()


def contains(structure: Matrix, numbers: Matrix) -> bool:
    """Whether every nonzero is there, and every known factor is the number."""
    known = ~np.isnan(structure)
    return bool(
        ((structure != 0) | (numbers == 0)).all() and (structure[known] == numbers[known]).all()
    )


def is_structure_of(structure: Matrix, numbers: Matrix) -> bool:
    """Whether in addition there is nothing else."""
    return contains(structure, numbers) and bool(((structure != 0) == (numbers != 0)).all())


def stored_elements(tensor: Tensor) -> int:
    """Elements that a tensor holds memory for."""
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal, unknown entries included."""
    return a.shape == b.shape and np.array_equal(a, b, equal_nan=True)
