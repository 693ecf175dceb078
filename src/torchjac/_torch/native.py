"""Native readings: settings of torch and metadata of tensors, read in torch's C++ library.

A guard reads some twenty values on every call. A read from Python takes 50 ns, nearly all of it
call overhead; a compiled function that reads all values in turn takes 2 ns each. This module gives
the compiled function the addresses: functions of the library, by their mangled names. A missing
function (another version, another system) is replaced by a read from Python.
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
    """A function of torch's library, called with an argument and the address of a result.

    Attributes:
        function: Address of the function; 0 to read the number at the address `argument`.
        argument: The argument; functions without parameters ignore it.
        by_reference: Whether the function takes the address of the argument.
        mask: Significant bits of the return value.
    """

    function: int
    argument: int
    by_reference: bool
    mask: int

    def read(self) -> tuple[int, int]:
        """The masked return value and the written result."""
        if not self.function:
            return ctypes.c_int64.from_address(self.argument).value & self.mask, 0
        call = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)(self.function)
        argument, written = ctypes.c_int64(self.argument), ctypes.c_int64(0)
        where = ctypes.addressof(argument) if self.by_reference else self.argument
        return call(where, ctypes.addressof(written)) & self.mask, written.value


_BOOL, _BYTE, _INT, _LONG = 0xFF, 0xFF, 0xFFFFFFFF, -1
_CONTEXT = "_ZNK2at7Context"  # const methods of at::Context, of which there is one

# Functions of `torch._C`: mangled name and significant bits. None may throw, as that would end the
# process (`float32MatmulPrecision` throws where backends differ in precision).
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
    """The native reading of a setting, by the Python function that reads it, or None."""
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
    """The native reading of a tensor's data pointer, or None. The tensor must outlive it."""
    if not (READINGS.known or READINGS.holds()):
        return None
    return _place(tensor)


def _place(tensor: Tensor) -> Reading | None:
    function = _symbol("aoti_torch_get_data_ptr")  # part of torch's stable interface for C
    if function is None or implementation(tensor) is None:
        return None
    return Reading(function, tensor._cdata, True, _INT)


def implementation(tensor: Tensor) -> Reading | None:
    """The native reading of a tensor's C++ pointer, to be read before all other readings.

    The pointer is the first field of the Python object after its header; only `swap_tensors`
    changes it.
    """
    address = id(tensor) + object.__basicsize__
    same = ctypes.c_void_p.from_address(address).value == tensor._cdata
    return Reading(0, address, True, _LONG) if same else None


def version(tensor: Tensor) -> Reading | None:
    """The native reading of a tensor's version, or None. The tensor must outlive it."""
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
    """The loaded C++ library of torch, or None if it cannot be opened."""
    try:
        return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / torch_library()))
    except OSError:
        return None


@functools.cache
def _symbol(name: str) -> int | None:
    """The address of a function of the library, or None."""
    try:
        function = getattr(_library(), name)
    except (AttributeError, TypeError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


@functools.cache
def _context() -> int | None:
    """The address of the global context, which holds the settings of the process."""
    address = _symbol("_ZN2at13globalContextEv")
    return None if address is None else ctypes.CFUNCTYPE(ctypes.c_void_p)(address)()


@corner("torch's C++ library", "guards read settings and tensors in Python")
def READINGS() -> bool:
    """Native readings equal those of Python, before and after a write to a tensor.

    A function that the library lacks has no contract.
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
    """The number of a setting in the library."""
    return _SCALAR_TYPES[value] if isinstance(value, torch.dtype) else int(value)


# c10::ScalarType.
_SCALAR_TYPES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}
