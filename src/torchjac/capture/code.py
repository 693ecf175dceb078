"""Watching what Python code reads: functions, methods, classes, objects, modules."""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections import namedtuple
from typing import Any

import torch

from torchjac.capture.exact import NotUnderstood, shown
from torchjac.capture.reads import VOLATILE_BUILTINS, is_trusted, is_volatile, reads
from torchjac.capture.watch import Check, Mismatch, Policy, Seen, Watcher

ROOT = "the function"

_ACCESSORS = (type(vars(namedtuple("_One", "x"))["x"]), torch.Generator)
_UNSET = object()


class CodeWatcher(Watcher):
    """Builds checks of everything that a function can read.

    Which attributes of objects and modules are read is known by their names: the names in all code
    that is reached. That set grows while code is walked, so a walk is repeated until it does not.

    Attributes:
        names: Names in the code that earlier walks reached.
        found: Names in the code that this walk reached.
    """

    def __init__(self, policy: Policy, names: frozenset[str]):
        super().__init__(policy)
        self.names = names
        self.found: set[str] = set()
        self.kinds = [
            *self.kinds,
            (types.FunctionType, self._function),
            (types.MethodType, self._method),
            (types.ModuleType, self._module),
            ((types.BuiltinFunctionType, types.MethodWrapperType), self._builtin_method),
            ((staticmethod, classmethod), lambda v, p: self._parts(v, p, ("__func__",))),
            (property, lambda v, p: self._parts(v, p, ("fget", "fset", "fdel"))),
            (functools.cached_property, lambda v, p: self._parts(v, p, ("func",))),
            (functools._lru_cache_wrapper, lambda v, p: self._parts(v, p, ("__wrapped__",))),
            (_ACCESSORS, identical),
            (weakref.ReferenceType, self._reference),
        ]

    def _function(self, value: types.FunctionType, path: str) -> Check:
        code, trusted = value.__code__, is_trusted(value.__globals__.get("__name__"))
        if trusted and _is_public(value):
            return identical(value, path)
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

        return check

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
                held = _held(cell)
                if test is None or held is _UNSET:
                    if (test is None) is not (held is _UNSET):
                        return Mismatch(f"closure variable {name}{of} was set or deleted")
                    continue
                mismatch = test(held, seen)
                if mismatch is not None:
                    return mismatch
            return None

        return check

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

        return check

    def _globals(self, function: types.FunctionType, by: str) -> Check:
        space, found = function.__globals__, reads(function.__code__)
        here, absent = [], []
        for name in found.variables:
            if name in space:
                here.append((name, self.value(space[name], f"global {name}{by}")))
            elif name in VOLATILE_BUILTINS:
                raise NotUnderstood(f"{name}{by} reads what lies outside of the program")
            else:
                absent.append(name)  # a builtin, or an error when it is read
        imports = []
        for name in found.imports:
            if name in sys.modules:
                imports.append((name, self.value(sys.modules[name], f"module {name}{by}")))
            elif not is_trusted(name):
                raise NotUnderstood(f"the function itself imports module {name}{by}")

        def check(new: Any, seen: Seen) -> Mismatch | None:
            space = new.__globals__
            for name, inner in here:
                if name not in space:
                    return Mismatch(f"global {name}{by} was deleted")
                mismatch = inner(space[name], seen)
                if mismatch is not None:
                    return mismatch
            for name in absent:
                if name in space:
                    return Mismatch(f"global {name}{by} was defined")
            for name, inner in imports:
                mismatch = inner(sys.modules.get(name), seen)
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
        same = self.same_class(value, path)
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

        return check

    def _module(self, value: types.ModuleType, path: str) -> Check:
        """A Python module: those that are trusted do not change, of others what code names."""
        space = vars(value)
        for module in (value, *(space[n] for n in self.names if n in space)):
            if isinstance(module, types.ModuleType) and is_volatile(module.__name__):
                raise NotUnderstood(
                    f"{path}: {module.__name__} reads what lies outside of the program, or gives "
                    f"another value on every call"
                )
        if is_trusted(value.__name__):
            return identical(value, path)
        names = self.names
        inner = self.attributes(space, path, lambda name: name in names)
        expected = weakref.ref(value)

        def check(new: Any, seen: Seen) -> Mismatch | None:
            if new is not expected():
                return Mismatch(f"{path} is another module now: {shown(new)}")
            return inner(vars(new), seen)

        return check


def identical(value: Any, path: str) -> Check:
    """A check that this very object is still there; only for what lives as long as the program."""

    def check(new: Any, seen: Seen) -> Mismatch | None:
        return None if new is value else Mismatch(f"{path} was replaced: {shown(new)}")

    return check


def _held(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _UNSET


def _is_public(function: types.FunctionType) -> bool:
    """Whether a function is found in its module under its own name."""
    found: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is function
