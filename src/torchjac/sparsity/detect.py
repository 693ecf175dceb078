"""From a function or a graph to its pattern, in one step."""

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
        CaptureRefused: What the function does depends on values, or cannot be traced.
        PatternError: The pattern does not fit into memory.
    """
    derivative = trace_function(call, KEEP)
    return pattern_of(derivative, interpret(derivative))


def pattern_of_function(call: Call) -> Pattern:
    """The pattern of a function, valid for every input of these shapes where that is possible.

    A function whose control flow or shapes depend on values is evaluated; its pattern is then that
    of the graph it made, for these values, and says why.

    Raises:
        CaptureRefused: Not even the graph can be traced.
        PatternError: The pattern does not fit into memory.
    """
    try:
        return global_pattern(call)
    except CaptureRefused as refusal:
        # Errors of the function are its own: they are raised here.
        program, _ = capture_function(call, batched=False, create_graph=False, replayable=False)
        return replace(pattern_of_graph(program), reason=str(refusal))


def is_independent(call: Call) -> bool:
    """Whether the leading axes of a function's inputs and outputs are a batch, for every input.

    False does not mean that samples are coupled: it may just not be seen.

    Raises:
        CaptureRefused: What the function does depends on values, or cannot be traced.
    """
    derivative = trace_function(call, KEEP)
    return is_batched(derivative, interpret(derivative))


def pattern_of_graph(program: EagerGraph) -> Pattern:
    """The pattern of a graph that exists, valid for the values it was recorded with.

    Raises:
        CaptureRefused: Its backward pass cannot be traced.
        PatternError: The pattern does not fit into memory.
    """
    derivative = trace_graph(program, KEEP)
    return pattern_of(derivative, interpret(derivative))
