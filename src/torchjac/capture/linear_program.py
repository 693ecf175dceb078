"""The linear program: a traced backward pass u -> J'u."""

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
        module: The graph, with its constants.
        cotangents: Node of the cotangent of each output leaf; None for a leaf without a graph.
        gradients: Node of the gradient of each input leaf; None for a leaf without a gradient.
        row_shapes: Shape of each output leaf.
        column_shapes: Shape of each input leaf.
        scope: `global` if valid for every input of these shapes, `local` if valid for the values of
            the recording only.
        lines: Line of the user's code by sequence number.
        reason: Why the scope is local although a function was given; else None.
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
        """Whether the function writes to external tensors in each run."""
        return bool(self.module.meta.get(tracing.WRITES, False))

    @property
    def stops_gradients(self) -> bool:
        """Whether numbers depend on the input without a gradient (`detach`, custom functions)."""
        return bool(self.module.meta.get(tracing.STOPS, True))

    @property
    def draws(self) -> bool:
        """Whether the function draws random numbers, so that a run advances a generator."""
        return bool(self.module.meta.get(tracing.DRAWS, False))

    @property
    def m(self) -> int:
        """Number of rows."""
        return sum(s.numel() for s in self.row_shapes)

    @property
    def n(self) -> int:
        """Number of columns."""
        return sum(s.numel() for s in self.column_shapes)
