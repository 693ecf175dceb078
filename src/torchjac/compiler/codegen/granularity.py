"""The choice of granularity: which elements of a tensor program share a scalar expression."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from torchjac._torch.operators import aten
from torchjac._torch.trace.ir import Instruction
from torchjac._torch.trace.recording import Recording, values_in
from torchjac.compiler.codegen.expressions import Expressions
from torchjac.compiler.codegen.lower import EXPRESSIONS, Lowering
from torchjac.compiler.codegen.ops_factorize import FACTORS
from torchjac.compiler.codegen.ops_pointwise import POINTWISE
from torchjac.compiler.codegen.ops_reduce import CONTRACTIONS
from torchjac.compiler.codegen.scalar_ir import ArrayRef, Deployment, Granularity, Indices
from torchjac.errors import PlanRefused
from torchjac.ops import IN_PLACE, Fact, operators_with

_ALWAYS_UNROLL = 500  # scalar operations: unroll fully
_MAX_UNROLL = 60_000  # scalar operations (of a sample): more are never unrolled
_PREFER_UNROLLED = 1500  # expressions and stores: no loops for unrolled programs up to this size
_ROLLED_GAIN = 6  # ratio: loops replace a longer unrolled program if they are this much shorter
_WHOLE_WORK = 1500  # scalar products (of a sample): from here on matrix products stay whole
_PRODUCTS = operators_with(Fact.LOOPED_PRODUCT)
_WHOLE_INNER = 8  # terms of inner products: shorter ones do not count as matrix products
_MAX_OPERATIONS = 200_000_000  # scalar operations: more are refused


@dataclass(frozen=True, slots=True)
class ScalarProgram:
    """A program as scalar expressions.

    Attributes:
        expressions: All expressions.
        outputs: The expression and the point of each element of each output.
        tables: The constant tables.
        live: The parameters whose numbers may change between calls.
        batched_inputs: The inputs that hold samples.
    """

    expressions: Expressions
    outputs: tuple[tuple[Indices, Indices], ...]
    tables: dict[ArrayRef, Tensor]
    live: dict[ArrayRef, Tensor]
    batched_inputs: frozenset[ArrayRef]


def lower_program(
    recordings: Sequence[tuple[Recording, int]], samples: int | None, deployment: Deployment
) -> ScalarProgram:
    """Lowers the operations that the first outputs of recordings need.

    Args:
        recordings: Operations on the same inputs, with the number of outputs that are wanted.
        samples: The leading size of tensors that hold independent samples; None without samples.
        deployment: The place where the program runs.

    Raises:
        PlanRefused: An operation is unknown, or there are too many expressions.
    """
    parts = _parts(recordings)
    elements = _counted(parts)

    def lowered(granularity: Granularity, most: int = EXPRESSIONS) -> ScalarProgram:
        return _lowered(granularity, parts, samples or 0, deployment, most)

    if elements <= _ALWAYS_UNROLL:
        return lowered(Granularity.ELEMENTS)
    if samples is not None and samples > 1:
        if elements // samples <= _MAX_UNROLL:
            with suppress(PlanRefused):
                return lowered(Granularity.SAMPLES)
    elif elements <= _MAX_UNROLL:
        with suppress(PlanRefused):
            single = lowered(Granularity.ELEMENTS)
            # Loops make programs short; unrolled elements let more constants fold.
            size = len(single.expressions.all) + _stored(single)
            if size <= _PREFER_UNROLLED:
                return single
            with suppress(PlanRefused):  # stops at the limit
                return lowered(Granularity.DOMAINS, (size - 1) // _ROLLED_GAIN)
            return single
    return lowered(Granularity.DOMAINS)


def lower_per_sample(
    recordings: Sequence[tuple[Recording, int]], samples: int, deployment: Deployment
) -> ScalarProgram:
    """Lowers each element of a sample to an expression, whose points are the samples.

    Raises:
        PlanRefused: As for `lower_program`.
    """
    parts = _parts(recordings)
    elements = _counted(parts) // samples
    if elements > _MAX_UNROLL:
        raise PlanRefused(f"{elements} scalar operations for each sample")
    return _lowered(Granularity.SAMPLES, parts, samples, deployment, EXPRESSIONS)


def lower_tensors(
    recordings: Sequence[tuple[Recording, int]], samples: int, deployment: Deployment
) -> ScalarProgram:
    """Lowers elements that are computed alike to one expression, and keeps matrix products whole.

    Raises:
        PlanRefused: As for `lower_program`.
    """
    parts = _parts(recordings)
    _counted(parts)
    return _lowered(Granularity.MATRICES, parts, samples, deployment, EXPRESSIONS)


def is_mostly_shared_matmuls(recordings: Sequence[tuple[Recording, int]], samples: int) -> bool:
    """Whether products with matrices that all samples share (wide layers) are most of the work.

    Args:
        recordings: As for `lower_program`.
        samples: The number of samples.
    """
    shared, work = 0.0, 0
    for recording, calls, _ in _parts(recordings):
        for call in calls:
            work += _work(call)
            if call.operation not in (aten.mm.default, aten.addmm.default):
                continue
            (result,), matrices = call.results, call.args[-2:]
            assert result is not None
            products = result.shape.numel() * matrices[0].shape[-1]
            work += products if call.operation is aten.addmm.default else 0
            for matrix in matrices:  # zeros are not multiplied in an unrolled product
                if matrix.kind == "constant" and not matrix.base.varies:
                    numbers = recording.constants[matrix.position]
                    products *= int(numbers.count_nonzero()) / max(numbers.numel(), 1)
            shared += products
    return shared > _WHOLE_WORK * samples and 2 * shared > work


def is_mostly_matmuls(recordings: Sequence[tuple[Recording, int]]) -> bool:
    """Whether most of the work are matrix products that are worth keeping whole."""
    products, work = 0, 0
    for _, calls, _ in _parts(recordings):
        for call in calls:
            size = _work(call)
            if call.operation in _PRODUCTS:
                (result,) = call.results
                assert result is not None
                inner = call.args[-2].shape[-1]
                size = result.shape.numel() * inner
                products += size if inner >= _WHOLE_INNER else 0
            work += size
    return products > _WHOLE_WORK and 2 * products > work


def _stored(scalars: ScalarProgram) -> int:
    """The number of output elements that vary: unrolled, each is a statement."""
    count = 0
    for numbers, _ in scalars.outputs:
        different, times = np.unique(numbers, return_counts=True)
        known = zip(different.tolist(), times.tolist(), strict=True)
        count += sum(t for n, t in known if scalars.expressions.constant_value(n) is None)
    return count


# A recording, the calls that its first outputs need, and the number of these outputs.
_Part = tuple[Recording, list[Instruction], int]


def _parts(recordings: Sequence[tuple[Recording, int]]) -> list[_Part]:
    return [(recording, _needed(recording, count), count) for recording, count in recordings]


def _counted(parts: Sequence[_Part]) -> int:
    """The number of scalar operations.

    Raises:
        PlanRefused: There are too many.
    """
    elements = sum(_work(call) for _, calls, _ in parts for call in calls)
    if elements > _MAX_OPERATIONS:
        raise PlanRefused(f"{elements} scalar operations")
    return elements


def _lowered(
    granularity: Granularity,
    parts: Sequence[_Part],
    samples: int,
    deployment: Deployment,
    most: int,
) -> ScalarProgram:
    try:
        lowering = Lowering(granularity, samples, deployment, most)
        outputs = [x for part in parts for x in lowering.outputs(*part)]
        return ScalarProgram(
            lowering.expressions,
            tuple(outputs),
            lowering.tables,
            lowering.live,
            frozenset(lowering.batched_inputs),
        )
    except PlanRefused:
        raise
    except RuntimeError as error:  # of torch, about ids
        raise PlanRefused(f"elements cannot be followed: {error}") from error


def _needed(recording: Recording, count: int) -> list[Instruction]:
    """The calls that some outputs need, including writes to memory that the outputs read."""
    outputs = [v for v in recording.outputs[:count] if v is not None]
    needed, memory = {id(v) for v in outputs}, {id(v.base) for v in outputs}
    calls = []
    for call in reversed(recording.calls):
        is_result = any(v is not None and id(v) in needed for v in call.results)
        if is_result or any(id(base) in memory for base in call.written):
            calls.append(call)
            for value in values_in((*call.args, *call.kwargs.values())):
                needed.add(id(value))
                memory.add(id(value.base))
    return calls[::-1]


def _work(call: Instruction) -> int:
    """The scalar operations of a call, at most."""
    size = sum(math.prod(v.shape) for v in call.results if v is not None)
    if call.operation in (aten.mm.default, aten.bmm.default):
        return int(size * call.args[0].shape[-1])
    if call.operation in POINTWISE or call.operation in IN_PLACE:
        return size
    if call.operation in FACTORS:
        return max([math.prod(v.shape) * v.shape[-1] for v in values_in(call.args)], default=0)
    if call.operation in CONTRACTIONS:
        return max([math.prod(v.shape) for v in values_in(call.args)], default=0)
    return 0
