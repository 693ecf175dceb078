"""The value that the planner hands to the engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["reverse", "forward", "replicated"]
Batching = Literal["functorch", "looping", "legacy"]


@dataclass(frozen=True, slots=True)
class Plan:
    """How to evaluate a Jacobian.

    Attributes:
        mode: `reverse` pulls cotangents back, a row each; `forward` pushes tangents, a column each,
            through the transposed backward graph; `replicated` runs the function on one copy of
            the input per row and pulls all rows back in one plain pass.
        chunk: Seeds evaluated at once; 1 is a loop of plain passes.
        batching: What carries several seeds through one pass: `functorch` has rules for nearly
            every operation; `looping` is the same, looping inside the operations that have none;
            `legacy` is what `is_grads_batched=True` uses, with fewer rules but other ones.
        checked: Whether this plan has given a right result on this kind of program before; if
            not, the engine compares its result with a plain pass.
        engine: The engine that runs it.
    """

    mode: Mode
    chunk: int
    batching: Batching = "functorch"
    checked: bool = False
    engine: Literal["plain", "color"] = "plain"

    def __str__(self) -> str:
        """Reads as `reverse, chunk 64` or `reverse, row loop`."""
        unit = "row" if self.mode == "reverse" else "column"
        if self.engine == "color":
            unit += " group"
        if self.mode == "replicated":
            return f"replicated, {self.chunk} copies"
        how = f"{unit} loop" if self.chunk == 1 else f"chunk {self.chunk}"
        note = f", {self.batching} batching" if self.batching != "functorch" else ""
        return f"{self.mode}, {how}{note}"
