"""The way from Python into a compiled function.

`ctypes` takes half a microsecond a call, as much as a small kernel. A function of CPython's own
kind takes a sixth of that: what it needs of the interpreter is part of its stable ABI, so it is
declared here, and no header files have to be installed.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

from torchjac.host.system import calls_natively

# How CPython hands arguments over: as an array (METH_FASTCALL), or none (METH_NOARGS).
_ARRAY, _NONE = 0x80, 0x04


# Whether functions are of CPython's own kind.
own_kind = functools.cache(calls_natively)


def entry(name: str, inputs: int, outputs: int, numbers: int) -> str:
    """C text that is added to a function, so that Python can call it.

    Args:
        name: Of the function: of arrays of inputs, tables and outputs, of scratch, and numbers.
        inputs: How many arrays it reads.
        outputs: How many it writes.
        numbers: How many numbers follow.
    """
    return (_of_python if own_kind() else _of_ctypes)(name, max(inputs, 1), outputs, numbers)


def entered(library: Any, name: str, arrays: int, numbers: int) -> Callable[..., bool]:
    """The function: takes addresses of inputs, outputs, the array of tables, scratch; and numbers.

    The interpreter's lock is released while it runs.

    Args:
        library: What holds the text of `entry`, compiled.
        name: Of the function.
        arrays: Number of inputs (at least one) and outputs.
        numbers: How many numbers follow.
    """
    function: Any = getattr(library, f"{name}_entry")
    if not own_kind():
        function.argtypes = [ctypes.c_void_p] * (arrays + 2) + [ctypes.c_long] * numbers
        function.restype = ctypes.c_bool
        return function  # type: ignore[no-any-return]
    return _own_kind(function, _ARRAY, None)


def bound(function: Any, data: bytes) -> Callable[[], Any] | None:
    """A function of CPython's own kind, bound to data, that takes nothing; None where none can be.

    Args:
        function: In a compiled library: takes the object that holds the data, and nothing else.
        data: Any.
    """
    return _own_kind(function, _NONE, data) if own_kind() else None


def _own_kind(function: Any, flags: int, data: bytes | None) -> Callable[..., Any]:
    make = ctypes.pythonapi.PyCFunction_NewEx
    make.argtypes = [ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p]
    make.restype = ctypes.py_object
    about = _definition(ctypes.cast(function, ctypes.c_void_p).value, flags)
    made: Callable[..., Any] = make(ctypes.addressof(about), data, None)
    return made


class _Definition(ctypes.Structure):
    """What CPython knows of a function (PyMethodDef)."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


@functools.cache  # they must live as long as their functions, whose libraries are never unloaded
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
    given = [f"in{k}" for k in range(inputs)]
    made = [f"out{k}" for k in range(outputs)]
    more = [f"n{k}" for k in range(numbers)]
    taken = [f"const void *{x}" for x in given] + [f"void *{x}" for x in made]
    taken += ["const void *const *table", "void *scratch"] + [f"long {x}" for x in more]
    return f"""
int {name}_entry({", ".join(taken)})
{{
  const void *const in[] = {{{", ".join(given)}}};
  void *const out[] = {{{", ".join(made)}}};
  return {name}({", ".join(["in", "table", "out", "scratch", *more])});
}}
"""
