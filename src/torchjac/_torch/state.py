"""What a function can read of torch itself: modes and settings of the thread and the process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.nn.modules import module as modules


def ambient() -> tuple[tuple[str, Any], ...]:
    """Settings that decide what operations do, by name."""
    return (
        ("default dtype", torch.get_default_dtype()),
        ("grad mode", torch.is_grad_enabled()),
        ("inference mode", torch.is_inference_mode_enabled()),
        ("autocast", _autocast() if torch._C._is_any_autocast_enabled() else ()),
        ("deterministic algorithms", torch.are_deterministic_algorithms_enabled()),
        ("torch function modes", _function_modes()),
        ("torch dispatch modes", torch._C._len_torch_dispatch_stack()),
    )


def _autocast() -> tuple[tuple[str, torch.dtype], ...]:
    devices = ("cpu", "cuda", "mps", "xpu")
    return tuple(
        (device, torch.get_autocast_dtype(device))
        for device in devices
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    )


def _function_modes() -> tuple[str, ...]:
    """Types of the active modes, and the default device, which is one of them."""
    depth = torch._C._len_torch_function_stack()
    if not depth:
        return ()
    kinds = [type(torch._C._get_function_stack_at(i)).__name__ for i in range(depth)]
    return (*kinds, str(torch.get_default_device()))


# Hooks that run for every module.
GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    modules._global_forward_hooks,
    modules._global_forward_pre_hooks,
    modules._global_backward_hooks,
    modules._global_backward_pre_hooks,
)

# Hooks of a module that only run while it is saved or loaded.
SAVING_HOOKS = frozenset(
    {
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    }
)
PLAIN_TENSORS: frozenset[type] = frozenset({Tensor, nn.Parameter, nn.Buffer})


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a torch.func transform."""
    return bool(_functorch.is_functorch_wrapped_tensor(tensor))
