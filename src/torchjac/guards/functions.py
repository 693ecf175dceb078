"""Checks of Python code: functions, methods, and cached results."""

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

from torchjac.guards.builder import Policy
from torchjac.guards.bytecode import (
    BYTECODE,
    VOLATILE_BUILTINS,
    escapes,
    is_trusted,
    is_trusted_code,
    reads,
)
from torchjac.guards.checks import All, At, Compound, Constants, Parts
from torchjac.guards.constants import NotUnderstood
from torchjac.guards.lru_caches import cached_results
from torchjac.guards.python_modules import ModuleBuilder
from torchjac.guards.rules import (
    ATTRIBUTE,
    ITEM,
    NAMESPACE,
    OF_CLASS,
    TYPE,
    Access,
    Check,
    Clause,
    Rule,
    identical,
    same_class,
)

ROOT = "the function"

_ACCESSORS = (type(vars(namedtuple("_One", "x"))["x"]), torch.Generator)
_UNSET = object()
_OF_MEMBERS = frozenset({"__objclass__", "_sort_order_"})


def _builtins_of(space: dict[str, Any]) -> dict[str, Any]:
    """The builtins of code with these global variables."""
    known = space.get("__builtins__", builtins)
    return vars(known) if isinstance(known, types.ModuleType) else known


def _referent(value: Any) -> Any:
    return value() if isinstance(value, weakref.ref) else value


def _held(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _UNSET


_IS_FUNCTION = Clause(
    "type(x) is FunctionType", "{path} is no longer a Python function but {shown(x)}"
)
# A function that is defined anew has equal code, in another object. The predicate compares objects.
_SAME_CODE = Clause(
    "x.__code__ == code",
    "{path} is another function now, or its code was replaced",
    strict="x.__code__ is code",
)
_NUMBER = "the number of default arguments{of} changed"
_FUNCTION = Rule(
    "code of",
    _IS_FUNCTION,
    _SAME_CODE,
    Clause("not (x.__defaults__ or x.__kwdefaults__)", _NUMBER),
    FunctionType=types.FunctionType,
)
_FUNCTION_WITH_DEFAULTS = Rule(
    "code of positional keywords",
    _IS_FUNCTION,
    _SAME_CODE,
    Clause("len(x.__defaults__ or ()) == positional", _NUMBER),
    Clause("len(x.__kwdefaults__ or ()) == keywords", _NUMBER),
    FunctionType=types.FunctionType,
)
_CELL = Access("x[key].cell_contents", of="x.__closure__")
_CELL_IF_SET = Access("held(x[key])", of="x.__closure__", held=_held)
_IS_UNSET = Rule("unset", Clause("x is unset", "{path} was set"))
_DEFAULT = Access("x[key]", of="x.__defaults__")
_KEYWORD_DEFAULT = Access("x.get(key, unset)", of="x.__kwdefaults__", unset=_UNSET)
_GLOBAL = Access("x[key]", of="x.__globals__")
_DEFINED = Access("(key in x)", of="x.__globals__", label="whether there is a global {key}{path}")
_BUILTIN = Access(
    "x.get(key, unset)",
    of="builtins_of(x.__globals__)",
    builtins_of=_builtins_of,
    unset=_UNSET,
)
_IMPORTED = Access("modules.get(key)", modules=sys.modules)
_RESULTS = Access("results(x)", results=cached_results)
_REFERENT = Access("referent(x)", referent=_referent)
_MEMBER = Rule(
    "cls name number", OF_CLASS, Clause("id(x) == number", "{path} changed to {shown(x)}")
)


class FunctionBuilder(ModuleBuilder):
    """Builds checks of functions.

    Attributes:
        caches: Functions with a cache, and the number of results that they had computed.
    """

    def __init__(self, policy: Policy, names: frozenset[str]):
        super().__init__(policy, names)
        self.caches: list[tuple[weakref.ref[Any], int]] = []
        self.kinds += [
            (types.FunctionType, self._function),
            (types.MethodType, self._method),
            ((types.BuiltinFunctionType, types.MethodWrapperType), self._builtin_method),
            ((staticmethod, classmethod), lambda v, p: self._parts(v, p, ("__func__",))),
            (property, lambda v, p: self._parts(v, p, ("fget", "fset", "fdel"))),
            (functools.cached_property, lambda v, p: self._parts(v, p, ("func",))),
            (functools._lru_cache_wrapper, self._cached),
            (_ACCESSORS, identical),
            (weakref.ReferenceType, self._reference),
        ]

    def value(self, value: Any, path: str) -> Check:
        """A check of the value at a path."""
        if isinstance(value, enum.Enum) and not is_trusted(type(value).__module__):
            self.counted(path)
            return self.remember(value, path, self._member)
        return super().value(value, path)

    def _member(self, value: enum.Enum, path: str) -> Check:
        """A check of a member of an enumeration. Its class may have methods."""
        kind = self.remember(type(value), f"the class of {path}", self.class_of_instances)
        space = self.attributes(vars(value), path, lambda name: name not in _OF_MEMBERS)
        cls = type(value)
        # By id: the member lives as long as its class.
        leaf = _MEMBER(path, weakref.ref(cls), cls.__name__, id(value))
        return Compound(leaf, [At(TYPE, kind), At(NAMESPACE, space)])

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
        checks = [*self._cells(value, of), *self._defaults(value, of)]
        if value.__dict__:
            checks.append(At(NAMESPACE, self.attributes(vars(value), path)))
        if not trusted:
            self.reached |= reads(code).names
            checks += self._globals(value, "" if path == ROOT else f" (read by {path})")
        defaults = len(value.__defaults__ or ()), len(value.__kwdefaults__ or ())
        if any(defaults):
            return Compound(_FUNCTION_WITH_DEFAULTS(path, code, of, *defaults), checks)
        return Compound(_FUNCTION(path, code, of), checks)

    def _cells(self, function: types.FunctionType, of: str) -> list[Check]:
        """Checks of the closure variables."""
        names, cells = function.__code__.co_freevars, function.__closure__ or ()
        held: dict[int, Check] = {}
        unset: dict[int, Check] = {}
        for k, (name, cell) in enumerate(zip(names, cells, strict=True)):
            value = _held(cell)
            if value is _UNSET:
                unset[k] = _IS_UNSET(f"closure variable {name}{of}", _UNSET)
            else:
                held[k] = self._cell(name, value, of)
        checks: list[Check] = []
        if held:
            absent = f"closure variable {{key}}{of} was deleted"
            labels = [names[k] for k in held]
            checks.append(Parts(_CELL, [*held], [*held.values()], absent, labels))
        if unset:
            checks.append(Parts(_CELL_IF_SET, [*unset], [*unset.values()]))
        return checks

    def _cell(self, name: str, value: Any, of: str) -> Check:
        if name == "__class__":  # for `super()`: the class stays the same
            return self.remember(value, f"the class around{of or ' it'}", self.class_of_instances)
        return self.value(value, f"closure variable {name}{of}")

    def class_of_instances(self, value: type, path: str) -> Check:
        """A check of a class that code does not call; subclasses know how."""
        raise NotUnderstood(f"{path} is a class")

    def _defaults(self, function: types.FunctionType, of: str) -> list[Check]:
        """Checks of the default arguments."""
        code, values = function.__code__, function.__defaults__ or ()
        names = code.co_varnames[code.co_argcount - len(values) : code.co_argcount]
        keywords = function.__kwdefaults__ or {}
        checks: list[Check] = []
        if values:
            pairs = zip(names, values, strict=True)
            inner = [self.value(v, f"default argument {n}{of}") for n, v in pairs]
            checks.append(Parts(_DEFAULT, range(len(values)), inner))
        if keywords:
            inner = [self.value(v, f"default argument {n}{of}") for n, v in keywords.items()]
            checks.append(Parts(_KEYWORD_DEFAULT, [*keywords], inner))
        return checks

    def _globals(self, function: types.FunctionType, by: str) -> list[Check]:
        """Checks of the global variables, builtins and modules that code names."""
        space, code = function.__globals__, reads(function.__code__)
        here = [name for name in code.variables if name in space]
        absent = [name for name in code.variables if name not in space]
        known = _builtins_of(space)
        values = [
            self.variable(space[name], f"global {name}{by}", code.used[name]) for name in here
        ]
        for name in absent:
            if name in VOLATILE_BUILTINS:
                self.refuse(f"{name}{by} reads what lies outside of the program")
        checks: list[Check] = []
        if here:
            checks.append(Parts(_GLOBAL, here, values, f"global {{key}}{by} was deleted"))
        if absent:
            undefined = [False] * len(absent)
            checks.append(Constants(_DEFINED, absent, undefined, [bool] * len(absent), by))
            inner = [self._builtin(known, name, by) for name in absent]
            checks.append(Parts(_BUILTIN, absent, inner))
        imports = self._imports(function, by)
        if imports:
            checks.append(Parts(_IMPORTED, [*imports], [*imports.values()]))
        return checks

    def _builtin(self, known: dict[str, Any], name: str, by: str) -> Check:
        """A check of a name that is not global: of a builtin, or that there is none."""
        value = known.get(name, _UNSET)
        path = f"builtin {name}{by}"
        if value is _UNSET or getattr(value, "__module__", None) == "builtins":
            return identical(value, path)
        return self.value(value, path)

    def _imports(self, function: types.FunctionType, by: str) -> dict[str, Check]:
        """Checks of the modules that a function imports while it runs, and of their packages."""
        package = function.__globals__.get("__package__")
        names: dict[str, None] = {}
        for name in reads(function.__code__).imports:
            if name[:1] in (".", "?") and (not package or name[:1] == "?"):
                self.refuse(f"relative import {name}{by}, of a package that is not known")
                continue
            parts = importlib.util.resolve_name(name, package).split(".")
            names.update(dict.fromkeys(".".join(parts[: i + 1]) for i in range(len(parts))))
        checks = {}
        for name in names:
            if name in sys.modules:
                checks[name] = self.value(sys.modules[name], f"module {name}{by}")
            elif not is_trusted(name):
                self.refuse(f"the function itself imports module {name}{by}")
        return checks

    def _cached(self, value: Any, path: str) -> Check:
        """A check of a cached function: of the function, and of the results in the cache.

        Further results do not matter: the function, as it was, asked for none of these.
        """
        if is_trusted(getattr(value, "__module__", None)) and _is_public(value):
            return identical(value, path)
        function = self._parts(value, path, ("__wrapped__",))
        self.caches.append((weakref.ref(value), value.cache_info().misses))
        results = cached_results(value)
        if results is None:
            self.refuse(f"{path} is a cache whose results cannot be seen")
        paths = f"an argument of {path}", f"a result of {path}"
        pairs = [
            Parts(ITEM, (0, 1), [self.value(v, p) for v, p in zip(pair, paths, strict=True)])
            for pair in (results or {}).values()
        ]
        inner = Parts(ITEM, [*(results or {})], pairs, f"{path} has forgotten a result")
        return All([function, At(_RESULTS, inner)])

    def _method(self, value: types.MethodType, path: str) -> Check:
        return self._parts(value, path, ("__func__", "__self__"))

    def _builtin_method(self, value: Any, path: str) -> Check:
        return self._parts(value, path, ("__name__", "__self__"))

    def _reference(self, value: Any, path: str) -> Check:
        return At(_REFERENT, self.value(value(), f"{path}()"))

    def _parts(self, value: Any, path: str, names: tuple[str, ...]) -> Check:
        """A check of an object that is no more than these attributes."""
        paths = {"__func__": path, "__wrapped__": path, "func": path}
        checks = [self.value(getattr(value, n), paths.get(n, f"{path}.{n}")) for n in names]
        return Compound(same_class(value, path), [Parts(ATTRIBUTE, names, checks)])


def _is_public(function: Any) -> bool:
    """Whether a function is an attribute of a trusted module, under its own name."""
    if not is_trusted(function.__module__):
        return False
    attribute: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        attribute = getattr(attribute, name, None)
    return attribute is function
