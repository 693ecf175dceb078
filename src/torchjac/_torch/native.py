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

from torchjac._torch.private import Gone, corner, private
from torchjac.host.system import torch_library


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

    def read(self) -> tuple[int, int]:
        """What it returns, and what it writes."""
        if not self.function:
            return ctypes.c_int64.from_address(self.argument).value & self.mask, 0
        call = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)(self.function)
        argument, written = ctypes.c_int64(self.argument), ctypes.c_int64(0)
        where = ctypes.addressof(argument) if self.by_reference else self.argument
        return call(where, ctypes.addressof(written)) & self.mask, written.value


_BOOL, _BYTE, _INT, _LONG = 0xFF, 0xFF, 0xFFFFFFFF, -1
_CONTEXT = "_ZNK2at7Context"  # const methods of at::Context, of which there is one

# Functions of `torch._C`, where the library has them, and the bits that count. None may throw: that
# would end the process (`float32MatmulPrecision` does, where backends differ in precision).
_NAMES = {
    "is_grad_enabled": ("_ZN3c108GradMode10is_enabledEv", _BOOL),
    "is_inference_mode_enabled": ("_ZN3c1013InferenceMode10is_enabledEv", _BOOL),
    "_len_torch_function_stack": ("_ZN2at4impl22PythonTorchFunctionTLS9stack_lenEv", _LONG),
    "_len_torch_dispatch_stack": ("_ZN3c104impl20TorchDispatchModeTLS9stack_lenEv", _LONG),
    "_get_deterministic_algorithms": (f"{_CONTEXT}23deterministicAlgorithmsEv", _BOOL),
    "_get_mkldnn_enabled": (f"{_CONTEXT}17userEnabledMkldnnEv", _BOOL),
    "_get_nnpack_enabled": (f"{_CONTEXT}17userEnabledNNPACKEv", _BOOL),
    "_get_cudnn_enabled": (f"{_CONTEXT}16userEnabledCuDNNEv", _BOOL),
    "_get_flash_sdp_enabled": (f"{_CONTEXT}19userEnabledFlashSDPEv", _BOOL),
    "_get_mem_efficient_sdp_enabled": (f"{_CONTEXT}26userEnabledMemEfficientSDPEv", _BOOL),
    "_get_math_sdp_enabled": (f"{_CONTEXT}18userEnabledMathSDPEv", _BOOL),
}
_SETTINGS: dict[Callable[[], Any], tuple[str, int]] = {
    torch.get_default_dtype: ("_ZN3c1031get_default_dtype_as_scalartypeEv", _BYTE),
    **{private(f"torch._C.{name}"): where for name, where in _NAMES.items()},
}


def setting(read: Callable[[], Any]) -> Reading | None:
    """Where a setting is that a function of Python reads; None where that is not known."""
    if not (READINGS.known or READINGS.holds()):
        return None
    return _setting(read)


def _setting(read: Callable[[], Any]) -> Reading | None:
    name, mask = _SETTINGS.get(read, ("", 0))
    function = _symbol(name)
    of_context = name.startswith(_CONTEXT)
    context = _context() if of_context else 0
    if function is None or context is None:
        return None
    return Reading(function, context, False, mask)


def place(tensor: Tensor) -> Reading | None:
    """Where a tensor's numbers begin. It must be alive when this is read."""
    if not (READINGS.known or READINGS.holds()):
        return None
    return _place(tensor)


def _place(tensor: Tensor) -> Reading | None:
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
    if not (READINGS.known or READINGS.holds()):
        return None
    return _version(tensor)


def _version(tensor: Tensor) -> Reading | None:
    if tensor.is_inference() or implementation(tensor) is None:  # the library would throw
        return None
    function = _symbol("_ZNK2at10TensorBase8_versionEv")
    return None if function is None else Reading(function, tensor._cdata, True, _LONG)


@functools.cache
def _library() -> Any:
    """The library of torch, which is loaded; None where it is another kind of file."""
    try:
        return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / torch_library()))
    except OSError:
        return None


@functools.cache
def _symbol(name: str) -> int | None:
    """The address of a function."""
    try:
        function = getattr(_library(), name)
    except (AttributeError, TypeError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


@functools.cache
def _context() -> int | None:
    """The address of what holds settings of the process."""
    address = _symbol("_ZN2at13globalContextEv")
    return None if address is None else ctypes.CFUNCTYPE(ctypes.c_void_p)(address)()


@corner("torch's C++ library", "guards read settings and tensors in Python")
def READINGS() -> bool:
    """What is read there is what Python reads, before and after a tensor is written to.

    A library that lacks a function has no contract to keep: that one is read in Python.
    """
    for read in _SETTINGS:
        reading = None if isinstance(read, Gone) else _setting(read)
        if reading is not None and reading.read()[0] != _number(read()):
            return False
    tensor = torch.zeros(3, dtype=torch.float64)
    where, written = _place(tensor), _version(tensor)
    for _ in range(2):
        if where is not None and where.read()[1] != tensor.data_ptr():
            return False
        if written is not None and written.read()[0] != tensor._version:
            return False
        tensor.add_(1)
    return True


def _number(value: Any) -> int:
    """A setting as the number that the library has for it."""
    return _SCALAR_TYPES[value] if isinstance(value, torch.dtype) else int(value)


# c10::ScalarType.
_SCALAR_TYPES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}
