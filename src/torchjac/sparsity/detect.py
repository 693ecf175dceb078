"""Detection: the pattern of a function or of a graph."""

from __future__ import annotations

from dataclasses import replace

from torchjac.call import Call
from torchjac.capture.eager import capture_function
from torchjac.capture.eager_graph import EagerGraph
from torchjac.capture.trace import trace_function, trace_graph
from torchjac.errors import CaptureRefused
from torchjac.linear.rules import RULES
from torchjac.sparsity.interpret import interpret
from torchjac.sparsity.lanes import is_batched
from torchjac.sparsity.pattern import Pattern, pattern_of

KEEP = frozenset(RULES)


def global_pattern(call: Call) -> Pattern:
    """The pattern of a function, valid for every input of these shapes.

    Raises:
        CaptureRefused: The control flow of the function depends on values, or a trace fails.
        PatternError: The pattern does not fit into memory.
    """
    program = trace_function(call, KEEP)
    return pattern_of(program, interpret(program))


def pattern_of_function(call: Call) -> Pattern:
    """The pattern of a function, valid for every input of these shapes if possible.

    If control flow or shapes depend on values, the function is evaluated once. The pattern is then
    the pattern of its graph, valid for these values only, with the reason.

    Raises:
        CaptureRefused: The graph cannot be traced either.
        PatternError: The pattern does not fit into memory.
    """
    try:
        return global_pattern(call)
    except CaptureRefused as refusal:
        # Errors of the user's function are raised here.
        graph, _ = capture_function(call, batched=False, create_graph=False, replayable=False)
        return replace(pattern_of_graph(graph), reason=str(refusal))


def is_independent(call: Call) -> bool:
    """Whether the leading axes of a function's inputs and outputs are a batch, for every input.

    False means that there is no proof, not that samples are coupled.

    Raises:
        CaptureRefused: The control flow of the function depends on values, or a trace fails.
    """
    program = trace_function(call, KEEP)
    return is_batched(program, interpret(program))


def pattern_of_graph(graph: EagerGraph) -> Pattern:
    """The pattern of an existing autograd graph, valid for the values of its recording only.

    Raises:
        CaptureRefused: The backward pass of the graph cannot be traced.
        PatternError: The pattern does not fit into memory.
    """
    program = trace_graph(graph, KEEP)
    return pattern_of(program, interpret(program))
