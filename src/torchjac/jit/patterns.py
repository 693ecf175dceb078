"""Patterns and independence proofs of one function, memoized under guards.

A memoized value holds for a call if its guard does (`guards.guard`). A function that has no guard,
or whose state changes all the time, is analyzed ever less often, and counts as unknown in between.
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

# Seconds: a proof of independence waits until passes have taken longer.
_PROOF_SECONDS = 0.03
# Misses in a row after which the memo skips calls.
_MAX_MISSES = 3
# The memo skips 2^misses calls; the exponent is at most this.
_MAX_DOUBLINGS = 12
# Seconds that tracing any graph takes (2 cores, torch 2.13).
_TRACE_SECONDS = 3e-3
# Seconds that tracing takes for each operation of the graph (2 cores, torch 2.13).
_TRACE_SECONDS_PER_NODE = 0.3e-3
# A pattern is detected if passes take this many times longer than tracing.
_MIN_GAIN = 2


@inert
class Memos:
    """Memoizes the pattern of one function, and whether its samples are independent."""

    def __init__(self) -> None:
        """Starts with empty memos."""
        self._patterns: _Memo[Pattern] = _Memo(_global_pattern)
        self._independent: _Memo[bool] = _Memo(_is_independent)
        self._seconds = 0.0

    def pattern(self, call: Call, graph: EagerGraph) -> Pattern | None:
        """The pattern at the arguments of a call, global if possible; None if it does not pay."""
        return self._patterns.lookup(call) or pattern_if_it_pays(graph)

    def independent(self, call: Call) -> bool:
        """Whether the samples of a batch are proved to be independent.

        The proof takes longer than a few evaluations: it waits until passes have taken longer.
        """
        return self._seconds > _PROOF_SECONDS and bool(self._independent.lookup(call))

    def add_run_time(self, seconds: float) -> None:
        """Adds the seconds that a call took by passes."""
        self._seconds += seconds


class _Memo(Generic[V]):
    """Memoizes an analysis of calls of one function; backs off while its results are not reused."""

    def __init__(self, analyze: Callable[[Call], V | None]):
        """Starts empty.

        Args:
            analyze: Computes the value for a call; None if there is none.
        """
        self._analyze = analyze
        # The values of parameters are no part of a pattern: guards compare their shapes.
        self._cache: CaptureCache[tuple[V | None]] = CaptureCache(
            policy=Policy(parameters="shapes")
        )
        self._misses = 0  # in a row
        self._calls_to_skip = 0

    def lookup(self, call: Call) -> V | None:
        """The value for a call: memoized, or computed now; None if none, or while backing off."""
        cached = self._cache.lookup(call)
        if cached is not None:
            self._misses = 0
            return cached[0]
        if self._calls_to_skip:
            self._calls_to_skip -= 1
            return None
        self._misses += 1
        (value,) = self._cache.get_or_create(call, lambda: (self._analyze(call),))
        if self._cache.refused is not None:
            self._misses = max(self._misses, _MAX_MISSES)
        if self._misses >= _MAX_MISSES:
            self._calls_to_skip = 2 ** min(self._misses, _MAX_DOUBLINGS)
        return value


def _global_pattern(call: Call) -> Pattern | None:
    try:
        return global_pattern(call)
    except Exception:  # no pattern is needed here: the public `pattern()` raises the error
        return None


def _is_independent(call: Call) -> bool:
    try:
        return is_independent(call)
    except Exception:  # the samples are tested instead
        return False


def with_pattern(
    output: Output, graph: EagerGraph, lookup_pattern: Callable[[], Pattern | None]
) -> Output:
    """The output with the pattern that passes are restricted to, if it is sparse and has one.

    Args:
        output: The requested output.
        graph: The eager graph to differentiate.
        lookup_pattern: Returns the pattern of the graph; None if it is unknown. Called only where
            the user gives no pattern.

    Raises:
        PatternError: The shape of the user's pattern differs from that of the Jacobian.
    """
    if not isinstance(output, Sparse):
        return output
    if output.user_pattern is not None:
        shapes = [[tuple(t.shape) for t in leaves] for leaves in _leaves(graph)]
        pattern: Pattern | None = user_pattern(output.user_pattern, *shapes)
    elif modes.tracing(graph.inputs) or not graph.outputs or not graph.inputs:
        pattern = None
    else:
        pattern = lookup_pattern()
    if pattern is None or not all(pattern.shape):
        return output
    if graph.batch is not None and not pattern.batched and output.user_pattern is None:
        return output  # samples may be coupled: plain passes test it, and name the samples
    return output.of_pattern(pattern)


def pattern_if_it_pays(graph: EagerGraph) -> Pattern | None:
    """The pattern of a graph; None if detection is predicted to cost more than it can save."""
    nodes, seconds = plain_seconds(graph, default_budget(graph.device))
    if seconds < _MIN_GAIN * (_TRACE_SECONDS + _TRACE_SECONDS_PER_NODE * nodes):
        return None
    try:
        return pattern_of_graph(graph)
    except (CaptureRefused, PatternError):
        return None


def _leaves(graph: EagerGraph) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    return graph.nest.outputs, graph.nest.inputs
