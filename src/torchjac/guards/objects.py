"""Checks of objects of a user's classes, of the classes, and of `nn.Module`s."""

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
from torchjac.guards import tensors
from torchjac.guards.builder import Level, Policy
from torchjac.guards.bytecode import computed, is_trusted, is_volatile
from torchjac.guards.checks import All, At, Compound, Numbered, Parts
from torchjac.guards.constants import NotUnderstood
from torchjac.guards.functions import FunctionBuilder
from torchjac.guards.rules import (
    ITEM,
    NAMESPACE,
    TYPE,
    Access,
    Check,
    Clause,
    Rule,
    identical,
    same_class,
)

# Names in a class on which no derivative depends.
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


def _registered(cls: Any) -> frozenset[Any]:
    """The classes that are registered with an abstract class, or with a subclass of it."""
    classes = set(abc._get_dump(cls)[0])  # type: ignore[attr-defined]
    for inner in cls.__subclasses__():
        classes |= _registered(inner)
    return frozenset(classes)


def _logs(logger: logging.Logger) -> tuple[Any, ...]:
    level, off = logger.getEffectiveLevel(), logger.manager.disable
    return logger.level, level, off, logger.disabled, logger.hasHandlers()


def _grad(tensor: torch.Tensor) -> torch.Tensor | None:
    return tensor.grad if tensor.is_leaf else None  # PyTorch warns where it is no leaf


def _has_own(tensor: torch.Tensor, names: frozenset[str], everything: bool) -> bool:
    """Whether a tensor has attributes of a user's that code reads."""
    space = vars(tensor)
    return bool(space) and (everything or not names.isdisjoint(space))


def _state(value: Any, slots: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(value, name) for name in slots if hasattr(value, name)}


_NO_OWN = Rule(
    "names everything",
    Clause(
        "not has_own(x, names, everything)", "{path} has attributes that are no part of a tensor"
    ),
    has_own=_has_own,
)
_IS_CLASS = Clause("x is cls()", "{path} is another class now: {shown(x)}")
# Bases are compared by id: references to them would keep them alive.
_SAME_BASES = Clause("list(map(id, x.__mro__)) == bases", "the bases of {path} changed")
_CLASS = Rule("cls bases", _IS_CLASS, _SAME_BASES)
_ABSTRACT = Rule(
    "cls known bases",
    _IS_CLASS,
    Clause("registered(x) == known", "what counts as an instance of {path} changed"),
    _SAME_BASES,
    registered=_registered,
)
_LOGGER = Rule("state", Clause("logs(x) == state", "what {path} logs changed"), logs=_logs)
_GRAD = Access("grad(x)", grad=_grad)
_HOOKS = Access("list(hooks)", hooks=GLOBAL_HOOKS)
_BASE = Access("x[key].__dict__", of="x.__mro__")
_TREE = Access("functions(type(x))", functions=tree_functions)
_STATE = Access("state(x, key)", state=_state)


class ObjectBuilder(FunctionBuilder):
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

    def tensor(self, value: torch.Tensor, path: str, level: Level) -> Check:
        """A check of a tensor, and of the attributes that code reads of it."""
        return self.with_attributes(value, path, super().tensor(value, path, level))

    def level(self, value: torch.Tensor) -> Level:
        """The level at which a tensor is compared; the policy has one for buffers too."""
        return self.policy.buffers if id(value) in self._buffers else super().level(value)

    def numbered(self, number: int, value: Any, check: Check) -> Check:
        """A check of an object that `Again` may refer to; a faster one for a tensor."""
        like = self.like(value) if isinstance(value, torch.Tensor) else None
        if like is None or (level := self.level(value)) == "shapes":
            return super().numbered(number, value, check)
        same = tensors.same_values if level == "values" else tensors.same_object
        return Numbered(number, same(value, like, check))

    def like(self, value: Any) -> tensors.Like | None:
        """A test for all facts of a tensor but its numbers; None where code reads more of it."""
        return None if "grad" in self.names else tensors.like(value)

    def with_attributes(self, value: torch.Tensor, path: str, check: Check) -> Check:
        """A check of a tensor, which may not have attributes of a user's that code reads."""
        own = _NO_OWN(path, self.names, self._computed)
        if not own.test(value):  # the tensors that are traced in its place have none
            self.refuse(f"{path} has attributes that are no part of a tensor")
        if "grad" not in self.names:
            return All([check, own])
        return All([check, own, At(_GRAD, self.value(_grad(value), f"{path}.grad"))])

    def global_hooks(self) -> Check:
        """A check of the hooks that run for every module."""
        return At(_HOOKS, self.value(list(GLOBAL_HOOKS), "global module hooks"))

    def _class(self, value: type, path: str) -> Check:
        """A check of a class that code calls."""
        self.reached.add(_making(value))
        return self.class_of_instances(value, path)

    def class_of_instances(self, value: type, path: str) -> Check:
        """A check of the class of an object: of its namespace, and of those of a user's bases."""
        own = [c for c in value.__mro__ if not is_trusted(c.__module__)]
        if not own:
            return identical(value, path)
        if not is_trusted(type(value).__module__):
            raise NotUnderstood(f"{path} has a metaclass of its own, {type(value).__name__}")
        called = _making(value) in self.names or not self.names.isdisjoint({"type", "__class__"})
        foreign = [c for c in value.__mro__ if is_trusted(c.__module__) and c is not object]
        read = functools.partial(_is_read, self.names, self._computed, called, foreign)
        spaces = [self.attributes(dict(vars(c)), f"{c.__name__}", read) for c in own]
        bases = [id(c) for c in value.__mro__]
        positions = [k for k, c in enumerate(value.__mro__) if c in own]
        inner = Parts(_BASE, positions, spaces)
        if not isinstance(value, abc.ABCMeta) or _ASKS.isdisjoint(self.names):
            return Compound(_CLASS(path, weakref.ref(value), bases), [inner])
        leaf = _ABSTRACT(path, weakref.ref(value), _registered(value), bases)
        return Compound(leaf, [inner])

    def instance(self, value: Any, path: str) -> Check:
        """A check of the class, the attributes and the slots of an object."""
        cls = type(value)
        _refuse_magic(cls, path)
        checks: list[Check] = [
            At(TYPE, self.remember(cls, f"the class of {path}", self.class_of_instances)),
            At(_TREE, self.value(tree_functions(cls), f"how {path} is taken apart in a tree")),
        ]
        slots = tuple(name for c in cls.__mro__ for name in _slots(c))
        if slots:
            state = self.attributes(_state(value, slots), path)
            checks.append(Parts(_STATE, [slots], [state]))
        if _has_space(value):
            space = self.attributes(vars(value), path, self._read_of(cls))
            checks.append(At(NAMESPACE, space))
        return All(checks)

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
        """A check of an object without state that matters, but for the level of a logger."""
        same = same_class(value, path)
        if not isinstance(value, logging.Logger) or self.names.isdisjoint(_OF_LOGGERS):
            return same
        return All([same, _LOGGER(path, _logs(value))])

    def _read_of(self, cls: type) -> Callable[[str], bool]:
        """Whether an attribute of an object is read, by its name."""
        bases = [c for c in cls.__mro__ if is_trusted(c.__module__)]
        known = any(c not in (object, nn.Module) for c in bases)
        if self._computed or known or tree_functions(cls):
            return lambda name: name not in SAVING_HOOKS
        names, network = self.names, nn.Module in bases
        return lambda name: (
            name in names or (network and hasattr(nn.Module, name) and name not in SAVING_HOOKS)
        )

    def _network(self, value: nn.Module, path: str) -> Check:
        """A check of an `nn.Module`: of its class, its members and its attributes."""
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
        inner = All([space, Parts(ITEM, _MEMBERS, members)])
        return All([At(TYPE, kind), At(NAMESPACE, inner)])


_CONSTANT_MODULES = frozenset({"torch._ops", "typing"})
_T = TypeVar("_T")
# Classes of objects on whose state no derivative depends. Subclasses are not among them.
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


def _is_read(
    names: frozenset[str], everything: bool, called: bool, foreign: list[type], name: str
) -> bool:
    """Whether an entry of a class is read: by name, by Python itself, or by code of a base."""
    if name in _NOT_READ or (name in _MAKING and not called):
        return False
    special = name.startswith("__") and name.endswith("__")
    return everything or special or name in names or any(hasattr(c, name) for c in foreign)


def _making(cls: type) -> str:
    """The entry among the names of code that says: code may call the class."""
    return f"new {cls.__module__}.{cls.__qualname__}"


def _refuse_magic(cls: type, path: str) -> None:
    for c in cls.__mro__:
        if c in (object, nn.Module):
            continue
        methods = [vars(c)[n] for n in ("__getattr__", "__getattribute__") if n in vars(c)]
        if any(not isinstance(method, types.WrapperDescriptorType) for method in methods):
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
    slots = [vars(c).get(name) for c in cls.__mro__ for name in _slots(c)]
    return [slot for slot in slots if isinstance(slot, types.MemberDescriptorType)]


def _has_space(value: Any) -> bool:
    return hasattr(value, "__dict__")


def _is_plain(value: Any) -> bool:
    """Whether all state of an object is in attributes and slots: none is hidden in C."""
    cls = type(value)
    slots = [name for c in cls.__mro__ for name in _slots(c)]
    declared = any("__slots__" in vars(c) for c in cls.__mro__)
    largest = object.__basicsize__ + 8 * (len(slots) + 2)  # with a dictionary and weak references
    return (_has_space(value) or declared) and cls.__basicsize__ <= largest
