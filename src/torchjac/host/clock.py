"""The clock: every duration in torchjac is a difference of two readings of it.

Tests and the process replay put a clock of their own in its place, so that nothing they decide
depends on the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

# A reading in seconds, from an arbitrary origin.
Clock = Callable[[], float]

_clock: Clock = perf_counter


def now() -> float:
    """A reading of the clock, in seconds from an arbitrary origin."""
    return _clock()


@contextmanager
def clock(replacement: Clock) -> Iterator[None]:
    """Replaces the clock of the process.

    Args:
        replacement: Returns seconds, never fewer than at the call before.
    """
    global _clock
    previous, _clock = _clock, replacement
    try:
        yield
    finally:
        _clock = previous
