"""A kernel for one sample of a batch, which runs for each of them.

It is planned with a few samples in the place of all, which is as fast for thousands as for a few.
That the function computes every sample in that way, however many there are, is proved on its
derivative: with a few samples it is the same operations, on smaller tensors
(`compiler.batch_invariance`), and samples are independent. What it gives for all of them is
compared with passes, as always.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from torchjac._torch.trace.recording import Recording, without_last
from torchjac.call import Call, variables
from torchjac.capture.linear_program import LinearProgram
from torchjac.capture.trace import trace_function, trace_value
from torchjac.compiler.accumulate.output import Target
from torchjac.compiler.batch_invariance import alike, fewer, several_fewer
from torchjac.compiler.codegen.build import build_batch_source
from torchjac.compiler.codegen.executable import Executable
from torchjac.compiler.codegen.target import SourceUnit
from torchjac.compiler.compiled import Tried
from torchjac.compiler.native import PATIENCE, first_written, jacobian_of
from torchjac.compiler.orders import Limits, ways
from torchjac.compiler.program.record import recording_of
from torchjac.compiler.program.tensor_program import TensorProgram
from torchjac.errors import CaptureRefused, PlanRefused
from torchjac.host.clock import now
from torchjac.host.costs import cost_model
from torchjac.request import Mode
from torchjac.sparsity.detect import KEEP
from torchjac.sparsity.interpret import interpret
from torchjac.sparsity.lanes import is_batched

# Times the predicted seconds of operations that a kernel may be predicted to take: both are rough.
_ROUGHLY = 3.0
# Numbers that intermediate values may have, for a few samples.
_NUMBERS = 2**23
# Seconds that it may take to plan: at least, and for each operation of the derivative.
_LIMIT, _NODE = 1.0, 4e-3
# Numbers of samples of which all that depends on them is read off: a line through two, which the
# third must be on.
_SIZES = 3


def sampled(
    call: Call,
    derivative: LinearProgram,
    batch: int,
    orders: Sequence[Mode],
    pushes: bool,
) -> tuple[TensorProgram, tuple[Tried, ...]]:
    """A kernel for each sample, and what was tried on the way to it.

    Args:
        call: The function and its arguments.
        derivative: Its derivative.
        batch: How many samples there are.
        orders: Orders of elimination to try.
        pushes: Whether forward is one of them.

    Raises:
        CaptureRefused: It cannot be traced with fewer samples.
        PlanRefused: There are not many samples, or there is no kernel of one, or it is not expected
            to be faster than operations on whole tensors.
    """
    smaller = fewer(call, batch)
    if smaller is None:
        raise PlanRefused("there are not many samples")
    less, few = smaller
    own = _traced(less, few, derivative, batch)
    if not is_batched(own, interpret(own)):
        raise PlanRefused("samples are not proved to be independent")
    limit = _LIMIT + _NODE * len(own.module.graph.nodes)
    limits = Limits(_NUMBERS, now() + limit)
    programs = list(ways(less, own, pushes, Target(None, True), orders, limits))
    tried = [Tried(mode, refused=way) for mode, way in programs if isinstance(way, str)]
    made = [replace(way, samples=(few, batch)) for _, way in programs if not isinstance(way, str)]
    if not made:
        raise PlanRefused("; ".join(dict.fromkeys([str(t.refused) for t in tried])))
    emitted, text = first_written(made, _written)
    operations = cost_model().seconds(emitted.work)
    if text.source.seconds > _ROUGHLY * operations:
        raise PlanRefused(f"it takes {text.source.work} scalar products for each sample")
    emitted = replace(emitted, kernel=Executable(text, PATIENCE))
    return emitted, (Tried(emitted.mode, operations, form=emitted.form), *tried)


def of_several_sizes(
    call: Call, derivative: LinearProgram, batch: int, mode: Mode
) -> list[tuple[int, Recording, Recording]]:
    """Numbers of samples, and the function and its Jacobian for each, operation by operation.

    Args:
        call: The function and its arguments.
        derivative: Its derivative.
        batch: How many samples there are.
        mode: The order of elimination.

    Raises:
        CaptureRefused: It cannot be traced with fewer samples.
        PlanRefused: There are not many samples, or it cannot be accumulated with fewer.
    """
    found = []
    for less, few in islice(several_fewer(call, batch), _SIZES):
        own = _traced(less, few, derivative, batch)
        limit = _LIMIT + _NODE * len(own.module.graph.nodes)
        limits = Limits(_NUMBERS, now() + limit)
        ((_, way),) = ways(less, own, True, Target(None, True), (mode,), limits)
        if isinstance(way, str):
            raise PlanRefused(way)
        inputs = [x.detach().contiguous() for x in variables(less)]
        value = recording_of(trace_value(less, KEEP), inputs)
        found.append((few, value, without_last(way.recording)))
    if len(found) < _SIZES:
        raise PlanRefused("there are not many samples")
    return found


def _traced(less: Call, few: int, derivative: LinearProgram, batch: int) -> LinearProgram:
    """The derivative with few samples, which is that with all of them but for its size.

    Raises:
        CaptureRefused: It cannot be traced.
        PlanRefused: It is another one, or the function fails.
    """
    try:
        own = trace_function(less, KEEP)
    except CaptureRefused:
        raise
    except Exception as error:  # the function's own: it need not know what to do with so few
        raise PlanRefused(f"with fewer samples it fails: {type(error).__name__}") from error
    if not alike(own.module, derivative.module, few, batch):
        raise PlanRefused("with fewer samples it runs other operations")
    return own


def compiled_again(emitted: TensorProgram) -> TensorProgram:
    """A program for a few samples that was loaded, with its kernel for all of them.

    Raises:
        PlanRefused: It has none.
    """
    return replace(emitted, kernel=Executable(_written(emitted)))


def _written(emitted: TensorProgram) -> SourceUnit:
    assert emitted.samples is not None, "it is for a few samples"
    return build_batch_source([jacobian_of(emitted)], *emitted.samples)
