"""Watching objects of a user's classes, the classes themselves, and `nn.Module`s."""

from __future__ import annotations

import abc
import functools
import logging
import threading
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from torchjac._torch.state import GLOBAL_HOOKS, SAVING_HOOKS, tree_functions
from torchjac.guards.builder import Check, Mismatch, Policy, Seen, What
from torchjac.guards.bytecode import computed, is_trusted, is_volatile
from torchjac.guards.constants import NotUnderstood, shown
from torchjac.guards.functions import CodeWatcher
from torchjac.guards.predicate import GuardCode, inlined
from torchjac.guards.python_modules import identical
from torchjac.guards.tensors import looked_at, the_same

# Names in a class that no derivative depends on.
_NOT_READ = frozenset(
    {
        "__abstractmethods__",
        "__annotations__",
        "__copy__",
        "__dataclass_fields__",
        "__dataclass_params__",
        "__deepcopy__",
        "__del__",
        "__dict__",
        "__doc__",
        "__firstlineno__",
        "__getstate__",
        "__init_subclass__",
        "__module__",
        "__orig_bases__",
        "__parameters__",
        "__qualname__",
        "__reduce__",
        "__reduce_ex__",
        "__repr__",
        "__setstate__",
        "__static_attributes__",
        "__str__",
        "__weakref__",
        "_abc_impl",
        "_hashable_values_",
        "_unhashable_values_",
        "_unhashable_values_map_",
        "_value2member_map_",
        "_backward_cls",
    }
)
_MAKING = frozenset({"__init__", "__new__", "__post_init__"})
_MEMBERS = ("_parameters", "_buffers", "_modules")
_OF_MODULES = frozenset(vars(nn.Module())) - SAVING_HOOKS - set(_MEMBERS)


class ObjectWatcher(CodeWatcher):
    """Builds checks of everything that a function can read, objects included.

    Attributes:
        modules: Whether an `nn.Module` was met.
    """

    def __init__(self, policy: Policy, names: frozenset[str]):
        super().__init__(policy, names)
        self.modules = False
        self._computed = computed(names)
        self._buffers: set[int] = set()
        self.kinds += [(type, self._class), (nn.Module, self._network), (object, self._object)]

    def tensor(self, value: torch.Tensor, path: str, what: What) -> Check:
        """As for any tensor, and that code reads nothing else of it."""
        return self.beside(value, path, super().tensor(value, path, what))

    def matters(self, value: torch.Tensor) -> What:
        """What of a tensor matters: the policy says it of parameters and of buffers."""
        return self.policy.buffers if id(value) in self._buffers else super().matters(value)

    def noted(self, number: int, value: Any, inner: Check) -> Check:
        """A check that also notes under a number what it was given; quick for a tensor."""
        like = self.look(value) if isinstance(value, torch.Tensor) else None
        if like is None or (what := self.matters(value)) == "shapes":
            return super().noted(number, value, inner)
        return the_same(value, like, number, what == "values", inner)

    def look(self, value: Any) -> Callable[[Any], bool] | None:
        """A test in one look for what a tensor is; None where code reads more of it."""
        return None if "grad" in self.names else looked_at(value)

    def beside(self, value: torch.Tensor, path: str, inner: Check) -> Check:
        """A check of a tensor, and that it has no attributes of a user's that code reads."""
        names, everything = self.names, self._computed
        reason = f"{path} has attributes that are no part of a tensor"

        def has_own(tensor: torch.Tensor) -> bool:
            space = vars(tensor)
            return bool(space) and (everything or not names.isdisjoint(space))

        if has_own(value):  # the tensors that are traced in its place have none
            self.refuse(reason)
        grad = self.value(_grad(value), f"{path}.grad") if "grad" in names else None

        def check(new: Any, seen: Seen) -> Mismatch | None:
            mismatch = inner(new, seen)
            if mismatch is None and has_own(new):
                return Mismatch(reason)
            if mismatch is None and grad is not None:
                return grad(_grad(new), seen)
            return mismatch

        return check

    def global_hooks(self) -> Check:
        """A check of the hooks that run for every module."""
        inner = self.value(list(GLOBAL_HOOKS), "global module hooks")
        return inlined(
            lambda _, seen: inner(list(GLOBAL_HOOKS), seen),
            lambda lines, _: lines.need_check(inner, lines.hold(list(GLOBAL_HOOKS))),
        )

    def _class(self, value: type, path: str) -> Check:
        """A class: its own namespace, and those of its bases, if they are a user's."""
        self.found.add(_making(value))
        return self.class_of_instances(value, path)

    def class_of_instances(self, value: type, path: str) -> Check:
        """A class that objects are of: what code reads of it, and of its bases."""
        own = [c for c in value.__mro__ if not is_trusted(c.__module__)]
        if not own:
            return identical(value, path)
        if not is_trusted(type(value).__module__):
            raise NotUnderstood(f"{path} has a metaclass of its own, {type(value).__name__}")
        made = _making(value) in self.names or not self.names.isdisjoint({"type", "__class__"})
        foreign = [c for c in value.__mro__ if is_trusted(c.__module__) and c is not object]
        wanted = functools.partial(_is_read, self.names, self._computed, made, foreign)
        spaces = [self.attributes(dict(vars(c)), f"{c.__name__}", wanted) for c in own]
        expected: Any = weakref.ref(value)
        asked = isinstance(value, abc.ABCMeta) and not _ASKS.isdisjoint(self.names)
        registered = _registered(value) if asked else frozenset()

        def check(new: Any, seen: Seen) -> Mismatch | None:
            if new is not expected():
                return Mismatch(f"{path} is another class now: {shown(new)}")
            if asked and _registered(new) != registered:
                return Mismatch(f"what counts as an instance of {path} changed")
            mine = [c for c in new.__mro__ if not is_trusted(c.__module__)]
            if len(mine) != len(spaces):
                return Mismatch(f"the bases of {path} changed")
            for c, inner in zip(mine, spaces, strict=True):
                mismatch = inner(vars(c), seen)
                if mismatch is not None:
                    return mismatch
            return None

        def form(lines: GuardCode, place: str) -> None:
            x, cls = lines.let(place), expected()
            lines.need(f"{x} is {lines.hold(expected)}()")
            bases = lines.let(f"{x}.__mro__")
            # By number: the classes themselves would be kept alive.
            lines.need(f"list(map(id, {bases})) == {lines.hold([id(c) for c in cls.__mro__])}")
            mine = [k for k, c in enumerate(cls.__mro__) if not is_trusted(c.__module__)]
            for k, inner in zip(mine, spaces, strict=True):
                lines.need_check(inner, f"{bases}[{k}].__dict__")

        return check if asked else inlined(check, form)

    def instance(self, value: Any, path: str) -> Check:
        """Class, attributes and slots of an object."""
        cls = type(value)
        _refuse_magic(cls, path)
        kind = self.remember(cls, f"the class of {path}", self.class_of_instances)
        slots = [name for c in cls.__mro__ for name in _slots(c)]
        held = {n: getattr(value, n) for n in slots if hasattr(value, n)}
        state = self.attributes(held, path) if slots else None
        space = (
            self.attributes(vars(value), path, self._read_of(cls)) if _has_space(value) else None
        )
        tree = self.value(tree_functions(cls), f"how {path} is taken apart in a tree")

        def check(new: Any, seen: Seen) -> Mismatch | None:
            mismatch = kind(type(new), seen) or tree(tree_functions(type(new)), seen)
            if mismatch is not None:
                return mismatch
            if state is not None:
                now = {n: getattr(new, n) for n in slots if hasattr(new, n)}
                mismatch = state(now, seen)
                if mismatch is not None:
                    return mismatch
            return space(vars(new), seen) if space is not None else None

        def form(lines: GuardCode, place: str) -> None:
            x = lines.let(place)
            cls = lines.let(f"type({x})")
            lines.need_check(kind, cls)
            lines.need_check(tree, f"{lines.hold(tree_functions)}({cls})")
            if space is not None:
                lines.need_check(space, f"{x}.__dict__")

        return check if slots else inlined(check, form)

    def _object(self, value: Any, path: str) -> Check:
        cls = type(value)
        if cls is object or cls.__module__ in _CONSTANT_MODULES:
            return identical(value, path)
        if cls in _INERT:
            return self._inert(value, path)
        if not _is_plain(value) or is_volatile(cls.__module__):
            raise NotUnderstood(
                f"{path} is an object of type {cls.__module__}.{cls.__qualname__}, of which it "
                f"cannot be seen whether it changes"
            )
        return self.instance(value, path)

    def _inert(self, value: Any, path: str) -> Check:
        """An object whose state matters only where code asks for it: the level of a logger."""
        same = self.same_class(value, path)
        if not isinstance(value, logging.Logger) or self.names.isdisjoint(_OF_LOGGERS):
            return lambda new, seen: same(new)
        state = _logs(value)

        def check(new: Any, seen: Seen) -> Mismatch | None:
            changed = Mismatch(f"what {path} logs changed")
            return same(new) or (None if _logs(new) == state else changed)

        return check

    def _read_of(self, cls: type) -> Callable[[str], bool]:
        """Which attributes of an object are read: those that code names."""
        bases = [c for c in cls.__mro__ if is_trusted(c.__module__)]
        known = any(c not in (object, nn.Module) for c in bases)
        if self._computed or known or tree_functions(cls):
            return lambda name: name not in SAVING_HOOKS
        names, network = self.names, nn.Module in bases
        return lambda name: (
            name in names or (network and hasattr(nn.Module, name) and name not in SAVING_HOOKS)
        )

    def _network(self, value: nn.Module, path: str) -> Check:
        """A module: hooks, training flag, parameters, buffers, submodules, and its attributes."""
        self.modules = True
        _refuse_magic(type(value), path)
        if not _is_plain(value):
            raise NotUnderstood(f"{path} is a module that is not written in Python")
        self._buffers |= {id(b) for b in value._buffers.values() if b is not None}
        kind = self.remember(type(value), f"the class of {path}", self.class_of_instances)
        read = self._read_of(type(value))
        space = self.attributes(
            vars(value), path, lambda n: n in _OF_MODULES or (n not in _MEMBERS and read(n))
        )
        self.alive += [vars(value)[name] for name in _MEMBERS]
        members = [self.attributes(vars(value)[name], path) for name in _MEMBERS]
        named = list(zip(_MEMBERS, members, strict=True))

        def check(new: Any, seen: Seen) -> Mismatch | None:
            mismatch = kind(type(new), seen)
            if mismatch is not None:
                return mismatch
            now = vars(new)
            mismatch = space(now, seen)
            if mismatch is not None:
                return mismatch
            for name, inner in named:
                mismatch = inner(now[name], seen)
                if mismatch is not None:
                    return mismatch
            return None

        def form(lines: GuardCode, place: str) -> None:
            x = lines.let(place)
            lines.need_check(kind, f"type({x})")
            now = lines.let(f"{x}.__dict__")
            for inner, held in [(space, now), *((m, f"{now}[{n!r}]") for n, m in named)]:
                lines.need_check(inner, held)

        return inlined(check, form)


_CONSTANT_MODULES = frozenset({"torch._ops", "typing"})
_T = TypeVar("_T")
# Classes of objects whose state no derivative depends on; not their subclasses.
_INERT: set[type] = {
    logging.Logger,
    logging.RootLogger,
    type(threading.Lock()),
    type(threading.RLock()),
}
_ASKS = frozenset({"isinstance", "issubclass"})
_OF_LOGGERS = frozenset({"disabled", "getEffectiveLevel", "hasHandlers", "isEnabledFor", "level"})


def inert(cls: type[_T]) -> type[_T]:
    """Marks a class: no derivative depends on the state of its instances.

    A class names itself, so that this module need not know the ones above it. A subclass is not
    marked: it may hold anything.
    """
    _INERT.add(cls)
    return cls


def _registered(cls: Any) -> frozenset[Any]:
    """The classes that are registered with an abstract class, or with a subclass of it."""
    found = set(abc._get_dump(cls)[0])  # type: ignore[attr-defined]
    for inner in cls.__subclasses__():
        found |= _registered(inner)
    return frozenset(found)


def _logs(logger: logging.Logger) -> tuple[Any, ...]:
    level, off = logger.getEffectiveLevel(), logger.manager.disable
    return logger.level, level, off, logger.disabled, logger.hasHandlers()


def _is_read(
    names: frozenset[str], everything: bool, made: bool, foreign: list[type], name: str
) -> bool:
    """Whether an entry of a class is read: by name, by Python itself, or by code of a base."""
    if name in _NOT_READ or (name in _MAKING and not made):
        return False
    special = name.startswith("__") and name.endswith("__")
    return everything or special or name in names or any(hasattr(c, name) for c in foreign)


def _making(cls: type) -> str:
    """Stands among the names of code for: the class itself may be called."""
    return f"new {cls.__module__}.{cls.__qualname__}"


def _refuse_magic(cls: type, path: str) -> None:
    for c in cls.__mro__:
        if c in (object, nn.Module):
            continue
        found = [vars(c)[n] for n in ("__getattr__", "__getattribute__") if n in vars(c)]
        if any(not isinstance(method, types.WrapperDescriptorType) for method in found):
            raise NotUnderstood(f"{path} computes its attributes ({c.__name__}.__getattr__)")


def _slots(cls: type) -> Iterable[str]:
    slots = vars(cls).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return [
        f"_{cls.__name__.lstrip('_')}{n}" if n.startswith("__") and not n.endswith("__") else n
        for n in names
        if n not in ("__dict__", "__weakref__")
    ]


def slots_of(cls: type) -> list[types.MemberDescriptorType]:
    """The slots of a user's classes."""
    found = [vars(c).get(name) for c in cls.__mro__ for name in _slots(c)]
    return [slot for slot in found if isinstance(slot, types.MemberDescriptorType)]


def _grad(tensor: torch.Tensor) -> torch.Tensor | None:
    return tensor.grad if tensor.is_leaf else None  # PyTorch warns where it is no leaf


def _has_space(value: Any) -> bool:
    return hasattr(value, "__dict__")


def _is_plain(value: Any) -> bool:
    """Whether all state of an object is in attributes and slots: none is hidden in C."""
    cls = type(value)
    slots = [name for c in cls.__mro__ for name in _slots(c)]
    declared = any("__slots__" in vars(c) for c in cls.__mro__)
    largest = object.__basicsize__ + 8 * (len(slots) + 2)  # with a dictionary and weak references
    return (_has_space(value) or declared) and cls.__basicsize__ <= largest
