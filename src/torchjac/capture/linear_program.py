"""The derivative as a linear program: the backward pass, traced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from torchjac._torch.trace import trace as tracing

Scope = Literal["global", "local"]


@dataclass(frozen=True, slots=True)
class LinearProgram:
    """A traced backward pass.

    Attributes:
        module: The graph, with the constants that it reads.
        cotangents: Where the cotangent of each output leaf enters; None for a leaf without graph.
        gradients: Where the gradient of each input leaf leaves; None where there is none.
        row_shapes: Shape of each output leaf.
        column_shapes: Shape of each input leaf.
        scope: `global`: valid for every input of these shapes. `local`: valid for the values that
            the graph was recorded with.
        lines: Where in the user's code the operations with these sequence numbers were called.
        reason: Why the scope is not global, where it could have been.
    """

    module: fx.GraphModule
    cotangents: tuple[fx.Node | None, ...]
    gradients: tuple[fx.Node | None, ...]
    row_shapes: tuple[torch.Size, ...]
    column_shapes: tuple[torch.Size, ...]
    scope: Scope
    lines: dict[int, str]
    reason: str | None = None

    @property
    def writes(self) -> bool:
        """Whether the function writes to tensors that are not its own, each time it runs."""
        return bool(self.module.meta.get(tracing.WRITES, False))

    @property
    def stops_gradients(self) -> bool:
        """Whether gradients do not go everywhere that numbers go (`detach`, custom functions)."""
        return bool(self.module.meta.get(tracing.STOPS, True))

    @property
    def draws(self) -> bool:
        """Whether the function draws random numbers, which others after it then do not get."""
        return bool(self.module.meta.get(tracing.DRAWS, False))

    @property
    def m(self) -> int:
        """Number of rows."""
        return sum(s.numel() for s in self.row_shapes)

    @property
    def n(self) -> int:
        """Number of columns."""
        return sum(s.numel() for s in self.column_shapes)
