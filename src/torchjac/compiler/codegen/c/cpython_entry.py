"""The entry from Python into a compiled function.

`ctypes` takes half a microsecond a call, as much as a small kernel. A built-in function of CPython
takes a sixth of this time. Its declarations are part of CPython's stable ABI, so they are
repeated here, and no header files need to be installed.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

from torchjac.host.system import calls_natively

_FASTCALL = 0x80  # METH_FASTCALL of CPython: arguments are an array
_NOARGS = 0x04  # METH_NOARGS of CPython: there are no arguments


# Whether functions are built-in functions of CPython, not of ctypes.
has_native_calls = functools.cache(calls_natively)


def entry_source(name: str, inputs: int, outputs: int, numbers: int) -> str:
    """C text of the entry of a function.

    Args:
        name: The name of the function of inputs, tables, outputs, scratch memory, and numbers.
        inputs: The number of input arrays.
        outputs: The number of output arrays.
        numbers: The number of integers after the arrays.
    """
    return (_of_python if has_native_calls() else _of_ctypes)(
        name, max(inputs, 1), outputs, numbers
    )


def load_entry(library: Any, name: str, arrays: int, numbers: int) -> Callable[..., bool]:
    """The entry of a function: takes the addresses of arrays and scratch memory, then integers.

    A running call releases the interpreter's lock.

    Args:
        library: The compiled text of `entry_source`.
        name: The name of the function.
        arrays: The number of inputs (at least one) and outputs.
        numbers: The number of integers after the arrays.
    """
    function: Any = getattr(library, f"{name}_entry")
    if not has_native_calls():
        function.argtypes = [ctypes.c_void_p] * (arrays + 2) + [ctypes.c_long] * numbers
        function.restype = ctypes.c_bool
        return function  # type: ignore[no-any-return]
    return _native_call(function, _FASTCALL, None)


def bind(function: Any, data: bytes) -> Callable[[], Any] | None:
    """A built-in function of CPython without arguments, bound to data; None where there is none.

    Args:
        function: A compiled function of the object that holds the data.
        data: Any bytes.
    """
    return _native_call(function, _NOARGS, data) if has_native_calls() else None


def _native_call(function: Any, flags: int, data: bytes | None) -> Callable[..., Any]:
    make = ctypes.pythonapi.PyCFunction_NewEx
    make.argtypes = [ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p]
    make.restype = ctypes.py_object
    about = _definition(ctypes.cast(function, ctypes.c_void_p).value, flags)
    result: Callable[..., Any] = make(ctypes.addressof(about), data, None)
    return result


class _Definition(ctypes.Structure):
    """The definition of a built-in function (PyMethodDef)."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


@functools.cache  # definitions must outlive their functions, whose libraries are never unloaded
def _definition(address: int | None, flags: int) -> _Definition:
    return _Definition(b"kernel", address, flags, None)


def _of_python(name: str, inputs: int, outputs: int, numbers: int) -> str:
    arrays = inputs + outputs
    more = "".join(f", (long)p[{arrays + 2 + k}]" for k in range(numbers))
    return f"""
extern void *PyLong_AsVoidPtr(void *);
extern void *PyErr_Occurred(void);
extern void *PyEval_SaveThread(void);
extern void PyEval_RestoreThread(void *);
extern void *PyBool_FromLong(long);
void *{name}_entry(void *self, void *const *args, long count)
{{
  void *p[{arrays + 2 + numbers}];
  (void)self;
  for (long k = 0; k < {arrays + 2 + numbers}; k++)
    p[k] = k < count ? PyLong_AsVoidPtr(args[k]) : 0;
  if (PyErr_Occurred()) return 0;
  void *state = PyEval_SaveThread();
  int fine = {name}((const void *const *)p, (const void *const *)p[{arrays}],
    (void *const *)(p + {inputs}), p[{arrays + 1}]{more});
  PyEval_RestoreThread(state);
  return PyBool_FromLong(fine);
}}
"""


def _of_ctypes(name: str, inputs: int, outputs: int, numbers: int) -> str:
    in_names = [f"in{k}" for k in range(inputs)]
    out_names = [f"out{k}" for k in range(outputs)]
    more = [f"n{k}" for k in range(numbers)]
    parameters = [f"const void *{x}" for x in in_names] + [f"void *{x}" for x in out_names]
    parameters += ["const void *const *table", "void *scratch"] + [f"long {x}" for x in more]
    return f"""
int {name}_entry({", ".join(parameters)})
{{
  const void *const in[] = {{{", ".join(in_names)}}};
  void *const out[] = {{{", ".join(out_names)}}};
  return {name}({", ".join(["in", "table", "out", "scratch", *more])});
}}
"""
