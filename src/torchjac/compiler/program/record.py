"""Graphs finish_recording as tensor programs: a straight line of tensor operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from torchjac._torch.trace.recorder import Recorder
from torchjac._torch.trace.recording import Recording, finish_recording
from torchjac.compiler.program.optimize import fold_constants


class EveryOperation:
    """The set of all operations: a recorder that keeps it decomposes none."""

    def __contains__(self, operation: object) -> bool:
        """Every operation is in it."""
        return True

    def __iter__(self) -> Any:
        """It lists no operation by name."""
        return iter(())

    def __len__(self) -> int:
        """The number of operations that it lists."""
        return 0


def own_copies(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Inputs to record with, contiguous and with memory of their own.

    A tensor may be passed twice, or be a constant of the program as well. The recorder knows values
    by their tensors and their memory, and would take the two for one.
    """
    return [x.detach().clone(memory_format=torch.contiguous_format) for x in inputs]


def recording_of(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Recording:
    """The operations of a graph at some inputs, with its constants folded."""
    recorder = Recorder(EveryOperation(), parameters_vary=True)
    inputs = own_copies(inputs)
    for tensor in inputs:
        recorder.input(tensor)
    with torch.no_grad(), recorder:
        results = module(*inputs)
    return fold_constants(finish_recording(recorder, list(results)))
