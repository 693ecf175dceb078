"""Tensor guards of torch.compile: one comparison of all metadata of tensors, without values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchjac._torch.private import corner, private

# Compares type, dispatch keys (with the bits of negative and conjugate views), dtype, device,
# requires_grad, sizes and strides: 0.2 us, against 0.7 us in Python.
_guards = private("torch._C._dynamo.guards.TensorGuards")


def tensor_check(*tensors: Tensor) -> Callable[..., bool] | None:
    """A predicate: whether tensors have the metadata of these strided tensors. None if unavailable.

    False proves no difference: under another mode the predicate is always false.
    """
    return _tensor_check(tensors) if TENSOR_GUARDS.known or TENSOR_GUARDS.holds() else None


def _tensor_check(tensors: tuple[Tensor, ...]) -> Callable[..., bool] | None:
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    try:
        test: Callable[..., bool] = _guards(
            *tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides
        ).check
        return test if test(*tensors) else None
    except Exception:  # unsupported tensors: the caller compares in Python
        return None


@corner("the tensor guard of torch.compile", "guards compare tensors in Python")
def TENSOR_GUARDS() -> bool:
    """The guard accepts a tensor of equal metadata, and none with a difference in metadata."""
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
