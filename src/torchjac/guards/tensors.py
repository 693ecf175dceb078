"""Checks of tensors in one look, which mostly suffices; what does not pass is looked at closely.

A guard runs on every call, and most of what it looks at is tensors. Their attributes read one by
one, through a function each, take five times as long.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchjac._torch.state import PLAIN_TENSORS
from torchjac._torch.tensor_guards import tensor_check
from torchjac.guards.builder import Check, Mismatch, Seen
from torchjac.guards.predicate import GuardCode, inlined


def looked_at(value: Any) -> Callable[[Any], bool] | None:
    """A test in one look for what a tensor is; None where that does not show everything."""
    simple = (
        type(value) in PLAIN_TENSORS
        and value.layout is torch.strided
        and not value.is_inference()
        and not vars(value)
    )
    return tensor_check(value) if simple else None


def the_same(
    value: Tensor, like: Callable[[Any], bool], number: int, versioned: bool, inner: Check
) -> Check:
    """A check that this very tensor is there, as it was.

    Args:
        value: The tensor.
        like: A test for what it is.
        number: What it is noted under.
        versioned: Whether it must not have been written to.
        inner: Says what changed.
    """
    place, version = value.data_ptr(), value._version
    expected: Any = weakref.ref(value)

    def check(new: Any, seen: Seen) -> Mismatch | None:
        seen[number] = new
        if (
            new is expected()
            and (not versioned or new._version == version)
            and new.data_ptr() == place
            and not new.__dict__
            and like(new)
        ):
            return None
        return inner(new, seen)

    def form(lines: GuardCode, given: str) -> None:
        x, known = lines.let(given), lines.hold(expected)
        lines.note(number, x)
        lines.need(f"{x} is {known}()", f"not {x}.__dict__")
        lines.need_place(x, expected(), versioned)
        lines.need_like(x, expected())

    return inlined(check, form)


def alike(like: Callable[[Any], bool], inner: Check) -> Check:
    """A check that an argument is a tensor like another one.

    Args:
        like: A test for that.
        inner: Says what changed, if it matters.
    """

    def check(new: Any, seen: Seen) -> Mismatch | None:
        if isinstance(new, Tensor) and not new.__dict__ and like(new):
            return None
        return inner(new, seen)

    def form(lines: GuardCode, given: str) -> None:
        lines.need(f"not {given}.__dict__")
        lines.need_like(given, lines.arguments[given])

    return inlined(check, form)
