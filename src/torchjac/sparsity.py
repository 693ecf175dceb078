"""Where the pattern of a sparse Jacobian comes from: the user, an earlier call, or the program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from torchjac._torch import modes
from torchjac.capture import Program
from torchjac.errors import CaptureRefused, PatternError
from torchjac.plan import default_budget, plain_seconds
from torchjac.solve import Request
from torchjac.structure import (
    Pattern,
    given_pattern,
    pattern_of_graph,
)

# Seconds that tracing a graph takes, and an operation of it (2 cores, torch 2.13).
_TRACE, _TRACE_NODE = 3e-3, 0.3e-3


def with_pattern(
    request: Request, program: Program, given: Any, find: Callable[[], Pattern | None]
) -> Request:
    """The request with the pattern to restrict passes to, if there is one.

    Args:
        request: A request for a sparse result.
        program: What is differentiated.
        given: The user's pattern, or None.
        find: Finds the program's own.

    Raises:
        PatternError: The user's pattern does not fit the program.
    """
    if given is not None:
        shapes = [[tuple(t.shape) for t in leaves] for leaves in _leaves(program)]
        found: Pattern | None = given_pattern(given, *shapes)
    elif modes.tracing(program.inputs) or not program.outputs or not program.inputs:
        found = None
    else:
        found = find()
    if found is None or not all(found.shape):
        return request
    if program.batch is not None and not found.batched and given is None:
        return request  # samples may be coupled: the plain engine finds out, and says where
    return replace(request, pattern=found, pattern_given=given is not None)


def pattern_if_worth(program: Program) -> Pattern | None:
    """The pattern of a graph, where finding it costs less than it can save."""
    nodes, seconds = plain_seconds(program, default_budget(program.device))
    if seconds < 2 * (_TRACE + _TRACE_NODE * nodes):
        return None
    try:
        return pattern_of_graph(program)
    except (CaptureRefused, PatternError):
        return None


def _leaves(program: Program) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    return program.nest.outputs, program.nest.inputs
