"""Record a graph as a straight line of tensor operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from torchjac._torch.trace.recorder import Recorder
from torchjac._torch.trace.recording import Recording, finish_recording
from torchjac.compiler.program.optimize import folded


class _Everything:
    """Operations that are not decomposed: all of them."""

    def __contains__(self, operation: object) -> bool:
        return True

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0


def recording_of(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Recording:
    """The operations of a graph, with what does not vary computed beforehand."""
    recorder = Recorder(_Everything(), parameters_vary=True)
    for tensor in inputs:
        recorder.input(tensor)
    with torch.no_grad(), recorder:
        made = module(*inputs)
    return folded(finish_recording(recorder, list(made)))
