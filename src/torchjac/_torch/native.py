"""Settings of torch and facts of tensors, read where torch's own library has them.

A guard reads some twenty of them on every call. Each takes 50 ns from Python, nearly all of it to
get there and back; a compiled function that reads them one after another takes 2 ns each. What is
said here is where that function finds them: functions of the library, by the names that C++ gave
them. One that is not there (another version, another system) is read from Python instead.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Reading(NamedTuple):
    """A function of torch's library, called with one argument and a place for a number to write.

    Attributes:
        function: Its address; 0: the argument is that of a number, which is read.
        argument: What it is given; functions that take nothing pass over it.
        by_reference: Whether it is given the address of the argument instead.
        mask: The bits that count of what it returns.
    """

    function: int
    argument: int
    by_reference: bool
    mask: int

    def now(self) -> tuple[int, int]:
        """What it returns, and what it writes."""
        if not self.function:
            return ctypes.c_int64.from_address(self.argument).value & self.mask, 0
        call = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)(self.function)
        given, written = ctypes.c_int64(self.argument), ctypes.c_int64(0)
        where = ctypes.addressof(given) if self.by_reference else self.argument
        return call(where, ctypes.addressof(written)) & self.mask, written.value


_BOOL, _BYTE, _INT, _LONG = 0xFF, 0xFF, 0xFFFFFFFF, -1
_CONTEXT = "_ZNK2at7Context"  # const methods of at::Context, of which there is one

_SETTINGS: dict[Callable[[], Any], tuple[str, int]] = {
    torch.get_default_dtype: ("_ZN3c1031get_default_dtype_as_scalartypeEv", _BYTE),
    torch._C.is_grad_enabled: ("_ZN3c108GradMode10is_enabledEv", _BOOL),
    torch._C.is_inference_mode_enabled: ("_ZN3c1013InferenceMode10is_enabledEv", _BOOL),
    torch._C._len_torch_function_stack: (
        "_ZN2at4impl22PythonTorchFunctionTLS9stack_lenEv",
        _LONG,
    ),
    torch._C._len_torch_dispatch_stack: ("_ZN3c104impl20TorchDispatchModeTLS9stack_lenEv", _LONG),
    torch._C._get_deterministic_algorithms: (f"{_CONTEXT}23deterministicAlgorithmsEv", _BOOL),
    torch._C._get_float32_matmul_precision: (f"{_CONTEXT}22float32MatmulPrecisionEv", _INT),
    torch._C._get_mkldnn_enabled: (f"{_CONTEXT}17userEnabledMkldnnEv", _BOOL),
    torch._C._get_nnpack_enabled: (f"{_CONTEXT}17userEnabledNNPACKEv", _BOOL),
    torch._C._get_cudnn_enabled: (f"{_CONTEXT}16userEnabledCuDNNEv", _BOOL),
    torch._C._get_flash_sdp_enabled: (f"{_CONTEXT}19userEnabledFlashSDPEv", _BOOL),
    torch._C._get_mem_efficient_sdp_enabled: (
        f"{_CONTEXT}26userEnabledMemEfficientSDPEv",
        _BOOL,
    ),
    torch._C._get_math_sdp_enabled: (f"{_CONTEXT}18userEnabledMathSDPEv", _BOOL),
}


def setting(read: Callable[[], Any]) -> Reading | None:
    """Where a setting is that a function of Python reads; None where that is not known."""
    name, mask = _SETTINGS.get(read, ("", 0))
    function = _symbol(name)
    of_context = name.startswith(_CONTEXT)
    context = _context() if of_context else 0
    if function is None or context is None:
        return None
    return Reading(function, context, False, mask)


def place(tensor: Tensor) -> Reading | None:
    """Where a tensor's numbers begin. It must be alive when this is read."""
    function = _symbol("aoti_torch_get_data_ptr")  # part of torch's stable interface for C
    if function is None or implementation(tensor) is None:
        return None
    return Reading(function, tensor._cdata, True, _INT)


def implementation(tensor: Tensor) -> Reading | None:
    """What of C++ stands behind a tensor of Python, to be read before anything of that is.

    It is a field of the object, behind what all objects have; nobody but `swap_tensors` changes it.
    """
    address = id(tensor) + object.__basicsize__
    same = ctypes.c_void_p.from_address(address).value == tensor._cdata
    return Reading(0, address, True, _LONG) if same else None


def version(tensor: Tensor) -> Reading | None:
    """How often it was written to; None for inference tensors. It must be alive."""
    if tensor.is_inference() or implementation(tensor) is None:  # the library would throw
        return None
    function = _symbol("_ZNK2at10TensorBase8_versionEv")
    return None if function is None else Reading(function, tensor._cdata, True, _LONG)


@functools.cache
def _library() -> Any:
    """The library of torch, which is loaded; None where it is another kind of file."""
    try:
        return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    except OSError:
        return None


@functools.cache
def _symbol(name: str) -> int | None:
    """The address of a function."""
    try:
        found = getattr(_library(), name)
    except (AttributeError, TypeError):
        return None
    return ctypes.cast(found, ctypes.c_void_p).value


@functools.cache
def _context() -> int | None:
    """The address of what holds settings of the process."""
    address = _symbol("_ZN2at13globalContextEv")
    return None if address is None else ctypes.CFUNCTYPE(ctypes.c_void_p)(address)()
