"""Tensor programs as native code: the fastest of several, verified against tensor operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from torchjac._torch.trace.recording import Recording
from torchjac.compiler.accumulate.emit import elsewhere
from torchjac.compiler.codegen.build import build_source
from torchjac.compiler.codegen.executable import Executable
from torchjac.compiler.codegen.target import COMPILE_SECONDS, SourceUnit
from torchjac.compiler.program.tensor_program import TensorProgram
from torchjac.compiler.program.work import numbers_of
from torchjac.errors import PlanRefused
from torchjac.host.contest import Contest, Rules, hold
from torchjac.host.costs import (
    build_seconds,
    cost_model,
    lowering_seconds,
    scalar_products,
)
from torchjac.host.gc_pause import gc_paused

C = TypeVar("C")

# Seconds that the C compiler may take without `compile=True`.
PATIENCE = 10.0
# Seconds that lowering may take, predicted, for several programs to be compared as native code.
_BRIEF = 0.7
# A program that computes this many times more numbers than the smallest one is not compared.
_CLOSE = 2.0
# Timed runs of a program; the best time counts.
_RULES = Rules(runs=5)
# Differences that are rounding, by dtype: relative to an element, and to the largest element. Sine
# and its kin are within four units in the last place, and sums may cancel.
_ROUNDING = {torch.float64: (1e-7, 2e-11), torch.float32: (1e-2, 1e-5)}


def kernel_seconds(programs: Sequence[TensorProgram]) -> float:
    """Predicted seconds of building native code of one of some programs."""
    return build_seconds(min(numbers_of(p.recording) for p in programs))


def _lowering_seconds(program: TensorProgram) -> float:
    """Predicted seconds of lowering and rendering a program."""
    return lowering_seconds(numbers_of(program.recording))


def render_in_order(
    programs: Sequence[TensorProgram],
    render: Callable[[TensorProgram], SourceUnit],
    refusals: list[str],
) -> Iterator[tuple[TensorProgram, SourceUnit]]:
    """Yields programs with their source units, the one that should run fastest first.

    The fastest program of tensor operations need not be the fastest as native code. The count of
    numbers that a program computes ranks programs roughly. Programs with close counts are all
    rendered, where that is brief, and ranked by the work of the source.

    Args:
        programs: Programs of the same Jacobian.
        render: Renders a program.
        refusals: Reasons that programs cannot be rendered are appended.
    """
    waiting = sorted(programs, key=_lowering_seconds)
    while waiting:
        least = _lowering_seconds(waiting[0])
        close = [p for p in waiting if _lowering_seconds(p) <= _CLOSE * least]
        count = len(close) if sum(map(_lowering_seconds, close)) < _BRIEF else 1
        units = []
        for program in waiting[:count]:
            try:
                units.append((program, render(program)))
            except PlanRefused as refusal:
                refusals.append(str(refusal))
            except Exception as error:  # tensor operations give the result; the record has this
                refusals.append(f"{type(error).__name__}: {error}")
        waiting = waiting[count:]
        yield from sorted(units, key=lambda pair: scalar_products(pair[1].source.work))


@gc_paused()
def with_kernel(
    programs: Sequence[TensorProgram],
    inputs: Sequence[Tensor],
    samples: int | None,
    limit: float = COMPILE_SECONDS,
) -> TensorProgram:
    """One of some programs with its kernel: the program that should be fastest as native code.

    Args:
        programs: Programs of the same Jacobian; the first one is verified.
        inputs: Inputs to compare native code with the first program at.
        samples: The number of independent samples; None without a batch.
        limit: Seconds that the C compiler may take.

    Raises:
        PlanRefused: No program has native code that gives the same.
    """
    refusals: list[str] = []
    with torch.no_grad():
        want = programs[0](inputs)

    def render(program: TensorProgram) -> SourceUnit:
        return build_source([jacobian_of(program)], samples)

    for program, unit in render_in_order(programs, render, refusals):
        try:
            native = replace(
                program, run=program.module.forward, kernel=Executable(unit, limit), refusal=None
            )
            with torch.no_grad():
                got = native([elsewhere(x) for x in inputs])
            if want is not None and got is not None and all(map(agree, got, want)):
                return native
            refusals.append("the kernel does not give what its operations give")
        except PlanRefused as refusal:
            refusals.append(str(refusal))
        except Exception as error:  # tensor operations give the result; the record has this
            refusals.append(f"{type(error).__name__}: {error}")
    raise PlanRefused("; ".join(dict.fromkeys(refusals)))


def render_first(
    programs: Sequence[TensorProgram], render: Callable[[TensorProgram], SourceUnit]
) -> tuple[TensorProgram, SourceUnit]:
    """The program that should run fastest as native code, with its source unit.

    Raises:
        PlanRefused: No program can be rendered.
    """
    refusals: list[str] = []
    for pair in render_in_order(programs, render, refusals):
        return pair
    raise PlanRefused("; ".join(dict.fromkeys(refusals)))


def jacobian_of(program: TensorProgram) -> tuple[Recording, int]:
    """The recording, and the number of its outputs without the last one: the sum of all entries."""
    return program.recording, len(program.recording.outputs) - 1


def compare_times(
    programs: Mapping[C, TensorProgram], inputs: Sequence[Tensor], rules: Rules = _RULES
) -> Contest[C]:
    """The contest of some programs, after their runs.

    Args:
        programs: Programs that give the same.
        inputs: Inputs to run them at.
        rules: Thresholds of the contest.
    """
    predicted = {name: cost_model().seconds(program.work) for name, program in programs.items()}
    with torch.no_grad():
        contest = Contest(dict(sorted(predicted.items(), key=lambda item: item[1])), rules)
        return hold(contest, lambda name: programs[name](inputs))


def agree(got: Tensor, want: Tensor) -> bool:
    """Whether two results differ by rounding only."""
    if not want.numel():
        return True
    relative, absolute = _ROUNDING[want.dtype]
    allowed = relative * want.abs() + absolute * want.abs().amax()
    return bool(((got - want).abs() <= allowed).all())
