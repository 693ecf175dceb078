"""All that a tensor is but for its numbers, compared in one look, as guards of torch.compile do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchjac._torch.private import corner, private

# Type, dispatch keys (so views that are negative or conjugated too), dtype, device, whether it
# requires a gradient, sizes and strides: 0.2 us, for 0.7 us of Python.
_guards = private("torch._C._dynamo.guards.TensorGuards")


def tensor_check(*tensors: Tensor) -> Callable[..., bool] | None:
    """A test whether others are like these, that are strided; None where there is no such test.

    What it does not pass may still be alike: under another mode it passes nothing.
    """
    return _tensor_check(tensors) if TENSOR_GUARDS.known or TENSOR_GUARDS.holds() else None


def _tensor_check(tensors: tuple[Tensor, ...]) -> Callable[..., bool] | None:
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    try:
        test: Callable[..., bool] = _guards(
            *tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides
        ).check
        return test if test(*tensors) else None
    except Exception:  # tensors that it does not take: there are other ways
        return None


@corner("the tensor guard of torch.compile", "guards compare tensors in Python")
def TENSOR_GUARDS() -> bool:
    """They pass a tensor that is alike, and none that differs in anything but its numbers."""
    one = torch.zeros(2, 3, dtype=torch.float64)
    test = _tensor_check((one,))
    different = [
        torch.zeros(3, 2, dtype=torch.float64),
        torch.zeros(2, 3, dtype=torch.float32),
        torch.zeros(3, 2, dtype=torch.float64).t(),
        torch.zeros(2, 3, dtype=torch.float64, requires_grad=True),
        torch.zeros(2, 3, dtype=torch.float64, device="meta"),
        torch.nn.Parameter(one),
    ]
    return test is not None and test(torch.ones_like(one)) and not any(map(test, different))
