"""The batch loop: each iteration computes one unrolled sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torchjac.compiler.codegen.c.loop_body import LoopBody
from torchjac.compiler.codegen.c.matmul_tiles import SIMD, read_batch, simd_bytes, simd_type
from torchjac.compiler.codegen.c.scalar_ops import CTYPES, literal
from torchjac.compiler.codegen.c.writer import Writer
from torchjac.compiler.codegen.granularity import ScalarProgram
from torchjac.compiler.codegen.scalar_ir import ArrayRef, Indices, load_of
from torchjac.compiler.codegen.scalar_order import reachable
from torchjac.compiler.codegen.schedule import Loop, LoopProgram


class BatchRows(Writer):
    """Writes the results of samples, one row each: from sample `first` up to sample `last`."""

    parameters = ", long first, long last"

    def fixed(self, outputs: Sequence[tuple[str, int]]) -> list[str]:
        """Declarations of the fixed values, and stores of outputs that have no other values."""
        (loop,) = self._program.loops
        stored = {store.array for store in loop.stores}
        lines = []
        for k, (dtype, _) in enumerate(outputs):
            _, values = self._program.fixed[k]
            out, constants = ArrayRef("out", k), ArrayRef("fixed", k)
            if values.any():
                numbers = ", ".join(literal(v, dtype) for v in values.tolist())
                lines.append(f"  static const {CTYPES[dtype]} {constants}[] = {{{numbers}}};")
            if out not in stored and len(values):
                row = self.row(out, "i")
                lines += ["  for (long i = first; i < last; i++)", *row]
        return lines

    def row(self, array: ArrayRef, sample: str = "(i + s)") -> list[str]:
        """Statements that write the fixed values of a sample, and zeros elsewhere."""
        (loop,) = self._program.loops
        _, values = self._program.fixed[array.number]
        width = len(values)
        if sum(store.array == array for store in loop.stores) == width:
            return []
        where = f"{array} + {width} * {sample}"
        if not values.any():
            return [f"      memset({where}, 0, {width} * sizeof(*{array}));"]
        constants = ArrayRef("fixed", array.number)
        return [f"      memcpy({where}, {constants}, sizeof({constants}));"]


class BatchWriter(BatchRows):
    """Writes the loop over samples from `first` up to `last`, one SIMD batch at a time.

    Inputs are transposed before and results after: compilers do not vectorize over samples whose
    numbers are apart in memory.
    """

    def __init__(self, scalars: ScalarProgram, program: LoopProgram):
        """Begins with no statements."""
        super().__init__(scalars, program)
        dtypes = {self._all[n].dtype for n in reachable(self._all, self._wanted)}
        self.dtype = "float32" if "float64" not in dtypes else "float64"  # the wider dtype
        self._read: dict[ArrayRef, int] = {}  # inputs that are read, with the size of a sample
        self._batch_pointers: list[str] = []

    def helpers(self) -> list[str]:
        """The width of a SIMD batch."""
        return simd_type(self.dtype)

    def memory(self) -> list[str]:
        """Declarations of transposed inputs and results."""
        return self._batch_pointers

    def element(self, array: ArrayRef, step: int, start: int, points: Indices) -> str:
        """An element of a transposed input."""
        if array not in self._read:
            number = next(
                x for x in self._all if x.kind == "load" and load_of(x) == (array, step, start)
            )
            self._allot(f"x{array}", number.dtype, step)
            self._read[array] = step
        return f"x{array}[{start} * {SIMD} + s]"

    def _allot(self, name: str, dtype: str, width: int) -> None:
        place = self.scratch
        self.scratch += simd_bytes(width, dtype, self.dtype)
        where = f"(void *)((char *)scratch + {place})"
        self._batch_pointers.append(f"  {CTYPES[dtype]} *restrict const {name} = {where};")

    def _loop(self, loop: Loop) -> list[str]:
        values = LoopBody(self, loop.size)
        results: dict[ArrayRef, list[int]] = {}
        widths: dict[ArrayRef, int] = {}
        stores = []
        for store in loop.stores:
            name = values.of(store.expression, store.points)
            positions = results.setdefault(store.array, [])
            widths[store.array] = len(self._program.fixed[store.array.number][1])
            stores += [
                f"      bad += {name};",
                f"      y{store.array}[{len(positions)} * {SIMD} + s] = {name};",
            ]
            positions.append(int(store.positions[0]))
        lines = [
            f"  for (long i = first; i < last; i += {SIMD}) {{",
            f"    const int n = last - i < {SIMD} ? (int)(last - i) : {SIMD};",
        ]
        for array, width in self._read.items():
            lines += read_batch(array, f"x{array}", width)
        lines.append("    TORCHJAC_LOOP(bad)")
        lines += [f"    for (int s = 0; s < {SIMD}; s++) {{", *values.lines, *stores, "    }"]
        for array, positions in results.items():
            dtype = self._all[next(x.expression for x in loop.stores if x.array == array)].dtype
            self._allot(f"y{array}", dtype, len(positions))
            where = f"(i + s) * {widths[array]} + {self.index(np.array(positions), 'r')}"
            lines += [
                "    for (int s = 0; s < n; s++) {",
                *self.row(array),
                f"      for (long r = 0; r < {len(positions)}; r++)",
                f"        {array}[{where}] = y{array}[r * {SIMD} + s];",
                "    }",
            ]
        self.loops += 1
        return [*lines, "  }"]
