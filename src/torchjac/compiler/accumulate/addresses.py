"""Addresses of entries in the memory of a result: in a dense block, or among nonzeros."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchjac.compiler.accumulate import adjoint as t
from torchjac.compiler.accumulate.adjoint import Term
from torchjac.linear.maps import Shape
from torchjac.request import Mode
from torchjac.sparsity.pattern import Pattern


@dataclass(frozen=True, slots=True)
class Block:
    """The buffer of the entries between one output and one input leaf.

    Adjoints run from seeds to elements: in reverse mode seeds are rows of the block and elements
    are columns, in forward mode seeds are columns and elements are rows. Entry (row, column) is
    element `row * width + column % width` of the buffer.

    Attributes:
        first: Number of the first seed.
        seeds: Number of seeds.
        shape: Shape of the leaf of the elements.
        samples: Size of the batch, the first axis of both leaves; None without a batch.
        mode: `reverse` if seeds are rows, `forward` if they are columns.
    """

    first: int
    seeds: int
    shape: Shape
    samples: int | None = None
    mode: Mode = "reverse"

    @property
    def width(self) -> int:
        """Number of columns of a row; with a batch, of its sample."""
        columns = math.prod(self.shape) if self.mode == "reverse" else self.seeds
        return columns // max(self.samples or 1, 1)

    @property
    def size(self) -> int:
        """Number of elements of the buffer."""
        rows = self.seeds if self.mode == "reverse" else math.prod(self.shape)
        return rows * self.width

    @property
    def per_sample(self) -> tuple[int, int]:
        """Numbers of seeds and elements of one sample; at least one."""
        samples = max(self.samples or 1, 1)
        return max(self.seeds // samples, 1), max(math.prod(self.shape) // samples, 1)

    def places(self, term: Term) -> Tensor:
        """Position of each entry in the buffer; -1 in other blocks, and between samples."""
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
        """Stride of each axis of a loop in the buffer.

        Args:
            seeds: Stride of each axis in the seeds.
            elements: Stride of each axis in the elements; with a batch the first axis is the batch.
        """
        rows, columns = list(seeds), list(elements)
        if self.mode == "forward":
            rows, columns = columns, rows
        if self.samples is not None and columns:
            columns[0] -= self.width
        return [r * self.width + c for r, c in zip(rows, columns, strict=True)]


@dataclass(frozen=True, slots=True)
class Regular:
    """Positions that are an affine function of the indices of a loop.

    Attributes:
        start: Position of the first entry.
        steps: Stride of each axis.
    """

    start: int
    steps: list[int]

    def order(self, loop: Shape, size: int) -> list[int] | None:
        """The order of axes in which the loop fills a whole buffer; None if none does."""
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
        """Whether strides prove that no position comes twice."""
        if min(self.steps, default=0) < 0:
            return False
        reach = 0
        for step, size in sorted((abs(s), size) for s, size in zip(self.steps, loop, strict=True)):
            if size > 1:
                if step <= reach:
                    return False
                reach += step * (size - 1)
        return True


@dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """Positions of the entries of a sparse Jacobian in its values.

    Attributes:
        keys: `row * n + column` of each entry, ascending.
        n: Number of columns.
        mode: `reverse` if seeds are rows, `forward` if they are columns.
    """

    keys: np.ndarray
    n: int
    mode: Mode

    @classmethod
    def of(cls, pattern: Pattern, mode: Mode) -> Slots:
        """The positions of the structural nonzeros of a pattern."""
        n = pattern.shape[1]
        return cls(pattern.rows.astype(np.int64) * n + pattern.columns, n, mode)

    def find(self, seeds: np.ndarray, elements: np.ndarray) -> np.ndarray:
        """The position of each entry; -1 for a structural zero."""
        rows, columns = (seeds, elements) if self.mode == "reverse" else (elements, seeds)
        wanted = rows * self.n + columns
        if not len(self.keys):
            return np.full(wanted.shape, -1)
        at = np.searchsorted(self.keys, wanted)
        at[at == len(self.keys)] = 0
        return np.where((self.keys[at] == wanted) & (seeds >= 0), at, -1)
