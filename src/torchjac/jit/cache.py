"""The capture cache: recent captures of one function, each with the guard of its calls."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from torchjac.call import Call
from torchjac.guards.builder import Policy
from torchjac.guards.guard import Guard, Unguardable, build_guard
from torchjac.guards.objects import inert

V = TypeVar("V")
# The guard of a call, or the reason why there is none.
GuardResult = Guard | Unguardable


@inert
class CaptureCache(Generic[V]):
    """Values for recent calls, each with its guard, in the order of use. Safe between threads.

    Args:
        size: Number of entries; the least recently used one is evicted.
        policy: What the guards compare of the tensors of a module.
    """

    def __init__(self, size: int = 8, policy: Policy = Policy()):  # noqa: B008
        self._size = size
        self._policy = policy
        self._lock = threading.Lock()
        self._entries: list[tuple[Guard, V]] = []
        self._refused: str | None = None

    def __len__(self) -> int:
        """Number of entries."""
        return len(self._entries)

    @property
    def refused(self) -> str | None:
        """Why the last value was not inserted; None if it was."""
        return self._refused

    def lookup(self, call: Call) -> V | None:
        """The value of the first entry whose guard holds for a call; None if no guard holds."""
        for entry in self._snapshot():
            mismatch = entry[0].mismatch(call)
            if mismatch is None:
                self._move_to_front(entry)
                return entry[1]
            if mismatch.final:
                self._remove(entry)
        return None

    def latest(self) -> tuple[Guard, V] | None:
        """The guard and the value of the most recently used entry; None if the cache is empty."""
        entries = self._snapshot()
        return entries[0] if entries else None

    def store(self, call: Call, value: V) -> str | None:
        """Builds the guard of a call now, and inserts a value with it.

        Returns:
            Why the value is not inserted; None if it is.
        """
        return self.insert(self.build_guard(call), call, value)

    def get_or_create(self, call: Call, create: Callable[[], V]) -> V:
        """The value for a call: that of an entry whose guard holds, else a new one.

        Two threads may both create a value for the same call; either value is right.
        """
        cached = self.lookup(call)
        if cached is not None:
            return cached
        guard = self.build_guard(call)  # of the state before `create`, which may change it
        value = create()
        self.insert(guard, call, value)
        return value

    def build_guard(self, call: Call) -> GuardResult:
        """The guard of a call, which compares all that the function reads with its state now."""
        return build_guard(call, self._policy)

    def mismatches(self, call: Call) -> tuple[str, ...]:
        """Why the guard of each entry does not hold for a call, the most recently used first."""
        results = (entry[0].mismatch(call) for entry in self._snapshot())
        return tuple(mismatch.reason for mismatch in results if mismatch is not None)

    def clear(self) -> None:
        """Removes all entries."""
        with self._lock:
            self._entries.clear()

    def insert(self, guard: GuardResult, call: Call, value: V) -> str | None:
        """Inserts a value, unless the state that its guard compares has changed since.

        Args:
            guard: The guard, built before the value was computed.
            call: The call.
            value: The value for calls that the guard holds for.

        Returns:
            Why the value is not inserted; None if it is.
        """
        if isinstance(guard, Unguardable):
            self._refused = guard.reason
            return self._refused
        changed = guard.mismatch(call)
        if changed is not None:
            self._refused = f"running the function changes what it reads: {changed.reason}"
            return self._refused
        if guard.has_grown():  # the function filled an lru_cache, whose new results are frozen
            rebuilt = build_guard(call, self._policy)
            if isinstance(rebuilt, Unguardable):
                self._refused = rebuilt.reason
                return self._refused
            if rebuilt.has_grown():
                self._refused = "its caches grow all the time"
                return self._refused
            guard = rebuilt
        self._refused = None
        with self._lock:
            self._entries.insert(0, (guard, value))
            del self._entries[self._size :]
        return None

    def _snapshot(self) -> tuple[tuple[Guard, V], ...]:
        with self._lock:
            return tuple(self._entries)

    def _move_to_front(self, entry: tuple[Guard, V]) -> None:
        with self._lock:
            for position, candidate in enumerate(self._entries):
                if candidate is entry:
                    self._entries.insert(0, self._entries.pop(position))
                    return

    def _remove(self, entry: tuple[Guard, V]) -> None:
        with self._lock:
            self._entries = [candidate for candidate in self._entries if candidate is not entry]
