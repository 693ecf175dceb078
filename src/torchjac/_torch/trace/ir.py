"""The IR of a recording (values and instructions), and the errors of a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchjac._torch.trace.op_traits import OpOverload


class DependsOnValues(RuntimeError):
    """Control flow would depend on the values of a tensor; the message names the operation."""


class NotRecorded(RuntimeError):
    """The function has an effect that no list of operations represents; the message says it."""


class NeedsTracing(Exception):
    """A control flow operator ran, which only torch's own tracer supports."""


@dataclass(eq=False, slots=True)
class Value:
    """A tensor of a recording.

    Attributes:
        kind: `input`, `constant`, or `made` by a call.
        position: Number of the input, of the constant, or of the call.
        item: Position among the results of a call; None for a single result.
        base: The value that owns the memory: itself, unless the tensor is a view.
        varies: For a base, whether its elements depend on the input.
        written: For a base, whether an operation wrote to the memory.
        shape: Shape of the tensor.
        stride: Strides of the tensor.
        dtype: Dtype of the tensor.
        device: Device of the tensor.
        memory: For inputs and constants, the identity of the storage.
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
        """Sets the value itself as its base."""
        self.base = self


@dataclass(frozen=True, slots=True)
class Instruction:
    """A recorded call of an operation.

    Attributes:
        operation: The operation.
        args: Positional arguments, with values in place of tensors.
        kwargs: Keyword arguments, with values in place of tensors.
        results: A value for each result that is a tensor; None for every other result.
        is_single: Whether the operation returned a tensor, not a sequence.
        written: Bases that the operation wrote to.
        number: Sequence number of the autograd node that ran the operation, or None.
        drawn_from: For a random operation, the generator and its state before the call.
    """

    operation: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[Value | None, ...]
    is_single: bool
    written: tuple[Value, ...]
    number: int | None
    drawn_from: tuple[torch.Generator, Tensor] | None


def tensors_in(arguments: Sequence[Any]) -> list[Tensor]:
    """All tensors in arguments."""
    tensors: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            tensors.append(argument)
        elif isinstance(argument, (list, tuple)):
            tensors += tensors_in(argument)
    return tensors


def distinct_cotangent(output: Tensor) -> Tensor:
    """A cotangent with distinct, nonzero elements."""
    with torch.no_grad():
        return torch.linspace(
            0.3, 1.7, output.numel(), dtype=output.dtype, device=output.device
        ).reshape(output.shape)


def metadata(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]:
    """Shape, strides, dtype and device of a tensor."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
