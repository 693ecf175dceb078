"""Tensor loops: a loop for each set of expressions of one domain, and whole matrix products."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from torchjac.compiler.codegen.batch_layout import BatchLayout, MatrixLayout, SampleLayout
from torchjac.compiler.codegen.c.matmul_tiles import (
    SIMD,
    Factor,
    MatmulTiles,
    Operand,
    dtype_bytes,
    read_batch,
    simd_bytes,
    simd_type,
)
from torchjac.compiler.codegen.c.scalar_ops import CTYPES
from torchjac.compiler.codegen.c.writer import Writer
from torchjac.compiler.codegen.granularity import ScalarProgram
from torchjac.compiler.codegen.scalar_ir import SCALAR, IndexMap, Indices, load_of
from torchjac.compiler.codegen.scalar_order import reachable
from torchjac.compiler.codegen.schedule import LoopProgram
from torchjac.errors import PlanRefused

_MAX_SCRATCH = 1 << 20  # bytes of scratch memory: more are refused
# One loop: the layout of its points, and its expressions.
TensorLoop = tuple[SampleLayout | None, list[int]]
_SAMPLES = f"    for (int s = 0; s < {SIMD}; s++)"


class TensorWriter(Writer):
    """Writes tensor loops.

    Args:
        scalars: The expressions.
        program: The values that are written.
        count: The number of samples; 1 for a program without samples.
    """

    def __init__(self, scalars: ScalarProgram, program: LoopProgram, count: int = 1):
        """Computes the layout of one sample."""
        super().__init__(scalars, program)
        self._numbers = reachable(self._all, self._wanted)
        self._count = count
        self._layouts = BatchLayout(self._all, self._numbers, count, scalars.batched_inputs)
        dtypes = {self._all[n].dtype for n in self._numbers}
        if {"float64", "float32"} <= dtypes:
            raise PlanRefused("numbers of several dtypes")
        self.dtype = "float64" if "float64" in dtypes else "float32"
        self._stored = self._layouts.stored | {
            n for n in self._wanted if self._all[n].domain is not SCALAR and not self._is_read(n)
        }
        self.tile_bytes = dtype_bytes(self.dtype)
        self._tiles = MatmulTiles(self.dtype)
        self._offsets_of: dict[int, int] = {}

    def helpers(self) -> list[str]:
        """The width of a SIMD batch, and the functions of matrix products."""
        return [*simd_type(self.dtype), *self._tiles.lines]

    def memory(self) -> list[str]:
        """Declarations of the buffers."""
        buffers = [(f"x{n}", self._all[n].dtype, place) for n, place in self._offsets_of.items()]
        if self._tiles.packed:
            buffers.append(("packed", self.dtype, self.scratch))
            self.scratch += simd_bytes(self._tiles.packed, self.dtype)
        return [
            f"  {CTYPES[dtype]} *const {name} = (void *)((char *)scratch + {place});"
            for name, dtype, place in buffers
        ]

    def _is_read(self, number: int) -> bool:
        """Whether an expression is read from an array."""
        return self._all[number].kind == "load" and self._layouts.layouts[number] is None

    def _tensor_loops(self) -> list[TensorLoop]:
        """The loops: expressions of one level and one layout share a loop."""
        by_key: dict[tuple[int, int, int, int], list[int]] = {}
        for number in self._numbers:
            expression, layout = self._all[number], self._layouts.layouts[number]
            if (
                expression.kind == "constant"
                or expression.domain is SCALAR
                or self._is_read(number)
            ):
                continue
            alone = number if expression.kind in ("product", "segments", "load") else -1
            key = (self._layouts.levels[number], id(expression.domain), id(layout), alone)
            by_key.setdefault(key, []).append(number)
        order = sorted(by_key, key=lambda key: (key[0], by_key[key][0]))
        loops = [(self._layouts.layouts[by_key[key][0]], by_key[key]) for key in order]
        # Values that all samples share are computed before the loop over samples.
        return sorted(loops, key=lambda group: group[0] is not None)

    def _allot(self, loops: Sequence[TensorLoop]) -> None:
        """Allocates the buffers; dead buffers are used again.

        Raises:
            PlanRefused: The buffers do not fit into a near cache.
        """
        loop_of = {n: k for k, (_, numbers) in enumerate(loops) for n in numbers}
        last = dict.fromkeys(self._wanted, len(loops))
        for number in self._numbers:
            for argument, _ in self._all[number].arguments:
                last[argument] = max(last.get(argument, 0), loop_of.get(number, 0))
        free: list[tuple[int, int]] = []  # offset and bytes
        ends: defaultdict[int, list[int]] = defaultdict(list)
        for k, (layout, numbers) in enumerate(loops):
            for number in self._stored.intersection(numbers):
                self._offsets_of[number] = self._room(self._bytes(number), free)
                if layout is not None:  # shared values are read for every SIMD batch
                    ends[last[number]].append(number)
            free += [(self._offsets_of[number], self._bytes(number)) for number in ends.pop(k, ())]
        if self.scratch > _MAX_SCRATCH:
            raise PlanRefused(f"{self.scratch} bytes of values for a strip of samples")

    def _room(self, size: int, free: list[tuple[int, int]]) -> int:
        for k, (place, room) in enumerate(free):
            if room >= size:
                del free[k]
                if room > size:
                    free.append((place + size, room - size))
                return place
        place = self.scratch
        self.scratch += size
        return place

    def _bytes(self, number: int) -> int:
        """The size of a buffer, as whole cache lines."""
        expression, layout = self._all[number], self._layouts.layouts[number]
        if layout is None:
            return simd_bytes(expression.domain.size, expression.dtype)
        return simd_bytes(layout.width, expression.dtype, self.dtype)

    def _render_loop(self, numbers: Sequence[int], layout: SampleLayout | None) -> list[str]:
        """One loop as C."""
        self.loops += 1
        kind = self._all[numbers[0]].kind
        if kind == "load":
            assert layout is not None
            return read_batch(load_of(self._all[numbers[0]])[0], f"x{numbers[0]}", layout.width)
        if kind == "product":
            return self._matmul(numbers[0], layout)
        if kind == "segments":
            return self._sum(numbers[0], layout)
        size = self._all[numbers[0]].domain.size if layout is None else layout.width
        names: dict[int, str] = {}
        inner = []
        for number in numbers:
            expression = self._all[number]
            operands = [self._operand_text(a, by, layout, names) for a, by in expression.arguments]
            of = self._all[expression.arguments[0][0]].dtype
            iterations = size if layout is None else size * self._count
            text = self.operation(expression.kind, expression.dtype, operands, of, iterations)
            names[number] = f"v{number}"
            inner.append(f"      const {CTYPES[expression.dtype]} v{number} = {text};")
            if number in self._stored:
                inner.append(f"      x{number}[{_at('r', layout)}] = v{number};")
        head = f"    for (long r = 0; r < {size}; r++)"
        if layout is None:
            return ["  TORCHJAC_SPAN", f"  {head.lstrip()} {{", *inner, "  }"]
        return [f"{head} {{", "    TORCHJAC_SPAN", f"{_SAMPLES} {{", *inner, "    }", "    }"]

    def _operand_text(
        self, number: int, by: IndexMap | None, layout: SampleLayout | None, names: dict[int, str]
    ) -> str:
        """An argument of an expression as C."""
        expression = self._all[number]
        if expression.kind == "constant" or expression.domain is SCALAR:
            return self.scalar_name(number)
        if by is None and number in names:
            return names[number]
        indices = self._layouts.argument_points(number, by, layout)
        return self._element(number, indices, "r")

    def _element(self, number: int, indices: Indices | None, counter: str) -> str:
        """A value from memory as C."""
        expression = self._all[number]
        if self._is_read(number):
            array, step, start = load_of(expression)
            every = np.arange(expression.domain.size) if indices is None else indices
            return f"{array}[{self.index(every * step + start, counter)}]"
        where = counter if indices is None else self.index(indices, counter)
        return f"x{number}[{_at(where, self._layouts.layouts[number])}]"

    def _sum(self, number: int, layout: SampleLayout | None) -> list[str]:
        """A segment sum as C."""
        expression = self._all[number]
        argument = expression.arguments[0][0]
        indices, begins = self._layouts.terms(number)
        t, size = CTYPES[expression.dtype], len(begins) - 1
        self.work += len(indices) * (1 if layout is None else self._count)
        self.statements += 2
        value = self._element(argument, indices, "k")
        begin, end = self.index(begins, "r"), self.index(begins, "(r + 1)")
        head = f"    for (long r = 0; r < {size}; r++) {{"
        inner = f"      for (long k = {begin}; k < {end}; k++)"
        if layout is None:
            return [
                head,
                f"      {t} sum = 0;",
                f"{inner} sum += {value};",
                f"      x{number}[r] = sum;",
                "    }",
            ]
        return [
            head,
            f"      {t} sum[{SIMD}] = {{0}};",
            f"{inner} {{",
            "      TORCHJAC_SPAN",
            f"  {_SAMPLES} sum[s] += {value};",
            "      }",
            "      TORCHJAC_SPAN",
            f"  {_SAMPLES} x{number}[{_at('r', layout)}] = sum[s];",
            "    }",
        ]

    def _matmul(self, number: int, layout: SampleLayout | None) -> list[str]:
        """Matrix products as C: SIMD over samples of one or both factors; else over columns."""
        matmul = self._layouts.matmuls[number]
        (left, _), (right, _) = self._all[number].arguments
        matrices, rows, inner, columns = matmul.sizes
        batched_inputs = [self._layouts.layouts[x] is not None for x in (left, right)]
        of_left = (left, matmul.left, rows, columns)
        of_right = (right, matmul.right, columns, 1)
        of_strip, other = (of_left, of_right) if batched_inputs[0] else (of_right, of_left)
        self.work += self._count * matrices * rows * inner * columns
        self.statements += 1
        lines = []
        for k in range(matrices):
            start = k * rows * columns
            if layout is None:
                operands = self._operand(*of_left, k), self._operand(*of_right, k)
                lines += self._tiles.unbatched(*operands, inner, f"x{number} + {start}")
            else:
                lines += self._tiles.batched(
                    self._operand(*of_strip, k),
                    self._operand(*other, k),
                    inner,
                    f"x{number} + {start} * {SIMD}",
                    Factor.PER_SAMPLE if all(batched_inputs) else Factor.SHARED,
                )
        return lines

    def _operand(self, number: int, matrix: MatrixLayout, size: int, step: int, k: int) -> Operand:
        """The factor of the k-th product."""
        start, across, along = matrix.start[k], matrix.across, matrix.along
        if self._is_read(number):
            array, factor, begin = load_of(self._all[number])
            begins = f"{array} + {begin + factor * start}"
            return Operand(begins, factor * across, factor * along, size, step)
        batch = "" if self._layouts.layouts[number] is None else f" * {SIMD}"
        return Operand(f"x{number} + {start}{batch}", across, along, size, step)


def _at(where: str, layout: SampleLayout | None) -> str:
    """The position of a value in memory."""
    return where if layout is None else f"({where}) * {SIMD} + s"
