"""Accumulation: the entries of a Jacobian as a straight line of operations, without any pass."""

from torchjac.engines.accumulate.emit import (
    Emitted,
    Target,
    elsewhere,
    emit,
    evaluated,
    recording_of,
)
from torchjac.engines.accumulate.write import Mode

__all__ = ["Emitted", "Mode", "Target", "elsewhere", "emit", "evaluated", "recording_of"]
