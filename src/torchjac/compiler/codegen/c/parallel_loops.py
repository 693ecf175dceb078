"""Parallel loops: threads run a part of each."""

from __future__ import annotations

from collections.abc import Sequence

from torchjac.compiler.codegen.c.openmp import partition_function
from torchjac.compiler.codegen.c.writer import Writer
from torchjac.compiler.codegen.schedule import Loop

# Iterations that stay in one part. The rest of a SIMD loop calls scalar functions of the math
# library, so results would depend on the number of threads if parts were cut anywhere.
_REGISTER = 32


class ParallelWriter(Writer):
    """Writes loops so that a call runs a part of their iterations: part `part` of `parts`.

    Threads wait for each other where a loop reads a buffer of another loop. Each thread computes
    the scalars, and the first thread writes them.
    """

    parameters = ", long part, long parts"

    def helpers(self) -> list[str]:
        """The barrier of threads."""
        return [
            "#ifdef _OPENMP",
            '#define TORCHJAC_WAIT if (parts > 1) { _Pragma("omp barrier") }',
            "#else",
            "#define TORCHJAC_WAIT",
            "#endif",
            partition_function("torchjac_turn", _REGISTER),
            *super().helpers(),
        ]

    def fixed(self, outputs: Sequence[tuple[str, int]]) -> list[str]:
        """Statements that write fixed values, before all other statements."""
        lines = super().fixed(outputs)
        return ["  if (part == 0) {", *lines, "  }", "  TORCHJAC_WAIT"] if lines else []

    def stored(self, place: str, name: str) -> str:
        """A statement that writes a scalar."""
        return f"  if (part == 0) {place} = {name};"

    def body(self) -> list[str]:
        """The statements."""
        self._scalar_statements()
        before = None
        for loop in self._program.loops:
            if before is not None and loop.level != before:
                self._lines.append("  TORCHJAC_WAIT")
            before = loop.level
            self._lines += self._loop(loop)
        return self._lines

    def head(self, loop: Loop, vector: str) -> list[str]:
        """The head of a loop."""
        first, last = (f"torchjac_turn({loop.size}, {p}, parts)" for p in ("part", "part + 1"))
        k = self.loops
        return [
            f"  const int first{k} = {first}, last{k} = {last};",
            vector,
            f"  for (int i = first{k}; i < last{k}; i++) {{",
        ]
