"""Copies that are made when somebody writes."""

from __future__ import annotations

import torch
from torch import Tensor


def copied_when_written(tensor: Tensor) -> Tensor:
    """A tensor with the same numbers, which shares memory until either is written to.

    Memory that torch did not allocate (NumPy's) is copied at once.
    """
    try:
        return torch._lazy_clone(tensor)
    except RuntimeError:
        return tensor.clone()
