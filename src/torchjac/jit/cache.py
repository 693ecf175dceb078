"""A small memory of captures: each is used only for calls that it holds for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from torchjac.call import Call
from torchjac.guards.builder import Policy
from torchjac.guards.guard import Guard, Unguardable, build_guard
from torchjac.guards.objects import inert

V = TypeVar("V")
Before = Guard | Unguardable


@inert
class CaptureCache(Generic[V]):
    """What was made for recent calls, the last used first. Safe to share between threads.

    Args:
        size: Number of captures that are kept.
        policy: What of a module's tensors matters.
    """

    def __init__(self, size: int = 8, policy: Policy = Policy()):  # noqa: B008
        self._size = size
        self._policy = policy
        self._lock = threading.Lock()
        self._entries: list[tuple[Guard, V]] = []
        self._refused: str | None = None

    def __len__(self) -> int:
        """Number of captures that are kept."""
        return len(self._entries)

    @property
    def refused(self) -> str | None:
        """Why the last capture was not kept; None if it was."""
        return self._refused

    def lookup(self, call: Call) -> V | None:
        """What was made for a call like this one, or None."""
        for entry in self._snapshot():
            mismatch = entry[0].mismatch(call)
            if mismatch is None:
                self._move_to_front(entry)
                return entry[1]
            if mismatch.final:
                self._drop(entry)
        return None

    def latest(self) -> tuple[Guard, V] | None:
        """What was used last, and the guard of its calls."""
        entries = self._snapshot()
        return entries[0] if entries else None

    def store(self, call: Call, value: V) -> str | None:
        """Keeps a value for calls like this one.

        Returns:
            Why it is not kept, or None if it is.
        """
        return self.keep(self.before(call), call, value)

    def get_or_make(self, call: Call, make: Callable[[], V]) -> V:
        """What was made for a call like this one, else what `make` makes now.

        Two threads may both make a value for the same call; either is right.
        """
        found = self.lookup(call)
        if found is not None:
            return found
        before = self.before(call)  # what `make` starts from, not what it leaves
        value = make()
        self.keep(before, call, value)
        return value

    def before(self, call: Call) -> Before:
        """What a call reads now."""
        return build_guard(call, self._policy)

    def mismatches(self, call: Call) -> tuple[str, ...]:
        """Why each capture does not hold for a call, the last used first."""
        found = (entry[0].mismatch(call) for entry in self._snapshot())
        return tuple(mismatch.reason for mismatch in found if mismatch is not None)

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._entries.clear()

    def keep(self, print_: Before, call: Call, value: V) -> str | None:
        """Keeps a value for calls like this one, unless what they read has changed since.

        Args:
            print_: What the call read before the value was made.
            call: The call.
            value: What was made for it.

        Returns:
            Why it is not kept, or None if it is.
        """
        if isinstance(print_, Unguardable):
            self._refused = print_.reason
            return self._refused
        changed = print_.mismatch(call)
        if changed is not None:
            self._refused = f"running the function changes what it reads: {changed.reason}"
            return self._refused
        if print_.has_grown():  # results were frozen that it does not know
            again = build_guard(call, self._policy)
            if isinstance(again, Unguardable):
                self._refused = again.reason
                return self._refused
            if again.has_grown():
                self._refused = "its caches grow all the time"
                return self._refused
            print_ = again
        self._refused = None
        with self._lock:
            self._entries.insert(0, (print_, value))
            del self._entries[self._size :]
        return None

    def _snapshot(self) -> tuple[tuple[Guard, V], ...]:
        with self._lock:
            return tuple(self._entries)

    def _move_to_front(self, entry: tuple[Guard, V]) -> None:
        with self._lock:
            for position, kept in enumerate(self._entries):
                if kept is entry:
                    self._entries.insert(0, self._entries.pop(position))
                    return

    def _drop(self, entry: tuple[Guard, V]) -> None:
        with self._lock:
            self._entries = [kept for kept in self._entries if kept is not entry]
