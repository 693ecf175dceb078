"""The value that the planner hands to the engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["reverse", "forward", "replicated"]


@dataclass(frozen=True, slots=True)
class Plan:
    """How to evaluate a Jacobian.

    Attributes:
        mode: `reverse` pulls cotangents back, a row each; `forward` pushes tangents, a column each,
            through the transposed backward graph; `replicated` runs the function on one copy of
            the input per row and pulls all rows back in one plain pass.
        chunk: Seeds evaluated at once; 1 is a loop of plain passes.
        missing_rules: Operations known to have no batching rule: torch loops over those within
            the batched pass.
        engine: The engine that runs it.
    """

    mode: Mode
    chunk: int
    missing_rules: tuple[str, ...] = ()
    engine: Literal["plain"] = "plain"

    def __str__(self) -> str:
        """Reads as `reverse, chunk 64` or `reverse, row loop`."""
        unit = "row" if self.mode == "reverse" else "column"
        if self.mode == "replicated":
            return f"replicated, {self.chunk} copies"
        how = f"{unit} loop" if self.chunk == 1 else f"chunk {self.chunk}"
        note = f", per-row {', '.join(self.missing_rules)}" if self.missing_rules else ""
        return f"{self.mode}, {how}{note}"
