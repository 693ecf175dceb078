"""A function itself, written down operation by operation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, fx

from torchjac._torch import tracing
from torchjac.capture.derivative import FunctionOfTensors, traced
from torchjac.capture.function import Call
from torchjac.capture.restore import restoring


def trace_value(call: Call, keep: Collection[Any]) -> fx.GraphModule:
    """Traces a function: a graph from its tensors to its outputs.

    Args:
        call: The function and its arguments.
        keep: Operations that need not be decomposed.

    Raises:
        CaptureRefused: What the function does depends on values, or cannot be traced.
    """
    program = FunctionOfTensors(call)

    def value(observer: tracing.Observer, *tensors: Tensor) -> Sequence[Any]:
        return list(program(observer, tensors)[1])

    return traced(value, program.tensors(), True, keep, restoring(call))[0]
