"""Watching what Python code reads: functions, methods, and what they remember."""

from __future__ import annotations

import builtins
import enum
import functools
import importlib.util
import sys
import types
import weakref
from collections import namedtuple
from typing import Any

import torch

from torchjac.guards.builder import Check, Mismatch, Policy, Seen
from torchjac.guards.bytecode import (
    BYTECODE,
    VOLATILE_BUILTINS,
    escapes,
    is_trusted,
    is_trusted_code,
    reads,
)
from torchjac.guards.constants import NotUnderstood, shown
from torchjac.guards.lru_caches import remembered
from torchjac.guards.predicate import GuardCode, inlined
from torchjac.guards.python_modules import ModuleWatcher, identical

ROOT = "the function"

_ACCESSORS = (type(vars(namedtuple("_One", "x"))["x"]), torch.Generator)
_UNSET = object()


class CodeWatcher(ModuleWatcher):
    """Builds checks of functions.

    Attributes:
        memories: Functions that remember results, and how many they had computed.
    """

    def __init__(self, policy: Policy, names: frozenset[str]):
        super().__init__(policy, names)
        self.memories: list[tuple[weakref.ref[Any], int]] = []
        self.kinds += [
            (types.FunctionType, self._function),
            (types.MethodType, self._method),
            ((types.BuiltinFunctionType, types.MethodWrapperType), self._builtin_method),
            ((staticmethod, classmethod), lambda v, p: self._parts(v, p, ("__func__",))),
            (property, lambda v, p: self._parts(v, p, ("fget", "fset", "fdel"))),
            (functools.cached_property, lambda v, p: self._parts(v, p, ("func",))),
            (functools._lru_cache_wrapper, self._memory),
            (_ACCESSORS, identical),
            (weakref.ReferenceType, self._reference),
        ]

    def value(self, value: Any, path: str) -> Check:
        """A check that the value at this path is as it is now."""
        if isinstance(value, enum.Enum) and not is_trusted(type(value).__module__):
            self.counted(path)
            return self.remember(value, path, self._member)
        return super().value(value, path)

    def _member(self, value: enum.Enum, path: str) -> Check:
        """A member of an enumeration: there is one object, but its class may have methods."""
        kind = self.remember(type(value), f"the class of {path}", self.class_of_instances)
        space = self.attributes(vars(value), path, lambda name: name not in _OF_MEMBERS)
        same, number = self.same_class(value, path), id(value)  # it lives as long as its class

        def check(new: Any, seen: Seen) -> Mismatch | None:
            mismatch = same(new)
            if mismatch is not None:
                return mismatch
            if id(new) != number:
                return Mismatch(f"{path} changed to {shown(new)}")
            return kind(type(new), seen) or space(vars(new), seen)

        return check

    def _function(self, value: types.FunctionType, path: str) -> Check:
        code, trusted = value.__code__, is_trusted_code(value.__globals__)
        if trusted and _is_public(value):
            return identical(value, path)
        if not trusted:
            if not (BYTECODE.known or BYTECODE.holds()):
                self.refuse(f"{path} is not looked into: {BYTECODE}")
            name = escapes(reads(code).names)
            if name is not None:
                self.refuse(f"{path} uses {name}, by which it reaches what cannot be seen")
        of = "" if path == ROOT else f" of {path}"
        checks = [self._cells(value, of), self._defaults(value, of)]
        if value.__dict__:
            checks.append(self._space(value, path))
        if not trusted:
            self.found |= reads(code).names
            checks.append(self._globals(value, "" if path == ROOT else f" (read by {path})"))

        def check(new: Any, seen: Seen) -> Mismatch | None:
            if type(new) is not types.FunctionType:
                return Mismatch(f"{path} is no longer a Python function but {shown(new)}")
            if new.__code__ is not code and new.__code__ != code:
                return Mismatch(f"{path} is another function now, or its code was replaced")
            for inner in checks:
                mismatch = inner(new, seen)
                if mismatch is not None:
                    return mismatch
            return None

        def form(lines: GuardCode, place: str) -> None:
            f, kind = lines.let(place), lines.hold(types.FunctionType)
            lines.need(f"type({f}) is {kind}", f"{f}.__code__ is {lines.hold(code)}")
            for inner in checks:
                lines.need_check(inner, f)

        return inlined(check, form)

    def _space(self, function: types.FunctionType, path: str) -> Check:
        """Attributes of a function."""
        inner = self.attributes(vars(function), path, None)
        return lambda new, seen: inner(vars(new), seen)

    def _cells(self, function: types.FunctionType, of: str) -> Check:
        names = function.__code__.co_freevars
        cells = function.__closure__ or ()
        inner = [self._cell(n, _held(c), of) for n, c in zip(names, cells, strict=True)]

        def check(new: Any, seen: Seen) -> Mismatch | None:
            for name, cell, test in zip(names, new.__closure__ or (), inner, strict=True):
                try:
                    held = cell.cell_contents
                except ValueError:
                    held = _UNSET
                if test is None or held is _UNSET:
                    if (test is None) is not (held is _UNSET):
                        return Mismatch(f"closure variable {name}{of} was set or deleted")
                    continue
                mismatch = test(held, seen)
                if mismatch is not None:
                    return mismatch
            return None

        def form(lines: GuardCode, f: str) -> None:
            held = lines.let(f"{f}.__closure__") if inner else ""
            for k, test in enumerate(inner):
                assert test is not None
                lines.need_check(test, f"{held}[{k}].cell_contents")

        return check if None in inner else inlined(check, form)

    def _cell(self, name: str, held: Any, of: str) -> Check | None:
        if held is _UNSET:
            return None
        if name == "__class__":  # for `super()`: it is not made anew
            return self.remember(held, f"the class around{of or ' it'}", self.class_of_instances)
        return self.value(held, f"closure variable {name}{of}")

    def class_of_instances(self, value: type, path: str) -> Check:
        """A check of a class that is not called; a subclass may know how."""
        raise NotUnderstood(f"{path} is a class")

    def _defaults(self, function: types.FunctionType, of: str) -> Check:
        code, values = function.__code__, function.__defaults__ or ()
        names = code.co_varnames[code.co_argcount - len(values) : code.co_argcount]
        checks = [
            self.value(v, f"default argument {n}{of}") for n, v in zip(names, values, strict=True)
        ]
        keywords = function.__kwdefaults__ or {}
        named = [(n, self.value(v, f"default argument {n}{of}")) for n, v in keywords.items()]

        def check(new: Any, seen: Seen) -> Mismatch | None:
            given, keyed = new.__defaults__ or (), new.__kwdefaults__ or {}
            if not (given or keyed or checks or named):
                return None
            if len(given) != len(checks) or len(keyed) != len(named):
                return Mismatch(f"the number of default arguments{of} changed")
            for value, inner in zip(given, checks, strict=True):
                mismatch = inner(value, seen)
                if mismatch is not None:
                    return mismatch
            for name, inner in named:
                mismatch = inner(keyed.get(name, _UNSET), seen)
                if mismatch is not None:
                    return mismatch
            return None

        def form(lines: GuardCode, f: str) -> None:
            given: list[tuple[int | str, Check]] = list(enumerate(checks))
            for kind, kept in (("__defaults__", given), ("__kwdefaults__", [*named])):
                found = lines.let(f"{f}.{kind}")
                lines.need(f"len({found}) == {len(kept)}" if kept else f"not {found}")
                for key, inner in kept:
                    lines.need_check(inner, f"{found}[{key!r}]")

        return inlined(check, form)

    def _globals(self, function: types.FunctionType, by: str) -> Check:
        space, found = function.__globals__, reads(function.__code__)
        here, absent = [], []
        known = _builtins_of(space)
        for name in found.variables:
            if name in space:
                path = f"global {name}{by}"
                here.append((name, self.variable(space[name], path, found.used[name])))
            elif name in VOLATILE_BUILTINS:
                self.refuse(f"{name}{by} reads what lies outside of the program")
            else:
                absent.append((name, self._builtin(known, name, by)))
        imports = self._imports(function, by)

        def check(new: Any, seen: Seen) -> Mismatch | None:
            space = new.__globals__
            for name, inner in here:
                if name not in space:
                    return Mismatch(f"global {name}{by} was deleted")
                mismatch = inner(space[name], seen)
                if mismatch is not None:
                    return mismatch
            known = _builtins_of(space) if absent else {}
            for name, inner in absent:
                if name in space:
                    return Mismatch(f"global {name}{by} was defined")
                mismatch = inner(known.get(name, _UNSET), seen)
                if mismatch is not None:
                    return mismatch
            for name, inner in imports:
                mismatch = inner(sys.modules.get(name), seen)
                if mismatch is not None:
                    return mismatch
            return None

        def form(lines: GuardCode, f: str) -> None:
            found = lines.let(f"{f}.__globals__")
            for name, inner in here:
                lines.need_check(inner, f"{found}[{name!r}]")
            kept = lines.let(f"{lines.hold(_builtins_of)}({found})") if absent else ""
            for name, inner in absent:
                lines.need(f"{name!r} not in {found}")
                lines.need_check(inner, f"{kept}.get({name!r}, {lines.hold(_UNSET)})")
            for name, inner in imports:
                lines.need_check(inner, f"{lines.hold(sys.modules)}.get({name!r})")

        return inlined(check, form)

    def _builtin(self, known: dict[str, Any], name: str, by: str) -> Check:
        """A name that is not global: a builtin, or an error when it is read."""
        value = known.get(name, _UNSET)
        path = f"builtin {name}{by}"
        if value is _UNSET or getattr(value, "__module__", None) == "builtins":
            return identical(value, path)
        return self.value(value, path)

    def _imports(self, function: types.FunctionType, by: str) -> list[tuple[str, Check]]:
        """The modules that a function imports while it runs, each with the packages around it."""
        package = function.__globals__.get("__package__")
        names: dict[str, None] = {}
        for name in reads(function.__code__).imports:
            if name[:1] in (".", "?") and (not package or name[:1] == "?"):
                self.refuse(f"relative import {name}{by}, of a package that is not known")
                continue
            parts = importlib.util.resolve_name(name, package).split(".")
            names.update(dict.fromkeys(".".join(parts[: i + 1]) for i in range(len(parts))))
        checks = []
        for name in names:
            if name in sys.modules:
                checks.append((name, self.value(sys.modules[name], f"module {name}{by}")))
            elif not is_trusted(name):
                self.refuse(f"the function itself imports module {name}{by}")
        return checks

    def _memory(self, value: Any, path: str) -> Check:
        """What `functools.cache` keeps: its function, and the results that it will give again.

        More of them do not matter: the function as it was asked for none of those.
        """
        if is_trusted(getattr(value, "__module__", None)) and _is_public(value):
            return identical(value, path)
        function = self._parts(value, path, ("__wrapped__",))
        self.memories.append((weakref.ref(value), value.cache_info().misses))
        held = remembered(value)
        if held is None:
            self.refuse(f"{path} is a cache whose results cannot be seen")
        inner = [
            (
                key,
                self.value(given, f"what {path} is given"),
                self.value(result, f"a result of {path}"),
            )
            for key, (given, result) in (held or {}).items()
        ]

        def check(new: Any, seen: Seen) -> Mismatch | None:
            mismatch = function(new, seen)
            if mismatch is not None:
                return mismatch
            now = remembered(new) or {}
            for key, arguments, result in inner:
                if key not in now:
                    return Mismatch(f"{path} has forgotten a result")
                mismatch = arguments(now[key][0], seen) or result(now[key][1], seen)
                if mismatch is not None:
                    return mismatch
            return None

        return check

    def _method(self, value: types.MethodType, path: str) -> Check:
        return self._parts(value, path, ("__func__", "__self__"))

    def _builtin_method(self, value: Any, path: str) -> Check:
        return self._parts(value, path, ("__name__", "__self__"))

    def _reference(self, value: Any, path: str) -> Check:
        inner = self.value(value(), f"{path}()")
        return lambda new, seen: inner(new() if isinstance(new, weakref.ref) else new, seen)

    def _parts(self, value: Any, path: str, names: tuple[str, ...]) -> Check:
        """A check of an object that is no more than these attributes."""
        same, cls = self.same_class(value, path), type(value)
        kept = {"__func__": path, "__wrapped__": path, "func": path, "__self__": f"{path}.__self__"}
        parts = [(n, self.value(getattr(value, n), kept.get(n, f"{path}.{n}"))) for n in names]

        def check(new: Any, seen: Seen) -> Mismatch | None:
            mismatch = same(new)
            if mismatch is not None:
                return mismatch
            for name, inner in parts:
                mismatch = inner(getattr(new, name), seen)
                if mismatch is not None:
                    return mismatch
            return None

        def form(lines: GuardCode, place: str) -> None:
            x = lines.let(place)
            lines.need(f"type({x}) is {lines.hold(cls)}")
            for name, inner in parts:
                lines.need_check(inner, f"{x}.{name}")

        return inlined(check, form)


_OF_MEMBERS = frozenset({"__objclass__", "_sort_order_"})


def _builtins_of(space: dict[str, Any]) -> dict[str, Any]:
    """The builtins of code with these global variables."""
    found = space.get("__builtins__", builtins)
    return vars(found) if isinstance(found, types.ModuleType) else found


def _held(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _UNSET


def _is_public(function: Any) -> bool:
    """Whether a function is found in its module, one that is trusted, under its own name."""
    if not is_trusted(function.__module__):
        return False
    found: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is function
