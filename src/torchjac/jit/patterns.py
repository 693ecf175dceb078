"""What earlier calls of one function have shown, used only while nothing has changed.

A capture holds for a call if everything that the function could read is as it was (`guards.guard`
says what that is, and what no guard can see). A function of which that cannot be told, or that
changes all the time, is not captured again and again: it is treated as one that is not known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from torchjac._torch import modes
from torchjac.call import Call
from torchjac.capture.eager_graph import EagerGraph
from torchjac.errors import CaptureRefused, PatternError
from torchjac.guards.builder import Policy
from torchjac.guards.objects import inert
from torchjac.host.memory import default_budget
from torchjac.jit.cache import CaptureCache
from torchjac.passes.candidates import plain_seconds
from torchjac.request import Output, Sparse
from torchjac.sparsity.detect import global_pattern, is_independent, pattern_of_graph
from torchjac.sparsity.pattern import Pattern, user_pattern

V = TypeVar("V")

# Seconds that a proof takes.
_PROOF = 0.03
# Captures in a row that were not used again, after which the next one waits.
_PATIENCE = 3
# It waits for two to the power of their number calls, and at most of this number.
_DOUBLINGS = 12


@inert
class Memos:
    """The pattern of one function, and whether its samples are independent."""

    def __init__(self) -> None:
        """Begins with nothing."""
        self._patterns: _Memo[Pattern] = _Memo(_global_pattern)
        self._independent: _Memo[bool] = _Memo(_proved)
        self._seconds = 0.0

    def pattern(self, call: Call, program: EagerGraph) -> Pattern | None:
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
    """Remembers what was made for calls of one function; waits where that does not pay."""

    def __init__(self, make: Callable[[Call], V | None]):
        """Takes what makes a value, or None where there is none."""
        self._make = make
        # What training changes is not part of a pattern: parameters count by their shape.
        self._cache: CaptureCache[tuple[V | None]] = CaptureCache(
            policy=Policy(parameters="shapes")
        )
        self._unused = 0
        self._rest = 0

    def find(self, call: Call) -> V | None:
        """What was made for a call like this one; made now if it is worth a try."""
        found = self._cache.lookup(call)
        if found is not None:
            self._unused = 0
            return found[0]
        if self._rest:
            self._rest -= 1
            return None
        self._unused += 1
        (value,) = self._cache.get_or_make(call, lambda: (self._make(call),))
        if self._cache.refused is not None:
            self._unused = max(self._unused, _PATIENCE)
        if self._unused >= _PATIENCE:
            self._rest = 2 ** min(self._unused, _DOUBLINGS)
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


# Seconds that tracing a graph takes, and an operation of it (2 cores, torch 2.13).
_TRACE, _TRACE_NODE = 3e-3, 0.3e-3


def with_pattern(output: Output, program: EagerGraph, find: Callable[[], Pattern | None]) -> Output:
    """The output with the pattern that passes are restricted to, if there is one.

    Args:
        output: What of the Jacobian is wanted.
        program: The eager graph that is differentiated.
        find: Finds the pattern of the program.

    Raises:
        PatternError: The user's pattern does not fit the program.
    """
    if not isinstance(output, Sparse):
        return output
    if output.user_pattern is not None:
        shapes = [[tuple(t.shape) for t in leaves] for leaves in _leaves(program)]
        pattern: Pattern | None = user_pattern(output.user_pattern, *shapes)
    elif modes.tracing(program.inputs) or not program.outputs or not program.inputs:
        pattern = None
    else:
        pattern = find()
    if pattern is None or not all(pattern.shape):
        return output
    if program.batch is not None and not pattern.batched and output.user_pattern is None:
        return output  # samples may be coupled: plain passes find out, and say where
    return output.of_pattern(pattern)


def pattern_if_worth(program: EagerGraph) -> Pattern | None:
    """The pattern of a graph, where finding it costs less than it can save."""
    nodes, seconds = plain_seconds(program, default_budget(program.device))
    if seconds < 2 * (_TRACE + _TRACE_NODE * nodes):
        return None
    try:
        return pattern_of_graph(program)
    except (CaptureRefused, PatternError):
        return None


def _leaves(program: EagerGraph) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    return program.nest.outputs, program.nest.inputs
