"""Plans as compiled code: by the kernel engine, or by Inductor, where that runs faster."""

from __future__ import annotations

import math
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
from torchjac.errors import PlanRefused
from torchjac.host.contest import Contest, Rules, hold
from torchjac.host.costs import cost_model
from torchjac.host.gc_pause import gc_paused

C = TypeVar("C")

# Seconds that the compiler may take where nobody asked for it.
PATIENCE = 10.0
# Seconds that making a kernel takes: at least, and for each number that the operations give.
_KERNEL, _KERNEL_NUMBER = 0.5, 7e-8
# Seconds that it may take to write down more than one program, to choose among them.
_BRIEF = 0.7
# Programs that compute so many times as many numbers are not among them.
_CLOSE = 2.0
# Timed runs of a program; the best one counts.
_TIMED = Rules(runs=5)
# Disagreement put down to rounding, by dtype: of an element, and beside the largest one. Sine and
# its kin are within four units in the last place, and what follows may cancel.
_ROUNDING = {torch.float64: (1e-7, 2e-11), torch.float32: (1e-2, 1e-5)}


def kernel_seconds(programs: Sequence[TensorProgram]) -> float:
    """Seconds that it should take to make a kernel of one of some programs."""
    return _KERNEL + min(map(_writing_seconds, programs))


def _writing_seconds(program: TensorProgram) -> float:
    """Seconds that it should take to write a program down."""
    results = [v for c in program.recording.calls for v in c.results if v is not None]
    return _KERNEL_NUMBER * sum(math.prod(v.shape) for v in results)


def written_in_order(
    programs: Sequence[TensorProgram],
    write: Callable[[TensorProgram], SourceUnit],
    refusals: list[str],
) -> Iterator[tuple[TensorProgram, SourceUnit]]:
    """Programs in C, those first that should run fastest.

    What is the fastest as tensor operations need not be the fastest as scalar ones. How many
    numbers there are on the way says it roughly; where these are close and it does not take long,
    all are written, and what is in the text says it better.

    Args:
        programs: They give the same.
        write: Writes one down.
        refusals: Why some cannot be is added here.
    """
    waiting = sorted(programs, key=_writing_seconds)
    while waiting:
        least = _writing_seconds(waiting[0])
        close = [p for p in waiting if _writing_seconds(p) <= _CLOSE * least]
        count = len(close) if sum(map(_writing_seconds, close)) < _BRIEF else 1
        texts = []
        for program in waiting[:count]:
            try:
                texts.append((program, write(program)))
            except PlanRefused as refusal:
                refusals.append(str(refusal))
            except Exception as error:  # others do it; the record says what happened
                refusals.append(f"{type(error).__name__}: {error}")
        waiting = waiting[count:]
        yield from sorted(texts, key=lambda t: t[1].source.cost)


@gc_paused()
def with_kernel(
    programs: Sequence[TensorProgram],
    inputs: Sequence[Tensor],
    samples: int | None,
    limit: float = COMPILE_SECONDS,
) -> TensorProgram:
    """A program as a kernel: of those that give the same Jacobian the one that should be fastest.

    Args:
        programs: The programs; what the first one gives is right.
        inputs: What to try it on.
        samples: How many independent samples there are, if there are such.
        limit: Seconds that the compiler may take.

    Raises:
        PlanRefused: There is no kernel of any, or it gives something else.
    """
    refusals: list[str] = []
    with torch.no_grad():
        want = programs[0](inputs)

    def write(program: TensorProgram) -> SourceUnit:
        return build_source([jacobian_of(program)], samples)

    for program, text in written_in_order(programs, write, refusals):
        try:
            made = replace(
                program, run=program.module.forward, kernel=Executable(text, limit), note=None
            )
            with torch.no_grad():
                got = made([elsewhere(x) for x in inputs])
            if want is not None and got is not None and all(map(agree, got, want)):
                return made
            refusals.append("the kernel does not give what its operations give")
        except PlanRefused as refusal:
            refusals.append(str(refusal))
        except Exception as error:  # the operations give the result; the record says what happened
            refusals.append(f"{type(error).__name__}: {error}")
    raise PlanRefused("; ".join(dict.fromkeys(refusals)))


def first_written(
    programs: Sequence[TensorProgram], write: Callable[[TensorProgram], SourceUnit]
) -> tuple[TensorProgram, SourceUnit]:
    """The program in C that should run fastest.

    Raises:
        PlanRefused: None can be written.
    """
    refusals: list[str] = []
    for found in written_in_order(programs, write, refusals):
        return found
    raise PlanRefused("; ".join(dict.fromkeys(refusals)))


def jacobian_of(program: TensorProgram) -> tuple[Recording, int]:
    """The operations, without the last output: the number that says whether all is finite."""
    return program.recording, len(program.recording.outputs) - 1


def timed(
    programs: Mapping[C, TensorProgram], inputs: Sequence[Tensor], rules: Rules = _TIMED
) -> Contest[C]:
    """The contest of some programs, after their runs.

    Args:
        programs: Programs that give the same.
        inputs: Inputs to run them at.
        rules: How long they are run.
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
