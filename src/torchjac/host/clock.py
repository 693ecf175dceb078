"""The clock: every duration in torchjac is the difference of two of its readings.

Tests and the process replay replace the clock: their decisions do not depend on the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

# A reading in seconds, from an arbitrary origin.
Clock = Callable[[], float]

_clock: Clock = perf_counter


def now() -> float:
    """Reads the clock, in seconds from an arbitrary origin."""
    return _clock()


@contextmanager
def clock(replacement: Clock) -> Iterator[None]:
    """Replaces the clock of the process.

    Args:
        replacement: Returns seconds that never decrease from one call to the next.
    """
    global _clock
    previous, _clock = _clock, replacement
    try:
        yield
    finally:
        _clock = previous
