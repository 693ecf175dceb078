"""Copies that are made when somebody writes."""

from __future__ import annotations

import torch
from torch import Tensor

from torchjac._torch.private import corner, private

_lazy_clone = private("torch._lazy_clone")


def copied_when_written(tensor: Tensor) -> Tensor:
    """A tensor with the same numbers, which shares memory until either is written to.

    Memory that torch did not allocate (NumPy's) is copied at once.
    """
    if not (LAZY.known or LAZY.holds()):
        return tensor.clone()
    try:
        copy: Tensor = _lazy_clone(tensor)
        return copy
    except RuntimeError:
        return tensor.clone()


@corner("torch's copy on write", "indices of sparse results are copied each time")
def LAZY() -> bool:
    """Neither tensor sees what is written to the other."""
    one = torch.zeros(3, dtype=torch.float64)
    other, third = _lazy_clone(one), _lazy_clone(one)
    other.add_(1)
    one.sub_(1)
    return [t.tolist() for t in (one, other, third)] == [[-1.0] * 3, [1.0] * 3, [0.0] * 3]
