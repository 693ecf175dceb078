"""What a function can read of torch itself: modes and settings of the thread and the process."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.nn.modules import module as modules
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._device import DeviceContext

# Settings that decide what operations do.
AMBIENT = (
    "default dtype",
    "grad mode",
    "inference mode",
    "autocast",
    "deterministic algorithms",
    "float32 matmul precision",
    "kernels",
    "saved tensor hooks",
    "torch function modes",
    "torch dispatch modes",
)


def ambient() -> tuple[Any, ...]:
    """Their values, in that order. It runs on every call: no function of Python's in between."""
    return (
        _default_dtype(),
        _grad_enabled(),
        _inference_enabled(),
        _autocast() if _any_autocast() else (),
        _deterministic(),
        _matmul_precision(),
        [is_enabled() for is_enabled in _KERNELS],
        _hooks(False) is not None,
        _function_modes() if _function_depth() else (),
        _dispatch_depth(),
    )


_default_dtype = torch.get_default_dtype
_grad_enabled = torch._C.is_grad_enabled
_inference_enabled = torch._C.is_inference_mode_enabled
_any_autocast = torch._C._is_any_autocast_enabled
_deterministic = torch._C._get_deterministic_algorithms
_matmul_precision = torch._C._get_float32_matmul_precision
_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_function_depth = torch._C._len_torch_function_stack
_dispatch_depth = torch._C._len_torch_dispatch_stack
# Whether kernels may be chosen that compute in another way.
_KERNELS = (
    torch._C._get_mkldnn_enabled,
    torch._C._get_nnpack_enabled,
    torch._C._get_cudnn_enabled,
    torch._C._get_flash_sdp_enabled,
    torch._C._get_mem_efficient_sdp_enabled,
    torch._C._get_math_sdp_enabled,
    torch.backends.mha.get_fastpath_enabled,
)


_USUAL: tuple[Any, ...] = (
    _any_autocast,
    _function_depth,
    _dispatch_depth,
    _default_dtype,
    _grad_enabled,
    _inference_enabled,
    _deterministic,
    _matmul_precision,
    functools.partial(_hooks, False),
    *_KERNELS,
)


def usual() -> list[Any] | None:
    """The same where there is no autocast and there are no modes, in less time; else None."""
    found = [f() for f in _USUAL]
    return None if found[0] or found[1] else found


def usual_one_by_one() -> list[tuple[Any, Any]] | None:
    """What gives each of them, and what it gives now; None as above."""
    found = usual()
    return None if found is None else list(zip(_USUAL, found, strict=True))


def _saved_tensor_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _autocast() -> tuple[tuple[str, torch.dtype], ...]:
    devices = ("cpu", "cuda", "mps", "xpu")
    return tuple(
        (device, torch.get_autocast_dtype(device))
        for device in devices
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    )


def _function_modes() -> tuple[str, ...]:
    """Types of the active modes, and the default device, which is one of them."""
    depth = _function_depth()
    kinds = [type(torch._C._get_function_stack_at(i)).__name__ for i in range(depth)]
    return (*kinds, str(torch.get_default_device()))


def foreign_mode() -> str | None:
    """An active mode whose own state decides what operations do; the default device is none."""
    if _saved_tensor_hooks() is not None:
        return "hooks of saved tensors"
    depth = torch._C._len_torch_function_stack()
    active = [torch._C._get_function_stack_at(i) for i in range(depth)]
    for mode in active:
        if isinstance(mode, TorchFunctionMode) and type(mode) is not DeviceContext:
            return type(mode).__name__
    return "a dispatch mode" if torch._C._len_torch_dispatch_stack() else None


def registered_namespaces() -> frozenset[str]:
    """The namespaces that hold operators: `aten`, and whatever was added to it."""
    return frozenset(name.split("::")[0] for name in torch._C._dispatch_get_all_op_names())


def tree_functions(cls: type) -> tuple[Any, ...]:
    """How objects of a class are taken apart and put together where they stand in a tree."""
    node = _pytree.SUPPORTED_NODES.get(cls)
    return () if node is None else (node.flatten_fn, node.unflatten_fn)


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
