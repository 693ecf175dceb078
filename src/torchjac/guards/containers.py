"""Watching containers: sequences, dictionaries, partial functions."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict, defaultdict, deque
from typing import Any

from torchjac.guards.builder import Check, GuardBuilder, Mismatch, Policy, Seen, other_names
from torchjac.guards.constants import NotUnderstood, exact, shown
from torchjac.guards.predicate import GuardCode, inlined

_CONTAINERS = (dict, list, tuple, deque, OrderedDict, defaultdict, types.MappingProxyType)


class ContainerWatcher(GuardBuilder):
    """Builds checks of containers and of what they hold."""

    def __init__(self, policy: Policy):
        super().__init__(policy)
        self.kinds += [
            ((dict, types.MappingProxyType), self._dict),
            ((list, tuple, deque), self._sequence),
            ((functools.partial, functools.partialmethod), self._partial),
        ]

    def _sequence(self, value: Any, path: str) -> Check:
        same = self.same_class(value, path)
        parts = [self.value(part, f"{path}[{i}]") for i, part in enumerate(value)]
        size, kind = len(parts), type(value)
        space = self._own_space(value, path)

        def check(new: Any, seen: Seen) -> Mismatch | None:
            mismatch = same(new)
            if mismatch is not None:
                return mismatch
            if len(new) != size:
                return Mismatch(f"the length of {path} changed from {size} to {len(new)}")
            for part, inner in zip(new, parts, strict=True):
                mismatch = inner(part, seen)
                if mismatch is not None:
                    return mismatch
            return space(new, seen) if space is not None else None

        def form(lines: GuardCode, place: str) -> None:
            x = lines.let(place)
            lines.need(f"type({x}) is {lines.hold(kind)}", f"len({x}) == {size}")
            for i, inner in enumerate(parts):
                lines.need_check(inner, f"{x}[{i}]")

        return inlined(check, form) if kind in (list, tuple) else check

    def _dict(self, value: Any, path: str) -> Check:
        same = self.same_class(value, path)
        if type(value) in (dict, OrderedDict) and not value:
            return inlined(
                lambda new, seen: (
                    same(new) or (Mismatch(f"{path} is no longer empty") if new else None)
                ),
                lambda lines, place: lines.need_empty(place, type(value)),
            )
        try:
            keys = [exact(key) for key in value]
        except NotUnderstood as reason:
            raise NotUnderstood(f"{path}: {reason}") from None
        if any(key is None for key in keys):
            raise NotUnderstood(f"a key of {path} is neither a number nor a string")
        shown_keys = [shown(key) for key in value]
        inner = [self.value(v, f"{path}[{k!r}]") for k, v in value.items()]
        pairs = [(k, c) for k, c in zip(keys, inner, strict=True) if k is not None]
        space = self._own_space(value, path)
        factory = isinstance(value, defaultdict)
        default = self.value(value.default_factory, f"{path}.default_factory") if factory else None

        def check(new: Any, seen: Seen) -> Mismatch | None:
            mismatch = same(new)
            if mismatch is not None:
                return mismatch
            if len(new) != len(pairs) or not all(
                test(key) for key, (test, _) in zip(new, pairs, strict=True)
            ):
                return other_names(f"{path}", shown_keys, [shown(key) for key in new], "keys")
            for part, (_, inside) in zip(new.values(), pairs, strict=True):
                mismatch = inside(part, seen)
                if mismatch is not None:
                    return mismatch
            if default is not None:
                mismatch = default(new.default_factory, seen)
            return mismatch or (space(new, seen) if space is not None else None)

        names = list(value)

        def form(lines: GuardCode, place: str) -> None:
            x = lines.let(place)
            lines.need(f"type({x}) is dict", f"list({x}) == {lines.hold(names)}")
            lines.need(f"list(map(type, {x})) == {lines.hold([str] * len(names))}")
            for name, (_, inside) in zip(names, pairs, strict=True):
                lines.need_check(inside, f"{x}[{name!r}]")

        named = type(value) is dict and all(type(key) is str for key in names)
        return inlined(check, form) if named else check

    def _own_space(self, value: Any, path: str) -> Check | None:
        """Attributes of an instance of a subclass of a container."""
        if type(value) in _CONTAINERS:
            return None
        return self.instance(value, path)

    def instance(self, value: Any, path: str) -> Check:
        """What an object of a user's class has beside what is built in; a subclass may know."""
        raise NotUnderstood(f"{path} is an object of type {type(value).__name__}")

    def _partial(self, value: Any, path: str) -> Check:
        same = self.same_class(value, path)
        if type(value) not in (functools.partial, functools.partialmethod):
            raise NotUnderstood(f"{path} is of type {type(value).__name__}, a kind of partial")
        function = self.value(value.func, path)
        args = self.value(list(value.args), f"{path}.args")
        keywords = self.value(dict(value.keywords), f"{path}.keywords")

        def check(new: Any, seen: Seen) -> Mismatch | None:
            return (
                same(new)
                or function(new.func, seen)
                or args(list(new.args), seen)
                or keywords(dict(new.keywords), seen)
            )

        return check
