"""A plan: the mode, chunk size and batching of the passes that evaluate a Jacobian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["reverse", "forward", "replicated"]
Batching = Literal["functorch", "looping", "legacy"]


@dataclass(frozen=True, slots=True)
class Plan:
    """Mode, chunk size and batching of the passes that evaluate a Jacobian.

    Attributes:
        mode: `reverse` pulls back a cotangent for each row. `forward` pushes a tangent for each
            column through the transposed backward graph. `replicated` runs the function on one
            copy of the input per row, and pulls all rows back in one plain pass.
        chunk: Seeds of one pass; 1 is a loop of plain passes.
        batching: The vmap of a pass with several seeds. `functorch` has rules for nearly every
            operation. `looping` is functorch, with a loop inside operations that lack a rule.
            `legacy` is the vmap of `is_grads_batched=True`, with fewer and different rules.
        checked: Whether the plan passed the checks on this kind of program before. The first run
            of an unchecked plan is compared with a plain pass.
        engine: `plain` carries a row or column in each seed, `color` a group of rows or columns.
    """

    mode: Mode
    chunk: int
    batching: Batching = "functorch"
    checked: bool = False
    engine: Literal["plain", "color"] = "plain"

    def __str__(self) -> str:
        """The plan as text: `reverse, chunk 64` or `reverse, row loop`."""
        unit = "row" if self.mode == "reverse" else "column"
        if self.engine == "color":
            unit += " group"
        if self.mode == "replicated":
            return f"replicated, {self.chunk} copies"
        chunking = f"{unit} loop" if self.chunk == 1 else f"chunk {self.chunk}"
        batching = f", {self.batching} batching" if self.batching != "functorch" else ""
        return f"{self.mode}, {chunking}{batching}"
