"""What is noted of the operations that run, and what cannot be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchjac._torch.trace.op_traits import OpOverload


class DependsOnValues(RuntimeError):
    """A value of a tensor would decide what is done next; the message says by way of what."""


class NotRecorded(RuntimeError):
    """Something happened that a list of operations cannot say; the message names it."""


class NeedsTracing(Exception):
    """Control flow operators are for torch's own tracer."""


@dataclass(eq=False, slots=True)
class Value:
    """A tensor that was met.

    Attributes:
        kind: `input`, `constant`, or `made` by a call.
        position: Of the input, the constant or the call.
        item: Which of the results of a call; None if there is one.
        base: The value whose memory it shares.
        varies: Of a base: whether its numbers are different ones for other inputs.
        written: Of a base: whether something wrote to it.
        shape: Its shape.
        stride: Its strides.
        dtype: Its dtype.
        device: Its device.
        memory: Of inputs and constants: which memory it lies in.
    """

    kind: str
    position: int
    item: int | None
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    memory: int = 0
    varies: bool = False
    written: bool = False
    base: Value = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Memory of its own."""
        self.base = self


@dataclass(frozen=True, slots=True)
class Instruction:
    """An operation that ran.

    Attributes:
        operation: What it was.
        args: With values in the places of tensors.
        kwargs: As well.
        results: A value for each tensor that it returned; None for others.
        is_single: Whether it returned one tensor, not several.
        written: Bases that it wrote to.
        number: Sequence number of the autograd node that ran it, or None.
        drawn_from: Of a random operation: the generator, and its state before.
    """

    operation: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[Value | None, ...]
    is_single: bool
    written: tuple[Value, ...]
    number: int | None
    drawn_from: tuple[torch.Generator, Tensor] | None
