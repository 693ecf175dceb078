"""Checks of tensors and of arrays.

Most checks of a guard are about tensors. One function of torch (`like`) compares all facts of a
tensor but its numbers; reading attribute by attribute takes five times as long. Where `like` does
not pass a tensor, the slower rules decide.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchjac._torch import native
from torchjac._torch.native import Reading
from torchjac._torch.state import PLAIN_TENSORS, is_wrapped
from torchjac._torch.tensor_guards import tensor_check
from torchjac.guards.checks import Compound, Sufficient
from torchjac.guards.constants import NotUnderstood
from torchjac.guards.predicate import GuardCode
from torchjac.guards.rules import Check, Clause, Leaf, Rule

# Bytes of a NumPy array, which has no version, so that its bytes are compared (64 KiB take 3 us).
MOST_BYTES = 1 << 16
# Elements of a tensor of inference mode, which has no version either, so that they are compared.
MOST_ELEMENTS = 1 << 12

Like = Callable[[Any], bool]


def _layout(tensor: Tensor, dense: bool) -> tuple[Any, ...]:
    """Facts of a tensor that may change while its version stays."""
    if not dense:
        return tensor.shape, tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _place(tensor: Tensor, dense: bool) -> int:
    return tensor.data_ptr() if dense else 0


_HELPERS: dict[str, Any] = {"layout": _layout, "place": _place, "strided": torch.strided}
_SHAPE = Rule(
    "kind dense old",
    Clause(
        "type(x) is kind and (x.layout is strided) is dense",
        "{path} changed from {kind.__name__} to {shown(x)}",
    ),
    Clause(
        "layout(x, dense) == old",
        "the shape, strides, dtype, device or requires_grad of {path} changed",
    ),
    **_HELPERS,
)
_REPLACED = Clause(
    "x is tensor() is not None",
    "{path} was replaced: {shown(x)}",
    final="tensor() is None",
)
_OBJECT = Rule("tensor", _REPLACED)
_VALUES = Rule(
    "tensor version dense where old",
    _REPLACED,
    Clause("x._version == version", "{path} was written to in place", final="True"),
    Clause(
        "place(x, dense) == where and layout(x, dense) == old",
        "the data, shape, dtype or device of {path} changed",
    ),
    **_HELPERS,
)
_INFERENCE = Rule(
    "old copy",
    Clause(
        "type(x) is Tensor and layout(x, True) == old and equal(x, copy)",
        "{path}, a tensor made in inference mode, changed",
    ),
    Tensor=Tensor,
    equal=torch.equal,
    **_HELPERS,
)
_ARRAY = Rule(
    "old content",
    Clause("type(x) is ndarray", "{path} changed from a NumPy array to {shown(x)}"),
    Clause("(x.shape, x.strides, x.dtype) == old", "the shape, strides or dtype of {path} changed"),
    Clause("x.tobytes() == content", "the values of {path} changed"),
    ndarray=np.ndarray,
)


def refuse_wrapped(value: Tensor, path: str) -> None:
    """Refuses tensors of subclasses and of transforms.

    Raises:
        NotUnderstood: The tensor is of a subclass, or belongs to a transform.
    """
    if type(value) not in PLAIN_TENSORS or is_wrapped(value):
        raise NotUnderstood(f"{path} is a tensor of type {type(value).__name__}")


def shape(value: Tensor, path: str) -> Leaf:
    """A check of kind, shape, strides, dtype, device, and whether it requires gradients."""
    dense = value.layout is torch.strided
    return _SHAPE(path, type(value), dense, _layout(value, dense))


def identity(value: Tensor, path: str) -> Check:
    """A check for this very tensor, with any numbers."""
    return Compound(_OBJECT(path, weakref.ref(value)), [shape(value, path)])


def values(value: Tensor, path: str) -> Leaf:
    """A check for this very tensor with its numbers; in inference mode, for equal numbers.

    Raises:
        NotUnderstood: A tensor of inference mode is too large to be compared.
    """
    dense = value.layout is torch.strided
    if not value.is_inference():
        old = _layout(value, dense)
        return _VALUES(path, weakref.ref(value), value._version, dense, _place(value, dense), old)
    if value.numel() > MOST_ELEMENTS:
        raise NotUnderstood(
            f"{path} was made in inference mode, so it does not know when it is written to, and it "
            f"is too large to compare on every call"
        )
    return _INFERENCE(path, _layout(value, True), value.clone())


def array(value: Any, path: str) -> Leaf:
    """A check of a NumPy array: its kind, and its bytes.

    Raises:
        NotUnderstood: The array is of a subclass, holds objects, or is too large.
    """
    if type(value) is not np.ndarray or value.dtype.hasobject:
        raise NotUnderstood(f"{path} is an array of Python objects, or of a class of its own")
    if value.nbytes > MOST_BYTES:
        raise NotUnderstood(
            f"{path} is a NumPy array of {value.nbytes} bytes, too many to compare on every "
            f"call (torch tensors know when they are written to)"
        )
    return _ARRAY(path, (value.shape, value.strides, value.dtype), value.tobytes())


@dataclass(frozen=True)
class _Read(Clause):
    """A clause that a reading of torch's library replaces, if the library has the reading.

    Attributes:
        reading: From the tensor to the reading.
    """

    reading: Callable[[Tensor], Reading | None] = lambda _: None

    def emit(self, code: GuardCode, condition: str, x: str, constants: Mapping[str, Any]) -> None:
        """Writes the condition as a line that the reading replaces."""
        first = code.position
        super().emit(code, condition, x, constants)
        code.read(self.reading(constants["tensor"]()), first)


@dataclass(frozen=True)
class _Object(Clause):
    """The clause that a value is this very tensor.

    `swap_tensors` can replace the implementation behind the object, where later readings read. So
    the address of the implementation is read first.
    """

    def emit(self, code: GuardCode, condition: str, x: str, constants: Mapping[str, Any]) -> None:
        """Writes the condition, and adds a reading that replaces no line."""
        super().emit(code, condition, x, constants)
        code.read(native.implementation(constants["tensor"]()), code.position)


@dataclass(frozen=True)
class _Like(Clause):
    """The clause that a value is like a tensor in all but its numbers."""

    def emit(self, code: GuardCode, condition: str, x: str, constants: Mapping[str, Any]) -> None:
        """Adds the tensor to the one comparison of tensors at the end of the predicate."""
        known = x in code.arguments
        code.need_like(x, code.arguments[x] if known else constants["tensor"]())


_LIKE, _PLAIN = _Like("like(x)"), Clause("not x.__dict__")
_PLACE = _Read("x.data_ptr() == where", reading=native.place)
_VERSION = _Read("x._version == version", reading=native.version)
_LIKE_ARGUMENT = Rule("like", _LIKE, _PLAIN)
_SAME_OBJECT = Rule("tensor where like", _Object("x is tensor()"), _PLAIN, _PLACE, _LIKE)
_SAME_VALUES = Rule(
    "tensor version where like", _Object("x is tensor()"), _PLAIN, _PLACE, _VERSION, _LIKE
)


def like(value: Any) -> Like | None:
    """A test for all facts of a tensor but its numbers; None where it would miss facts."""
    plain = (
        type(value) in PLAIN_TENSORS
        and value.layout is torch.strided
        and not value.is_inference()
        and not vars(value)
    )
    return tensor_check(value) if plain else None


def same_object(value: Tensor, like: Like, check: Check) -> Check:
    """A check for this very tensor at its place in memory; else another check decides."""
    leaf = _SAME_OBJECT("", weakref.ref(value), value.data_ptr(), like)
    return Sufficient(leaf, check, leaf.test)


def same_values(value: Tensor, like: Like, check: Check) -> Check:
    """The same for a tensor that has not been written to."""
    leaf = _SAME_VALUES("", weakref.ref(value), value._version, value.data_ptr(), like)
    return Sufficient(leaf, check, leaf.test)


def like_argument(like: Like, check: Check) -> Check:
    """A check for an argument like a tensor; else another check decides."""
    leaf = _LIKE_ARGUMENT("", like)
    return Sufficient(leaf, check, leaf.test)
