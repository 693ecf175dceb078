"""A kernel for one sample of a batch, which runs for each of them.

It is planned with a few samples in the place of all, which is as fast for thousands as for a few.
That the function computes every sample in that way, however many there are, is proved on its
derivative: with a few samples it is the same operations, on smaller tensors (`capture.samples`),
and samples are independent. What it gives for all of them is compared with passes, as always.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter

import torch

from torchjac._torch.work import work_of
from torchjac.accumulated import Tried
from torchjac.capture import Call
from torchjac.capture.derivative import Derivative, trace_function
from torchjac.capture.samples import alike, fewer
from torchjac.compilation import PATIENCE, first_written, jacobian_of
from torchjac.engines.accumulate import Emitted, Mode, Target
from torchjac.engines.kernel import Kernel, Written, written_for_samples
from torchjac.errors import PlanRefused
from torchjac.orders import Limits, ways
from torchjac.plan.machine import machine
from torchjac.structure.detect import KEEP
from torchjac.structure.interpret import interpret
from torchjac.structure.lanes import is_batched

aten = torch.ops.aten
# Seconds that a scalar product takes in a kernel, at best.
_PRODUCT = 0.05e-9
# Products of a sample with matrices that all share, from which on these are left to torch.
_SHARED = 1500
# Numbers that intermediate values may have, for a few samples.
_NUMBERS = 2**23
# Seconds that it may take to plan: at least, and for each operation of the derivative.
_LIMIT, _NODE = 1.0, 4e-3


def sampled(
    call: Call,
    derivative: Derivative,
    batch: int,
    orders: Sequence[Mode],
    pushes: bool,
    predicted: float,
) -> tuple[Emitted, tuple[Tried, ...]]:
    """A kernel for each sample, and what was tried on the way to it.

    Args:
        call: The function and its arguments.
        derivative: Its derivative.
        batch: How many samples there are.
        orders: Orders of elimination to try.
        pushes: Whether forward is one of them.
        predicted: Seconds that passes should take.

    Raises:
        CaptureRefused: It cannot be traced with fewer samples.
        PlanRefused: There are not many samples, or there is no kernel of one, or it is not expected
            to be faster than passes or operations on whole tensors.
    """
    smaller = fewer(call, batch)
    if smaller is None:
        raise PlanRefused("there are not many samples")
    less, few = smaller
    own = trace_function(less, KEEP)
    if not alike(own.module, derivative.module, few, batch):
        raise PlanRefused("with fewer samples it runs other operations")
    if not is_batched(own, interpret(own)):
        raise PlanRefused("samples are not proved to be independent")
    limit = _LIMIT + _NODE * len(own.module.graph.nodes)
    limits = Limits(_NUMBERS, perf_counter() + limit)
    programs = list(ways(less, own, pushes, Target(None, True), orders, limits))
    tried = [Tried(mode, refused=way) for mode, way in programs if isinstance(way, str)]
    made = [replace(way, samples=(few, batch)) for _, way in programs if not isinstance(way, str)]
    if not made:
        raise PlanRefused("; ".join(dict.fromkeys([str(t.refused) for t in tried])))
    emitted, text = first_written(made, _written)
    least = text.source.work * batch * _PRODUCT
    operations = machine().seconds(emitted.work)
    if least > min(predicted, operations):
        raise PlanRefused(f"it takes {text.source.work} scalar products for each sample")
    emitted = replace(emitted, kernel=Kernel(text, PATIENCE))
    return emitted, (Tried(emitted.mode, operations, form=emitted.form), *tried)


def _refuse_matrices(emitted: Emitted, few: int) -> None:
    """Refuses what is mostly products with matrices that all samples share: wide layers.

    Whole batches go through these faster than samples do, and there is no need to try.

    Raises:
        PlanRefused: That is what it is.
    """
    recording = emitted.recording
    shared = 0.0
    for call in recording.calls:
        if call.operation is not aten.mm.default:
            continue
        (result,), matrices = call.results, call.args
        assert result is not None
        filled = 1.0
        for matrix in matrices:
            if matrix.kind == "constant":
                numbers = recording.constants[matrix.position]
                filled *= int(numbers.count_nonzero()) / max(numbers.numel(), 1)
        shared += filled * result.shape.numel() * matrices[0].shape[-1] / few
    if shared > _SHARED and 2 * few * shared > work_of(emitted.module.graph).multiplications:
        raise PlanRefused("most of it are products with matrices that all samples share")


def compiled_again(emitted: Emitted) -> Emitted:
    """A program for a few samples that was loaded, with its kernel for all of them.

    Raises:
        PlanRefused: It has none.
    """
    return replace(emitted, kernel=Kernel(_written(emitted)))


def _written(emitted: Emitted) -> Written:
    assert emitted.samples is not None, "it is for a few samples"
    _refuse_matrices(emitted, emitted.samples[0])
    return written_for_samples([jacobian_of(emitted)], *emitted.samples)
