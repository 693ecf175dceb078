"""A program of one sample, run for any number of them: written down for a few."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torchjac.compiler.codegen.c.loop_body import LoopBody
from torchjac.compiler.codegen.c.matmul_tiles import STRIP, strip_bytes, strip_type, turned
from torchjac.compiler.codegen.c.scalar_ops import CTYPES, literal
from torchjac.compiler.codegen.c.writer import Writer
from torchjac.compiler.codegen.granularity import ScalarProgram
from torchjac.compiler.codegen.scalar_ir import ArrayRef, Places, loaded
from torchjac.compiler.codegen.scalar_order import needed
from torchjac.compiler.codegen.schedule import Loop, LoopProgram


class SampleRows(Writer):
    """Writes what samples give, each a row: those from `first` up to `last`."""

    parameters = ", long first, long last"

    def fixed(self, outputs: Sequence[tuple[str, int]]) -> list[str]:
        """Statements that say what does not vary, and write it where nothing else does."""
        (loop,) = self._plan.loops
        stored = {store.array for store in loop.stores}
        lines = []
        for k, (dtype, _) in enumerate(outputs):
            _, values = self._plan.fixed[k]
            out, constants = ArrayRef("out", k), ArrayRef("fixed", k)
            if values.any():
                numbers = ", ".join(literal(v, dtype) for v in values.tolist())
                lines.append(f"  static const {CTYPES[dtype]} {constants}[] = {{{numbers}}};")
            if out not in stored and len(values):
                row = self.row(out, "i")
                lines += ["  for (long i = first; i < last; i++)", *row]
        return lines

    def row(self, array: ArrayRef, sample: str = "(i + s)") -> list[str]:
        """What begins to write what a sample gives: what does not vary, zero elsewhere."""
        (loop,) = self._plan.loops
        _, values = self._plan.fixed[array.number]
        width = len(values)
        if sum(store.array == array for store in loop.stores) == width:
            return []
        where = f"{array} + {width} * {sample}"
        if not values.any():
            return [f"      memset({where}, 0, {width} * sizeof(*{array}));"]
        constants = ArrayRef("fixed", array.number)
        return [f"      memcpy({where}, {constants}, sizeof({constants}));"]


class SampleWriter(SampleRows):
    """Writes the loop over samples: those from `first` up to `last`, a strip of them at once.

    Inputs are turned around before, and results after: compilers would not let samples go through
    registers together whose numbers are apart in memory.
    """

    def __init__(self, scalars: ScalarProgram, plan: LoopProgram):
        """Begins with no statements."""
        super().__init__(scalars, plan)
        dtypes = {self._all[n].dtype for n in needed(self._all, self._wanted)}
        self.dtype = "float32" if "float64" not in dtypes else "float64"  # the wider one
        self._read: dict[ArrayRef, int] = {}  # inputs, and how many numbers of a sample they have
        self._strip: list[str] = []

    def helpers(self) -> list[str]:
        """The width of a strip."""
        return strip_type(self.dtype)

    def memory(self) -> list[str]:
        """Where strips are."""
        return self._strip

    def element(self, array: ArrayRef, step: int, start: int, lanes: Places) -> str:
        """An element of a strip of an input."""
        if array not in self._read:
            number = next(
                x for x in self._all if x.kind == "load" and loaded(x) == (array, step, start)
            )
            self._placed(f"x{array}", number.dtype, step)
            self._read[array] = step
        return f"x{array}[{start} * {STRIP} + s]"

    def _placed(self, name: str, dtype: str, width: int) -> None:
        place = self.scratch
        self.scratch += strip_bytes(width, dtype, self.dtype)
        where = f"(void *)((char *)scratch + {place})"
        self._strip.append(f"  {CTYPES[dtype]} *restrict const {name} = {where};")

    def _loop(self, loop: Loop) -> list[str]:
        values = LoopBody(self, loop.size)
        results: dict[ArrayRef, list[int]] = {}
        widths: dict[ArrayRef, int] = {}
        stores = []
        for store in loop.stores:
            name = values.of(store.expression, store.lanes)
            places = results.setdefault(store.array, [])
            widths[store.array] = len(self._plan.fixed[store.array.number][1])
            stores += [
                f"      bad += {name};",
                f"      y{store.array}[{len(places)} * {STRIP} + s] = {name};",
            ]
            places.append(int(store.positions[0]))
        lines = [
            f"  for (long i = first; i < last; i += {STRIP}) {{",
            f"    const int n = last - i < {STRIP} ? (int)(last - i) : {STRIP};",
        ]
        for array, width in self._read.items():
            lines += turned(array, f"x{array}", width)
        lines.append("    TORCHJAC_LOOP(bad)")
        lines += [f"    for (int s = 0; s < {STRIP}; s++) {{", *values.lines, *stores, "    }"]
        for array, places in results.items():
            dtype = self._all[next(x.expression for x in loop.stores if x.array == array)].dtype
            self._placed(f"y{array}", dtype, len(places))
            where = f"(i + s) * {widths[array]} + {self.index(np.array(places), 'r')}"
            lines += [
                "    for (int s = 0; s < n; s++) {",
                *self.row(array),
                f"      for (long r = 0; r < {len(places)}; r++)",
                f"        {array}[{where}] = y{array}[r * {STRIP} + s];",
                "    }",
            ]
        self.loops += 1
        return [*lines, "  }"]
