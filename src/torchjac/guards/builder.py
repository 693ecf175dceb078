"""Watching a Python value: a test that says what changed in anything that hangs on it.

A `GuardBuilder` walks a value once and builds the test from closures. The test walks the *current*
value again from the top, so it holds nothing alive: tensors and classes are known by weak
references, containers and objects by what is in them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from torchjac._torch.state import PLAIN_TENSORS, is_wrapped
from torchjac.guards.constants import NotUnderstood, exact, is_flat, shown
from torchjac.guards.predicate import GuardCode, inlined

What = Literal["values", "objects", "shapes"]
Seen = dict[int, Any]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Something that is not as it was.

    Attributes:
        reason: What changed, from what to what.
        final: Whether it can never be as it was again.
    """

    reason: str
    final: bool = False


Check = Callable[[Any, Seen], Mismatch | None]


@dataclass(frozen=True, slots=True)
class Policy:
    """What of a module's tensors matters.

    Attributes:
        parameters: `values`: a parameter that is replaced or written to is a change. `objects`:
            one that is replaced. `shapes`: only its shape, strides, dtype, device and whether it
            requires gradients count.
        buffers: The same for the buffers of modules.
    """

    parameters: What = "values"
    buffers: What = "values"


# More than this would cost milliseconds on every call.
MOST_CHECKS = 20_000
# NumPy arrays have no version: their bytes are compared (64 KiB: 3 us).
MOST_BYTES = 1 << 16
# Tensors of inference mode have no version either.
MOST_ELEMENTS = 1 << 12


class GuardBuilder:
    """Builds checks; knows what it has met.

    Attributes:
        policy: What of a module's tensors matters.
        count: Number of checks so far.
        alive: What was met, but for what is compared as a value.
        kinds: Other types that somebody knows how to watch, with what builds their check.
    """

    def __init__(self, policy: Policy):
        self.policy = policy
        self.count = 0
        self.kinds: list[tuple[type | tuple[type, ...], Callable[[Any, str], Check]]] = [
            (Tensor, self._tensor),
            (np.ndarray, self._array),
        ]
        self._met: dict[int, tuple[int, str]] = {}
        self.alive: list[Any] = []

    def value(self, value: Any, path: str) -> Check:
        """A check that the value at this path is as it is now.

        Raises:
            NotUnderstood: It cannot be seen whether it changes.
        """
        self.counted(path)
        try:
            same = exact(value)
        except NotUnderstood as reason:
            raise NotUnderstood(f"{path}: {reason}") from None
        if same is not None:
            return _exactly(value, same, path)
        return self.remember(value, path, self._of)

    def remember(self, value: Any, path: str, make: Callable[[Any, str], Check]) -> Check:
        """A check of an object that may be met again, within itself or elsewhere."""
        if id(value) in self._met:
            return self._again(value, path)
        number = len(self._met)
        self._met[id(value)] = number, path
        self.alive.append(value)  # or its id could be given to another object
        return self.noted(number, value, make(value, path))

    def noted(self, number: int, value: Any, inner: Check) -> Check:
        """A check that also notes under a number what it was given."""

        def check(new: Any, seen: Seen) -> Mismatch | None:
            seen[number] = new
            return inner(new, seen)

        def form(lines: GuardCode, place: str) -> None:
            x = lines.let(place)
            lines.note(number, x)
            lines.need_check(inner, x)

        return inlined(check, form)

    def counted(self, path: str) -> None:
        """Counts one check.

        Raises:
            NotUnderstood: There are too many.
        """
        self.count += 1
        if self.count > MOST_CHECKS:
            raise NotUnderstood(f"{path}: more than {MOST_CHECKS} values would have to be checked")

    def attributes(self, value: dict[str, Any], path: str, only: Only = None) -> Check:
        """A check of a namespace: which names there are and what they hold."""
        found = _named(value, only)
        flat = {k: v for k, v in found.items() if is_flat(v)}
        names, values = tuple(flat), tuple(flat.values())
        kinds = tuple(map(type, values))
        self.count += len(flat)
        others = [(k, self.value(v, f"{path}.{k}")) for k, v in found.items() if k not in flat]
        keys, named = list(value), list(found)

        def check(new: dict[str, Any], seen: Seen) -> Mismatch | None:
            if list(new) != keys and list(_named(new, only)) != named:
                return other_names(path, named, list(_named(new, only)))
            got = tuple([new[name] for name in names])
            if tuple(map(type, got)) != kinds or got != values:
                return _first_change(path, names, values, got)
            for name, inner in others:
                mismatch = inner(new[name], seen)
                if mismatch is not None:
                    return mismatch
            return None

        def form(lines: GuardCode, place: str) -> None:
            x = lines.let(place)
            lines.need(f"list({x}) == {lines.hold(keys)}")
            for name, held in flat.items():
                lines.need_value(f"{x}[{name!r}]", held)
            for name, inner in others:
                lines.need_check(inner, f"{x}[{name!r}]")

        return inlined(check, form)

    def same_class(self, value: Any, path: str) -> Callable[[Any], Mismatch | None]:
        """A check that a value is still of the same class."""
        cls = type(value)
        expected = weakref.ref(cls)
        name = cls.__name__

        def check(new: Any) -> Mismatch | None:
            if type(new) is expected():
                return None
            return Mismatch(f"{path} changed from an object of type {name} to {shown(new)}")

        return check

    def _of(self, value: Any, path: str) -> Check:
        for kinds, make in self.kinds:
            if isinstance(value, kinds):
                return make(value, path)
        raise NotUnderstood(f"{path} is an object of type {type(value).__name__}")

    def _again(self, value: Any, path: str) -> Check:
        """The same object in a second place (or within itself)."""
        number, first = self._met[id(value)]

        def check(new: Any, seen: Seen) -> Mismatch | None:
            if number in seen and seen[number] is new:
                return None
            return Mismatch(f"{path} and {first} are no longer the same object")

        return inlined(check, lambda lines, place: lines.need(f"{place} is {lines.noted(number)}"))

    def _array(self, value: Any, path: str) -> Check:
        if type(value) is not np.ndarray or value.dtype.hasobject:
            raise NotUnderstood(f"{path} is an array of Python objects, or of a class of its own")
        if value.nbytes > MOST_BYTES:
            raise NotUnderstood(
                f"{path} is a NumPy array of {value.nbytes} bytes, too many to compare on every "
                f"call (torch tensors know when they are written to)"
            )
        layout, content = (value.shape, value.strides, value.dtype), value.tobytes()

        def check(new: Any, seen: Seen) -> Mismatch | None:
            if type(new) is not np.ndarray:
                return Mismatch(f"{path} changed from a NumPy array to {shown(new)}")
            if (new.shape, new.strides, new.dtype) != layout:
                return Mismatch(f"the shape, strides or dtype of {path} changed")
            return None if new.tobytes() == content else Mismatch(f"the values of {path} changed")

        return check

    def _tensor(self, value: Tensor, path: str) -> Check:
        return self.tensor(value, path, self.matters(value))

    def matters(self, value: Tensor) -> What:
        """What of a tensor matters; a subclass may know more."""
        return self.policy.parameters if isinstance(value, nn.Parameter) else "values"

    def tensor(self, value: Tensor, path: str, what: What) -> Check:
        """A check of a tensor: of its shape, and where `values` are asked for, of them."""
        if type(value) not in PLAIN_TENSORS or is_wrapped(value):
            raise NotUnderstood(f"{path} is a tensor of type {type(value).__name__}")
        if what == "shapes":
            return _shape(value, path)
        if what == "values" and value.is_inference():
            return _content(value, path)
        dense, version, expected = value.layout is torch.strided, value._version, weakref.ref(value)
        state = _shape(value, path) if what == "objects" else _state(value, dense)

        def check(new: Any, seen: Seen) -> Mismatch | None:
            old = expected()
            if old is None or new is not old:
                return Mismatch(f"{path} was replaced: {shown(new)}", final=old is None)
            if callable(state):
                return state(new, seen)
            if new._version != version:
                return Mismatch(f"{path} was written to in place", final=True)
            if _state(new, dense) != state:
                return Mismatch(f"the data, shape, dtype or device of {path} changed")
            return None

        return check


Only = Callable[[str], bool] | None


def _named(value: dict[str, Any], only: Only) -> dict[str, Any]:
    return value if only is None else {k: v for k, v in value.items() if only(k)}


def _exactly(value: Any, same: Callable[[Any], bool], path: str) -> Check:
    old = shown(value)

    def check(new: Any, seen: Seen) -> Mismatch | None:
        return None if same(new) else Mismatch(f"{path} changed from {old} to {shown(new)}")

    def form(lines: GuardCode, place: str) -> None:
        if is_flat(value):
            lines.need_value(place, value)
        elif type(value) in (set, frozenset) and not value:
            lines.need_empty(place, type(value))
        else:
            lines.need(f"{lines.hold(same)}({place})")

    return inlined(check, form)


def _state(value: Tensor, dense: bool) -> tuple[Any, ...]:
    """All of a tensor that may change without its version."""
    if not dense:
        return value.shape, value.dtype, value.device, value.layout, value.requires_grad
    return (
        value.data_ptr(),
        value.shape,
        value.stride(),
        value.dtype,
        value.device,
        value.requires_grad,
    )


def _shape(value: Tensor, path: str) -> Check:
    dense, kind = value.layout is torch.strided, type(value)
    state = _state(value, dense)[1 if dense else 0 :]

    def check(new: Any, seen: Seen) -> Mismatch | None:
        if type(new) is not kind or (new.layout is torch.strided) is not dense:
            return Mismatch(f"{path} changed from {kind.__name__} to {shown(new)}")
        if _state(new, dense)[1 if dense else 0 :] != state:
            return Mismatch(f"the shape, strides, dtype, device or requires_grad of {path} changed")
        return None

    return check


def _content(value: Tensor, path: str) -> Check:
    if value.numel() > MOST_ELEMENTS:
        raise NotUnderstood(
            f"{path} was made in inference mode, so it does not know when it is written to, and it "
            f"is too large to compare on every call"
        )
    copy, state = value.clone(), _state(value, True)[1:]

    def check(new: Any, seen: Seen) -> Mismatch | None:
        if type(new) is not Tensor or _state(new, True)[1:] != state or not torch.equal(new, copy):
            return Mismatch(f"{path}, a tensor made in inference mode, changed")
        return None

    return check


def _first_change(
    path: str, names: tuple[str, ...], values: tuple[Any, ...], got: tuple[Any, ...]
) -> Mismatch:
    for name, old, new in zip(names, values, got, strict=True):
        if type(old) is not type(new) or old != new:
            return Mismatch(f"{path}.{name} changed from {shown(old)} to {shown(new)}")
    raise AssertionError("called where something differs")


def other_names(path: str, old: list[str], new: list[str], what: str = "attributes") -> Mismatch:
    """Says how the names of something changed."""
    gone, come = [n for n in old if n not in new], [n for n in new if n not in old]
    parts = [f"lost {', '.join(gone[:3])}"] * bool(gone) + [f"gained {', '.join(come[:3])}"] * bool(
        come
    )
    return Mismatch(f"the {what} of {path} changed: {' and '.join(parts) or 'another order'}")
