"""Rollback of the values that a function assigns while it is traced.

A trace is no run of the user's. If a function stores a tensor (`self.last = x`), or counts its
calls, the next real run would meet the values of the trace.
"""

from __future__ import annotations

import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torchjac.call import Call
from torchjac.guards.builder import Policy
from torchjac.guards.bytecode import is_trusted, reads
from torchjac.guards.checks import All
from torchjac.guards.functions import ROOT
from torchjac.guards.objects import ObjectBuilder, slots_of
from torchjac.guards.rules import Check

PutBack = Callable[[], None]
_UNSET = object()


def restoring(call: Call) -> Callable[[], AbstractContextManager[None]]:
    """Rolls attributes, items, closure and global variables back that a function assigns to.

    These are the values that a guard of the function would walk, up to `_MOST`. State that an
    object hides in C stays changed.

    Returns:
        Makes a context, any number of times, in which to evaluate the function. At its end all
        values are those of now.
    """
    met, names = _met(call)
    actions = [action for value in met for action in _actions(value, names)]

    @contextmanager
    def restored() -> Iterator[None]:
        try:
            yield
        finally:
            for action in actions:
                action()

    return restored


# Values that are walked; values behind these stay changed.
_MOST = 10_000
_NOTHING = All(())


class _Collector(ObjectBuilder):
    """Walks on behind values that no guard would accept.

    Attributes:
        walked: Number of values in this and earlier walks.
    """

    def __init__(self, policy: Policy, names: frozenset[str], walked: int):
        super().__init__(policy, names)
        self.walked = walked

    def refuse(self, reason: str) -> None:
        """Walks on."""

    def value(self, value: Any, path: str) -> Check:
        """Walks a value. Nobody uses the check."""
        self.walked += 1
        if self.walked > _MOST:
            return _NOTHING
        if isinstance(value, set):
            self.alive.append(value)
        try:
            return super().value(value, path)
        except Exception:  # code of a user's objects runs here (properties, `==`)
            return _NOTHING


def _met(call: Call) -> tuple[list[Any], frozenset[str]]:
    """The objects that code can reach, and the names in the code."""
    names: frozenset[str] = frozenset()
    walked = 0
    while True:
        collector = _Collector(Policy(), names, walked)
        collector.value(call.function, ROOT)
        collector.value(list(call.args), "args")
        collector.value(call.kwargs, "kwargs")
        if collector.reached <= names or collector.walked > _MOST:
            met, collector.alive = collector.alive, []
            return met, names
        names |= collector.reached
        walked = collector.walked


def _actions(value: Any, names: frozenset[str]) -> list[PutBack]:
    if isinstance(value, types.FunctionType):
        return [*map(_cell, value.__closure__ or ()), _items(vars(value)), *_globals(value)]
    if isinstance(value, types.ModuleType):
        return [_module(value, names)] if not is_trusted(value.__name__) else []
    if isinstance(value, type):
        return [_class(value)] if not is_trusted(value.__module__) else []
    actions = [_slot(value, slot) for slot in slots_of(type(value))]
    if isinstance(value, dict):
        actions.append(_items(value))
    elif isinstance(value, (list, deque, set)):
        actions.append(_sequence(value))
    space = getattr(value, "__dict__", None)
    return [*actions, _items(space)] if isinstance(space, dict) else actions


def _items(space: dict[Any, Any]) -> PutBack:
    saved, kind = dict(space), OrderedDict if isinstance(space, OrderedDict) else dict

    def put_back() -> None:
        if not _same(list(space), list(saved)) or not _same(space.values(), saved.values()):
            kind.clear(space)
            kind.update(space, saved)

    return put_back


def _sequence(value: Any) -> PutBack:
    saved = list(value)
    kind: Any = next(k for k in (list, deque, set) if isinstance(value, k))
    add = set.update if kind is set else kind.extend

    def put_back() -> None:
        if not _same(value, saved):
            kind.clear(value)
            add(value, saved)

    return put_back


def _slot(value: Any, slot: Any) -> PutBack:
    """Puts a slot back, past any `__setattr__` of the class."""

    def held() -> Any:
        try:
            return slot.__get__(value)
        except AttributeError:
            return _UNSET

    saved = held()

    def put_back() -> None:
        if held() is saved:
            return
        if saved is _UNSET:
            slot.__delete__(value)
        else:
            slot.__set__(value, saved)

    return put_back


def _module(module: types.ModuleType, names: frozenset[str]) -> PutBack:
    """Puts the variables of a module back that code names, but for imported modules."""
    space = vars(module)
    saved = {name: space.get(name, _UNSET) for name in names}

    def put_back() -> None:
        for name, value in saved.items():
            now = space.get(name, _UNSET)
            if now is value or isinstance(now, types.ModuleType):
                continue
            if value is _UNSET:
                del space[name]
            else:
                space[name] = value

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
