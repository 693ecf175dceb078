"""Programs for a few samples of a batch, with a kernel that runs for each sample.

Planning with a few samples takes as long for thousands of samples as for a few. The function
computes each sample in the same way, whatever their number: this is proved on its derivative,
which has the same operations on smaller tensors (`compiler.batch_invariance`), and samples are
independent. The Jacobian of all samples is compared with passes, as always.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from torchjac._torch.trace.recording import Recording, without_last
from torchjac.call import Call, variables
from torchjac.capture.linear_program import LinearProgram
from torchjac.capture.trace import trace_function, trace_value
from torchjac.compiler.accumulate.output import Goal
from torchjac.compiler.batch_invariance import few_sample_calls, first_samples, is_batch_invariant
from torchjac.compiler.codegen.build import build_batch_source
from torchjac.compiler.codegen.executable import Executable
from torchjac.compiler.codegen.target import SourceUnit
from torchjac.compiler.compiled import Tried
from torchjac.compiler.native import PATIENCE, jacobian_of, render_first
from torchjac.compiler.orders import Limits, eliminate
from torchjac.compiler.program.record import recording_of
from torchjac.compiler.program.tensor_program import TensorProgram
from torchjac.errors import CaptureRefused, PlanRefused
from torchjac.host.clock import now
from torchjac.host.costs import cost_model, scalar_seconds
from torchjac.request import Dense, Mode
from torchjac.sparsity.detect import KEEP
from torchjac.sparsity.interpret import interpret
from torchjac.sparsity.lanes import is_batched

# A kernel predicted this many times slower than tensor operations is refused: both predictions are
# rough.
_ROUGHLY = 3.0
# Numbers that intermediate values may have, for a few samples.
_NUMBERS = 2**23
# Numbers of samples to record at: a line through two of them, and a third one on the line.
_SIZES = 3


def compile_per_sample(
    call: Call,
    derivative: LinearProgram,
    batch: int,
    orders: Sequence[Mode],
    transposable: bool,
) -> tuple[TensorProgram, tuple[Tried, ...]]:
    """A program with a kernel for each sample, and all orders that were tried.

    Args:
        call: The function and its arguments.
        derivative: The derivative of the function.
        batch: The number of samples.
        orders: Orders of elimination to try.
        transposable: Whether the backward pass is proved linear, so that forward order is possible.

    Raises:
        CaptureRefused: The function cannot be traced with fewer samples.
        PlanRefused: There are not many samples, or there is no kernel of one, or it is predicted to
            be slower than operations on whole tensors.
    """
    smaller = first_samples(call, batch)
    if smaller is None:
        raise PlanRefused("there are not many samples")
    small, few = smaller
    traced = _trace(small, few, derivative, batch)
    if not is_batched(traced, interpret(traced)):
        raise PlanRefused("samples are not proved to be independent")
    limits = Limits.of(traced, _NUMBERS, now())
    goal = Goal(Dense(), batched=True)
    eliminated = list(eliminate(small, traced, transposable, goal, orders, limits))
    tried = [Tried(mode, refused=text) for mode, text in eliminated if isinstance(text, str)]
    programs = [replace(p, samples=(few, batch)) for _, p in eliminated if not isinstance(p, str)]
    if not programs:
        raise PlanRefused("; ".join(dict.fromkeys([str(t.refused) for t in tried])))
    program, unit = render_first(programs, _render)
    seconds, work = cost_model().seconds(program.work), unit.source.work
    if scalar_seconds(work) > _ROUGHLY * seconds:
        raise PlanRefused(f"it takes {work.sample_products} scalar products for each sample")
    program = replace(program, kernel=Executable(unit, PATIENCE))
    return program, (Tried(program.mode, seconds, form=program.form), *tried)


def record_at_sizes(
    call: Call, derivative: LinearProgram, batch: int, mode: Mode
) -> list[tuple[int, Recording, Recording]]:
    """Numbers of samples, each with the recordings of the function and of its Jacobian.

    Args:
        call: The function and its arguments.
        derivative: The derivative of the function.
        batch: The number of samples of the call.
        mode: The order of elimination.

    Raises:
        CaptureRefused: The function cannot be traced with fewer samples.
        PlanRefused: There are not many samples, or it cannot be accumulated with fewer.
    """
    recordings = []
    for small, few in islice(few_sample_calls(call, batch), _SIZES):
        traced = _trace(small, few, derivative, batch)
        limits = Limits.of(traced, _NUMBERS, now())
        goal = Goal(Dense(), batched=True)
        ((_, program),) = eliminate(small, traced, True, goal, (mode,), limits)
        if isinstance(program, str):
            raise PlanRefused(program)
        inputs = [x.detach().contiguous() for x in variables(small)]
        value = recording_of(trace_value(small, KEEP), inputs)
        recordings.append((few, value, without_last(program.recording)))
    if len(recordings) < _SIZES:
        raise PlanRefused("there are not many samples")
    return recordings


def _trace(small: Call, few: int, derivative: LinearProgram, batch: int) -> LinearProgram:
    """The derivative with a few samples, which is that with all samples but for sizes.

    Raises:
        CaptureRefused: It cannot be traced.
        PlanRefused: It has other operations, or the function fails.
    """
    try:
        traced = trace_function(small, KEEP)
    except CaptureRefused:
        raise
    except Exception as error:  # of the function, which need not work with so few samples
        raise PlanRefused(f"with fewer samples it fails: {type(error).__name__}") from error
    if not is_batch_invariant(traced.module, derivative.module, few, batch):
        raise PlanRefused("with fewer samples it runs other operations")
    return traced


def with_per_sample_kernel(program: TensorProgram) -> TensorProgram:
    """A loaded program for a few samples, with its kernel for all samples.

    Raises:
        PlanRefused: It has none.
    """
    return replace(program, kernel=Executable(_render(program)))


def _render(program: TensorProgram) -> SourceUnit:
    assert program.samples is not None, "it is for a few samples"
    return build_batch_source([jacobian_of(program)], *program.samples)
