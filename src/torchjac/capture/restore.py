"""Putting back what a function assigns while it is traced.

A traced function runs on tensors without values. If it keeps one (`self.last = x`), or counts its
calls, its next real run would find what the trace left behind.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torchjac.capture.code import ROOT
from torchjac.capture.exact import NotUnderstood
from torchjac.capture.function import Call
from torchjac.capture.objects import ObjectWatcher
from torchjac.capture.reads import is_trusted, reads
from torchjac.capture.watch import Check, Policy

PutBack = Callable[[], None]
_UNSET = object()


@contextmanager
def restored(call: Call) -> Iterator[None]:
    """Attributes, items, closure and global variables are put back that a function assigns to.

    Of everything that the function can be seen to read; what an object hides in C stays as it is.
    """
    actions = [action for value in _met(call) for action in _actions(value)]
    try:
        yield
    finally:
        for action in actions:
            action()


class _Collector(ObjectWatcher):
    """Walks on where something is not understood."""

    def value(self, value: Any, path: str) -> Check:
        """A check that is not used; what matters is what was met."""
        try:
            return super().value(value, path)
        except (NotUnderstood, AttributeError):
            return lambda new, seen: None


def _met(call: Call) -> list[Any]:
    names: frozenset[str] = frozenset()
    while True:
        collector = _Collector(Policy(), names)
        collector.value(call.function, ROOT)
        collector.value(list(call.args), "args")
        collector.value(call.kwargs, "kwargs")
        if collector.found <= names:
            met, collector.alive = collector.alive, []
            return met
        names |= collector.found


def _actions(value: Any) -> list[PutBack]:
    if isinstance(value, dict):
        return [_items(value)]
    if isinstance(value, (list, deque)):
        return [_sequence(value)]
    if isinstance(value, types.FunctionType):
        return [*map(_cell, value.__closure__ or ()), _items(vars(value)), *_globals(value)]
    if isinstance(value, types.ModuleType):
        return []  # what code assigns to is among the globals of that code
    if isinstance(value, type):
        return [_class(value)] if not is_trusted(value.__module__) else []
    return [_items(vars(value))] if isinstance(getattr(value, "__dict__", None), dict) else []


def _items(space: dict[Any, Any]) -> PutBack:
    saved = dict(space)

    def put_back() -> None:
        if not _same(list(space), list(saved)) or not _same(space.values(), saved.values()):
            space.clear()
            space.update(saved)

    return put_back


def _sequence(value: Any) -> PutBack:
    saved = list(value)

    def put_back() -> None:
        if not _same(value, saved):
            value.clear()
            value.extend(saved)

    return put_back


def _cell(cell: types.CellType) -> PutBack:
    def held() -> Any:
        try:
            return cell.cell_contents
        except ValueError:
            return _UNSET

    saved = held()

    def put_back() -> None:
        if held() is not saved and saved is not _UNSET:
            cell.cell_contents = saved

    return put_back


def _globals(function: types.FunctionType) -> list[PutBack]:
    space = function.__globals__
    if is_trusted(space.get("__name__")):
        return []
    saved = {name: space.get(name, _UNSET) for name in reads(function.__code__).assigned}

    def put_back() -> None:
        for name, value in saved.items():
            if value is _UNSET:
                space.pop(name, None)
            elif space.get(name) is not value:
                space[name] = value

    return [put_back] if saved else []


def _class(cls: type) -> PutBack:
    saved = dict(vars(cls))

    def put_back() -> None:
        for name in [n for n in vars(cls) if n not in saved]:
            delattr(cls, name)
        for name, value in saved.items():
            if vars(cls).get(name) is not value:
                setattr(cls, name, value)

    return put_back


def _same(new: Any, old: Any) -> bool:
    return len(new) == len(old) and all(a is b for a, b in zip(new, old, strict=True))
