"""Orders of elimination: a program for each, and which of them is the fastest as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from torchjac.call import Call, arguments
from torchjac.capture.linear_program import LinearProgram
from torchjac.capture.trace import trace_transposed
from torchjac.compiler.accumulate.emit import emit
from torchjac.compiler.accumulate.output import Target
from torchjac.compiler.compiled import Tried
from torchjac.compiler.native import timed
from torchjac.compiler.program.tensor_program import TensorProgram
from torchjac.errors import CaptureRefused, NotKnownLinear, PlanRefused, RefusedHere
from torchjac.host.clock import now
from torchjac.host.contest import Rules
from torchjac.host.contest import ranked as fastest_first
from torchjac.host.costs import calibrated
from torchjac.request import Mode
from torchjac.sparsity.detect import KEEP

# Three timed runs of each order; an order predicted 4x slower than the other one is not run.
_RULES = Rules(runs=3, hopeless=4.0)
# The second order is tried where the first took less than this share of the time there is.
_SHARE = 0.5


# Seconds that planning may take, whatever the function.
_PLANNING = 1.0
# Seconds that planning may take for each second that passes would take.
_PLANNING_PASSES = 4.0
# Seconds that planning may take for each operation of the derivative.
_PLANNING_NODE = 4e-3


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of planning.

    Attributes:
        most: Numbers that intermediate values may have.
        deadline: The reading of the clock at which planning stops.
    """

    most: int
    deadline: float

    @classmethod
    def of(
        cls, derivative: LinearProgram, most: int, started: float, passes: float = 0.0
    ) -> Limits:
        """The limits for one function.

        Args:
            derivative: Its derivative.
            most: Numbers that intermediate values may have.
            started: The reading of the clock at which planning started.
            passes: Predicted seconds of passes; 0 where planning must not depend on them.
        """
        nodes = len(derivative.module.graph.nodes)
        seconds = _PLANNING + _PLANNING_PASSES * passes + _PLANNING_NODE * nodes
        return cls(most, started + seconds)


def ways(
    call: Call,
    derivative: LinearProgram,
    pushes: bool,
    target: Target,
    orders: Sequence[Mode],
    limits: Limits,
) -> Iterator[tuple[Mode, TensorProgram | str]]:
    """A program for each order of elimination, or why there is none.

    Args:
        call: The function and its arguments.
        derivative: Its derivative.
        pushes: Whether the derivative of that is known to be the transposed one.
        target: What the result looks like.
        orders: The orders.
        limits: What this may take.
    """
    started, inputs = now(), arguments(call)

    def trace(mode: Mode) -> LinearProgram:
        if mode == "reverse":
            return derivative
        if not pushes:
            raise PlanRefused("the derivative of its backward pass is not known to be J")
        return trace_transposed(call, KEEP)

    for mode in orders:
        read = now()
        if mode != orders[0] and read - started > _SHARE * (limits.deadline - read):
            yield mode, "there was no time left to try it"
            return
        try:
            traced = trace(mode)
            if any(g is None for g in traced.cotangents):
                raise PlanRefused("a gradient does not depend on the cotangent")
            left = limits.deadline - now()
            yield mode, emit(traced, inputs, replace(target, mode=mode), limits.most, left)
        except (RefusedHere, NotKnownLinear):
            raise
        except (PlanRefused, CaptureRefused) as refusal:
            yield mode, str(refusal)
        except Exception as error:  # the other order, or passes, give the result; this is noted
            yield mode, f"{type(error).__name__}: {error}"


def ranked(
    found: Sequence[tuple[Mode, TensorProgram | str]], inputs: Sequence[Tensor]
) -> tuple[list[TensorProgram], tuple[Tried, ...]]:
    """Programs, the fastest first: as predicted, and as measured where that is close."""
    refused = [Tried(mode, refused=way) for mode, way in found if isinstance(way, str)]
    programs = [way for _, way in found if not isinstance(way, str)]
    if not programs:
        raise PlanRefused(str(refused[0].refused))
    calibrated()  # predictions that are compared are those of this machine
    modes = {way.mode: way for way in programs}
    contest = timed(modes, inputs, _RULES if len(modes) > 1 else Rules(runs=0))
    tried = [Tried(m, seconds, contest.best(m)) for m, seconds in contest.predicted.items()]
    return [modes[mode] for mode in fastest_first(contest)], (*tried, *refused)
