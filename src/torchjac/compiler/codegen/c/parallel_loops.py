"""Loops of which several threads run a part each."""

from __future__ import annotations

from collections.abc import Sequence

from torchjac.compiler.codegen.c.openmp import cut
from torchjac.compiler.codegen.c.writer import Writer
from torchjac.compiler.codegen.schedule import Loop

# Turns that go through registers together, at most: what is left of a loop after these is computed
# by other functions of the math library, so that results would depend on the number of threads.
_REGISTER = 32


class PartedWriter(Writer):
    """Writes loops so that a call runs a part of the turns of each: number `part` of `parts`.

    Threads wait for each other where a loop reads what another one kept. What has one lane is
    computed by each of them, and written by the first.
    """

    parameters = ", long part, long parts"

    def helpers(self) -> list[str]:
        """How threads wait for each other."""
        return [
            "#ifdef _OPENMP",
            '#define TORCHJAC_WAIT if (parts > 1) { _Pragma("omp barrier") }',
            "#else",
            "#define TORCHJAC_WAIT",
            "#endif",
            cut("torchjac_turn", _REGISTER),
            *super().helpers(),
        ]

    def fixed(self, outputs: Sequence[tuple[str, int]]) -> list[str]:
        """Statements that write what does not vary, before all others."""
        lines = super().fixed(outputs)
        return ["  if (part == 0) {", *lines, "  }", "  TORCHJAC_WAIT"] if lines else []

    def stored(self, place: str, name: str) -> str:
        """A statement that writes what has one lane."""
        return f"  if (part == 0) {place} = {name};"

    def body(self) -> list[str]:
        """The statements."""
        self._singles()
        before = None
        for loop in self._plan.loops:
            if before is not None and loop.level != before:
                self._lines.append("  TORCHJAC_WAIT")
            before = loop.level
            self._lines += self._loop(loop)
        return self._lines

    def head(self, loop: Loop, vector: str) -> list[str]:
        """How a loop begins."""
        first, last = (f"torchjac_turn({loop.size}, {p}, parts)" for p in ("part", "part + 1"))
        k = self.loops
        return [
            f"  const int first{k} = {first}, last{k} = {last};",
            vector,
            f"  for (int i = first{k}; i < last{k}; i++) {{",
        ]
