"""Constants: numbers, strings, settings, and tuples of these, which are compared as values."""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import pathlib
import re
import struct
import types
import typing
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from torchjac._torch.trace.op_traits import HigherOrderOperator, OpOverload, OpOverloadPacket
from torchjac.guards.bytecode import VOLATILE_BUILTINS, is_volatile

Same = Callable[[Any], bool]

# Namespaces of torch.ops whose operators no user defines anew.
TRUSTED_OPERATORS = frozenset(
    {"_c10d_functional", "aten", "higher_order", "mkldnn", "prim", "prims", "quantized"}
    | {"torchvision"}
)


class NotUnderstood(Exception):
    """A value whose changes cannot be seen, named in the message."""


# Compared by type and `==`.
_EQUAL = (
    bytes,
    decimal.Decimal,
    datetime.date,
    datetime.timedelta,
    datetime.tzinfo,
    fractions.Fraction,
    int,
    pathlib.PurePath,
    range,
    re.Pattern,
    str,
    torch.Size,
    torch.device,
    types.GenericAlias,
    types.UnionType,
)
_OPERATORS = (OpOverload, OpOverloadPacket)
# Compared by identity: there is one object for each value, or the object cannot change.
_IDENTICAL = (
    HigherOrderOperator,
    OpOverload,
    bool,
    enum.Enum,
    torch.dtype,
    torch.finfo,
    torch.iinfo,
    torch.layout,
    torch.memory_format,
    type(None),
    type(Ellipsis),
    type(NotImplemented),
    *_OPERATORS[1:],
    types.CodeType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    typing.TypeVar,
)
# Compared by type and `==` also as items of a list: `is_flat`.
_FLAT = frozenset({type(None), bool, int, str, torch.dtype, torch.device, torch.Size})


def constant_test(value: Any) -> Same | None:
    """A test for the same value; None for an object that is no constant.

    Equal numbers of different types are different values. So are zeros of different sign.

    Raises:
        NotUnderstood: The value is a function that reads the world outside of the program.
    """
    kind = type(value)
    if kind is float or kind is complex:
        return _number(value)
    if kind in _EQUAL or (isinstance(value, (pathlib.PurePath, datetime.tzinfo))):
        return lambda new: type(new) is kind and bool(new == value)
    if isinstance(value, _OPERATORS) and str(value).split(".")[0] not in TRUSTED_OPERATORS:
        raise NotUnderstood(f"torch.ops.{value} is defined out of sight")
    if isinstance(value, _IDENTICAL):
        return lambda new: new is value
    if kind is tuple:
        return _tuple(value)
    if kind is frozenset or kind is set:
        return _set(value)
    if kind is slice:
        return _slice(value)
    if isinstance(value, np.generic) and not isinstance(value, np.object_):
        dtype, content = value.dtype, value.tobytes()
        return lambda new: type(new) is kind and new.dtype == dtype and new.tobytes() == content
    if isinstance(value, np.dtype):
        return lambda new: type(new) is kind and bool(new == value)
    if isinstance(value, (types.BuiltinFunctionType, np.ufunc)):
        return _builtin(value)
    return None


def is_flat(value: Any) -> bool:
    """Whether a list of values like this one can be compared at once, by types and `==`."""
    return type(value) in _FLAT or (type(value) is float and value != 0 and value == value)


def shown(value: Any) -> str:
    """A value in the words of a message."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if constant_test_or_none(value) is None:
        return f"an object of type {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def constant_test_or_none(value: Any) -> Same | None:
    """The test for the same value; None also for a value whose changes cannot be seen."""
    try:
        return constant_test(value)
    except NotUnderstood:
        return None


def _number(value: float | complex) -> Same:
    kind = type(value)
    parts = struct.pack("dd", value.real, value.imag)
    return lambda new: type(new) is kind and struct.pack("dd", new.real, new.imag) == parts


def _tuple(value: tuple[Any, ...]) -> Same | None:
    parts = [constant_test(part) for part in value]
    if any(part is None for part in parts):
        return None
    tests: list[Same] = [part for part in parts if part is not None]
    return lambda new: (
        type(new) is tuple
        and len(new) == len(tests)
        and all(test(part) for test, part in zip(tests, new, strict=True))
    )


def _set(value: set[Any] | frozenset[Any]) -> Same | None:
    """A test for the members in their order, which a loop over them shows."""
    inner = _tuple(tuple(value))
    kind = type(value)
    return None if inner is None else lambda new: type(new) is kind and inner(tuple(new))


def _slice(value: slice) -> Same | None:
    inner = _tuple((value.start, value.stop, value.step))
    if inner is None:
        return None
    return lambda new: type(new) is slice and inner((new.start, new.stop, new.step))


def _builtin(value: Any) -> Same | None:
    owner = getattr(value, "__self__", None)
    name = getattr(value, "__name__", "")
    if isinstance(value, types.BuiltinFunctionType):
        if name in VOLATILE_BUILTINS or is_volatile(value.__module__):
            raise NotUnderstood(f"{name} reads what lies outside of the program")
        if owner is not None and not isinstance(owner, (types.ModuleType, type)):
            return None  # a method of something that may change
    return lambda new: new is value or bool(type(new) is type(value) and new == value)
