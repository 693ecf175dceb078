"""Checks of containers: sequences, dictionaries, partial functions."""

from __future__ import annotations

import functools
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from typing import Any

from torchjac.guards.builder import GuardBuilder, Policy, names_changed
from torchjac.guards.checks import All, At, Compound, Parts
from torchjac.guards.constants import NotUnderstood, constant_test, shown
from torchjac.guards.rules import ITEM, OF_CLASS, Access, Check, Clause, Rule, same_class

_CONTAINERS = (dict, list, tuple, deque, OrderedDict, defaultdict, types.MappingProxyType)


def _keys_changed(path: str, old: list[Any], new: Any) -> str:
    return names_changed(path, [shown(k) for k in old], [shown(k) for k in new], "keys")


_KEYS = "{keys_changed(path, keys, x)}"
_SEQUENCE = Rule(
    "cls name size",
    OF_CLASS,
    Clause("len(x) == size", "the length of {path} changed from {size} to {len(x)}"),
)
_EMPTY = Rule("cls name", OF_CLASS, Clause("not x", "{path} is no longer empty"))
# A dictionary with strings as keys.
_NAMED = Rule(
    "cls name keys kinds",
    OF_CLASS,
    Clause("list(x) == keys and list(map(type, x)) == kinds", _KEYS),
    keys_changed=_keys_changed,
)
# A dictionary with other constants as keys.
_KEYED = Rule(
    "cls name same keys",
    OF_CLASS,
    Clause("same(tuple(x))", _KEYS),
    keys_changed=_keys_changed,
)
_LISTED = Access("list(x)")
_VALUES = Access("list(x.values())")
_FACTORY = Access("x.default_factory")
_FUNCTION = Access("x.func")
_ARGS = Access("list(x.args)")
_KEYWORDS = Access("dict(x.keywords)")


class ContainerBuilder(GuardBuilder):
    """Builds checks of containers and of their parts."""

    def __init__(self, policy: Policy):
        super().__init__(policy)
        self.kinds += [
            ((dict, types.MappingProxyType), self._dict),
            ((list, tuple, deque), self._sequence),
            ((functools.partial, functools.partialmethod), self._partial),
        ]

    def _sequence(self, value: Any, path: str) -> Check:
        cls, parts = type(value), list(value)
        checks = self.parts(ITEM, range(len(parts)), parts, path)
        if cls not in (list, tuple):  # items of other classes may be slow, or in another order
            checks = [At(_LISTED, All(checks))]
        leaf = _SEQUENCE(path, weakref.ref(cls), cls.__name__, len(parts))
        return Compound(leaf, checks + self._own_space(value, path))

    def _dict(self, value: Any, path: str) -> Check:
        cls = type(value)
        of = weakref.ref(cls), cls.__name__
        if cls in (dict, OrderedDict) and not value:
            return _EMPTY(path, *of)
        keys = list(value)
        if cls is dict and all(type(key) is str for key in keys):
            leaf = _NAMED(path, *of, keys, [str] * len(keys))
            return Compound(leaf, self.parts(ITEM, keys, list(value.values()), path))
        try:
            same = constant_test(tuple(keys))
        except NotUnderstood as reason:
            raise NotUnderstood(f"{path}: {reason}") from None
        if same is None:
            raise NotUnderstood(f"a key of {path} is neither a number nor a string")
        inner = [self.value(v, f"{path}[{k!r}]") for k, v in value.items()]
        checks: list[Check] = [At(_VALUES, Parts(ITEM, range(len(inner)), inner))]
        if isinstance(value, defaultdict):
            factory = self.value(value.default_factory, f"{path}.default_factory")
            checks.append(At(_FACTORY, factory))
        return Compound(_KEYED(path, *of, same, keys), checks + self._own_space(value, path))

    def _own_space(self, value: Any, path: str) -> list[Check]:
        """Checks of the attributes of an instance of a subclass of a container."""
        return [] if type(value) in _CONTAINERS else [self.instance(value, path)]

    def instance(self, value: Any, path: str) -> Check:
        """A check of the class and the attributes of an object; subclasses know how."""
        raise NotUnderstood(f"{path} is an object of type {type(value).__name__}")

    def _partial(self, value: Any, path: str) -> Check:
        if type(value) not in (functools.partial, functools.partialmethod):
            raise NotUnderstood(f"{path} is of type {type(value).__name__}, a kind of partial")
        return Compound(
            same_class(value, path),
            [
                At(_FUNCTION, self.value(value.func, path)),
                At(_ARGS, self.value(list(value.args), f"{path}.args")),
                At(_KEYWORDS, self.value(dict(value.keywords), f"{path}.keywords")),
            ],
        )
