"""Ambient state of torch: modes and settings of the thread and of the process."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchjac._torch import pytree
from torchjac._torch.modes import is_any_autocast_enabled
from torchjac._torch.private import Gone, corner, private, private_function, private_type

# Settings that change the meaning of operations.
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
    """The values of the `AMBIENT` settings, in order. A hot path, so no Python function calls."""
    return (
        _default_dtype(),
        _grad_enabled(),
        _inference_enabled(),
        _autocast() if is_any_autocast_enabled() else (),
        _deterministic(),
        _matmul_precision(),
        [is_enabled() for is_enabled in _KERNELS],
        _hooks(False) is not None,
        _function_modes() if _function_depth() else (),
        _dispatch_depth(),
    )


_DeviceContext = private_type("torch.utils._device.DeviceContext")
_default_dtype = torch.get_default_dtype
_grad_enabled = private_function("torch._C.is_grad_enabled", torch.is_grad_enabled)
_inference_enabled = private_function(
    "torch._C.is_inference_mode_enabled", torch.is_inference_mode_enabled
)
_deterministic = private_function(
    "torch._C._get_deterministic_algorithms", torch.are_deterministic_algorithms_enabled
)
_precision = private_function(
    "torch._C._get_float32_matmul_precision", torch.get_float32_matmul_precision
)


def _matmul_precision() -> Any:
    """The precision of matrix products; that of each backend if they differ, where torch raises."""
    try:
        return _precision()
    except RuntimeError:
        return tuple(getattr(backend, "fp32_precision", None) for backend in _PRECISION_BACKENDS)


_PRECISION_BACKENDS = (
    torch.backends,
    torch.backends.cuda.matmul,
    torch.backends.cudnn,
    torch.backends.mkldnn,
    getattr(torch.backends.mkldnn, "matmul", None),
    getattr(torch.backends.mkldnn, "conv", None),
    getattr(torch.backends.mkldnn, "rnn", None),
)
_hooks = private_function(
    "torch._C._autograd._top_saved_tensors_default_hooks", lambda tracing: None
)
_function_depth = private_function("torch._C._len_torch_function_stack", lambda: 0)
_function_mode_at = private("torch._C._get_function_stack_at")
_dispatch_depth = private_function("torch._C._len_torch_dispatch_stack", lambda: 0)
# Switches of kernels, which may round in another way.
_KERNELS = (
    private_function("torch._C._get_mkldnn_enabled", lambda: torch.backends.mkldnn.enabled),
    private_function("torch._C._get_nnpack_enabled", lambda: None),
    private_function("torch._C._get_cudnn_enabled", lambda: torch.backends.cudnn.enabled),
    private_function("torch._C._get_flash_sdp_enabled", torch.backends.cuda.flash_sdp_enabled),
    private_function(
        "torch._C._get_mem_efficient_sdp_enabled", torch.backends.cuda.mem_efficient_sdp_enabled
    ),
    private_function("torch._C._get_math_sdp_enabled", torch.backends.cuda.math_sdp_enabled),
    torch.backends.mha.get_fastpath_enabled,
)


_READERS: tuple[Any, ...] = (
    is_any_autocast_enabled,
    _function_depth,
    _dispatch_depth,
    _default_dtype,
    _grad_enabled,
    _inference_enabled,
    _deterministic,
    _precision,
    functools.partial(_hooks, False),
    *_KERNELS,
)


def plain_settings() -> list[Any] | None:
    """A quick `ambient`: the raw values; None under autocast or a mode, or if precisions differ."""
    try:
        values = [f() for f in _READERS]
    except RuntimeError:  # of `_precision`
        return None
    return None if values[0] or values[1] else values


def plain_setting_readers() -> list[tuple[Any, Any]] | None:
    """Pairs of the function that reads a setting and its value; None as for `plain_settings`."""
    values = plain_settings()
    return None if values is None else list(zip(_READERS, values, strict=True))


def _saved_tensor_hooks() -> Any:
    return _hooks(False)


def _autocast() -> tuple[tuple[str, torch.dtype], ...]:
    devices = ("cpu", "cuda", "mps", "xpu")
    return tuple(
        (device, torch.get_autocast_dtype(device))
        for device in devices
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    )


def _function_modes() -> tuple[str, ...]:
    """Types of the active modes, and the default device, which torch sets by a mode."""
    depth = _function_depth()
    kinds = [type(_function_mode_at(i)).__name__ for i in range(depth)]
    return (*kinds, str(torch.get_default_device()))


def foreign_mode() -> str | None:
    """Name of an active mode that changes operations by state of its own, or None.

    The mode of the default device is not one of them.
    """
    if _saved_tensor_hooks() is not None:
        return "hooks of saved tensors"
    active = [_function_mode_at(i) for i in range(_function_depth())]
    for mode in active:
        if isinstance(mode, TorchFunctionMode) and type(mode) is not _DeviceContext:
            return type(mode).__name__
    return "a dispatch mode" if _dispatch_depth() else None


_operator_names = private("torch._C._dispatch_get_all_op_names")


def registered_namespaces() -> frozenset[str]:
    """The namespaces of all registered operators: `aten` and those of libraries."""
    return frozenset(name.split("::")[0] for name in _operator_names())


def tree_functions(cls: type) -> tuple[Any, ...]:
    """The flatten and unflatten functions of a container class; empty for any other class."""
    return pytree.functions(cls)


# Hooks that run for every module.
GLOBAL_HOOKS: tuple[dict[int, Any], ...] = tuple(
    private(f"torch.nn.modules.module._global_{when}_hooks")
    for when in ("forward", "forward_pre", "backward", "backward_pre")
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


_is_wrapped = private("torch._C._functorch.is_functorch_wrapped_tensor")


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a torch.func transform."""
    return bool(_is_wrapped(tensor))


@corner("a setting or a mode of torch", "nothing is planned")
def SETTINGS() -> bool:
    """Settings of the thread, modes, hooks and namespaces can be read, and follow changes."""

    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    before = ambient()
    if _saved_tensor_hooks() is not None or foreign_mode() is not None:
        return False
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        shown = not _grad_enabled() and _saved_tensor_hooks() is not None
    with torch.inference_mode():
        shown &= bool(_inference_enabled())
    with torch.autocast("cpu"):
        shown &= bool(is_any_autocast_enabled()) and bool(_autocast())
    with Mode():
        shown &= _function_depth() == 1 and foreign_mode() == "Mode"
    with torch.device("cpu"):
        shown &= foreign_mode() is None
    hooks = all(isinstance(hook_table, dict) for hook_table in GLOBAL_HOOKS)
    return (
        shown
        and hooks
        and ambient() == before
        and not isinstance(_operator_names, Gone)
        and not is_wrapped(torch.ones(1))
    )
