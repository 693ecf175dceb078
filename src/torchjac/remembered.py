"""What earlier calls of one function have shown, used only while nothing has changed.

A capture holds for a call if everything that the function could read is as it was (`capture.guards`
says what that is, and what no guard can see). A function of which that cannot be told, or that
changes all the time, is not captured again and again: it is treated as one that is not known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from torchjac.capture import Call, Program
from torchjac.capture.cache import CaptureCache
from torchjac.capture.objects import inert
from torchjac.capture.watch import Policy
from torchjac.sparsity import pattern_if_worth
from torchjac.structure import Pattern, global_pattern, is_independent

V = TypeVar("V")

# Seconds that a proof takes.
_PROOF = 0.03
# Captures that were not used again before this function is no longer captured.
_PATIENCE = 3


@inert
class Remembered:
    """The pattern of one function, and whether its samples are independent."""

    def __init__(self) -> None:
        """Begins with nothing."""
        self._patterns: _Memo[Pattern] = _Memo(_global_pattern)
        self._independent: _Memo[bool] = _Memo(_proved)
        self._seconds = 0.0

    def pattern(self, call: Call, program: Program) -> Pattern | None:
        """The pattern at these arguments: for every input if possible, else of this graph."""
        return self._patterns.find(call) or pattern_if_worth(program)

    def independent(self, call: Call) -> bool:
        """Whether the samples of a batch are proved to be independent.

        The proof takes longer than a few evaluations, so it waits until calls have taken longer.
        """
        return self._seconds > _PROOF and bool(self._independent.find(call))

    def spent(self, seconds: float) -> None:
        """Notes how long a call took."""
        self._seconds += seconds


class _Memo(Generic[V]):
    """Remembers what was made for calls of one function; gives up where that does not pay."""

    def __init__(self, make: Callable[[Call], V | None]):
        """Takes what makes a value, or None where there is none."""
        self._make = make
        # What training changes is not part of a pattern: parameters count by their shape.
        self._cache: CaptureCache[tuple[V | None]] = CaptureCache(
            policy=Policy(parameters="shapes")
        )
        self._unused = 0

    def find(self, call: Call) -> V | None:
        """What was made for a call like this one; made now if it is worth a try."""
        found = self._cache.lookup(call)
        if found is not None:
            self._unused = 0
            return found[0]
        if self._unused >= _PATIENCE:
            return None
        self._unused += 1
        (value,) = self._cache.get_or_make(call, lambda: (self._make(call),))
        if self._cache.refused is not None:
            self._unused = _PATIENCE
        return value


def _global_pattern(call: Call) -> Pattern | None:
    try:
        return global_pattern(call)
    except Exception:  # a Jacobian can be had without: what went wrong shows in .pattern()
        return None


def _proved(call: Call) -> bool:
    try:
        return is_independent(call)
    except Exception:  # the samples are tested instead
        return False
