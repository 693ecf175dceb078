"""Memory for small results, without the arguments that `torch.empty` parses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# What Inductor's code calls: 0.7 us, for 1.6 us of `torch.empty`.
_fast: Any = getattr(torch._C._dynamo.guards, "_empty_strided_cpu", None)


def _plain(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")


empty: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor] = _fast or _plain
