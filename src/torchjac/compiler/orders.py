"""Orders of elimination: a program for each, ranked by predicted and measured seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from torchjac.call import Call, arguments
from torchjac.capture.linear_program import LinearProgram
from torchjac.capture.trace import trace_transposed
from torchjac.compiler.accumulate.emit import emit
from torchjac.compiler.accumulate.output import Goal
from torchjac.compiler.compiled import Tried
from torchjac.compiler.native import compare_times
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
# Share of the time that the first order may take before the second one is left out.
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
            derivative: The derivative of the function.
            most: Numbers that intermediate values may have.
            started: The reading of the clock at which planning started.
            passes: Predicted seconds of passes; 0 where planning must not depend on them.
        """
        nodes = len(derivative.module.graph.nodes)
        seconds = _PLANNING + _PLANNING_PASSES * passes + _PLANNING_NODE * nodes
        return cls(most, started + seconds)


def eliminate(
    call: Call,
    derivative: LinearProgram,
    transposable: bool,
    goal: Goal,
    orders: Sequence[Mode],
    limits: Limits,
) -> Iterator[tuple[Mode, TensorProgram | str]]:
    """Yields each order of elimination with its program, or with the reason that there is none.

    Args:
        call: The function and its arguments.
        derivative: The derivative of the function.
        transposable: Whether the backward pass is proved linear, so that its transpose is v ↦ Jv.
        goal: What is accumulated.
        orders: The orders.
        limits: Limits of planning.
    """
    started, inputs = now(), arguments(call)

    def trace(mode: Mode) -> LinearProgram:
        if mode == "reverse":
            return derivative
        if not transposable:
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
            seconds = limits.deadline - now()
            yield mode, emit(traced, inputs, replace(goal, mode=mode), limits.most, seconds)
        except (RefusedHere, NotKnownLinear):
            raise
        except (PlanRefused, CaptureRefused) as refusal:
            yield mode, str(refusal)
        except Exception as error:  # the other order, or passes, give the result
            yield mode, f"{type(error).__name__}: {error}"


def rank(
    programs: Sequence[tuple[Mode, TensorProgram | str]], inputs: Sequence[Tensor]
) -> tuple[list[TensorProgram], tuple[Tried, ...]]:
    """Programs, the fastest first; and all orders that were tried.

    Predicted seconds decide; where these are close, measured ones.

    Args:
        programs: Orders with their programs, or with the reasons that there are none.
        inputs: Inputs to run programs at.

    Raises:
        PlanRefused: There is no program.
    """
    refused = [Tried(mode, refused=text) for mode, text in programs if isinstance(text, str)]
    modes = {p.mode: p for _, p in programs if not isinstance(p, str)}
    if not modes:
        raise PlanRefused(str(refused[0].refused))
    calibrated()  # predictions that are compared are those of this machine
    contest = compare_times(modes, inputs, _RULES if len(modes) > 1 else Rules(runs=0))
    tried = [Tried(m, seconds, contest.best(m)) for m, seconds in contest.predicted.items()]
    return [modes[mode] for mode in fastest_first(contest)], (*tried, *refused)
