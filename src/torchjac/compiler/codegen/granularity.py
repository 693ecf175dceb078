"""A straight line of tensor operations as scalar expressions.

In the place of every tensor stands one of whole numbers, its *code*: which expression each element
is, and which lane of it. Operations that only move elements are run on codes as they are, by torch,
views and writes included; the others make new expressions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from torchjac._torch.operators import aten
from torchjac._torch.trace.ir import Called
from torchjac._torch.trace.recording import Recording, values_in
from torchjac.compiler.codegen.expressions import Expressions
from torchjac.compiler.codegen.lower import EXPRESSIONS, Expansion
from torchjac.compiler.codegen.ops_factorize import FACTORS
from torchjac.compiler.codegen.ops_pointwise import POINTWISE
from torchjac.compiler.codegen.ops_reduce import CONTRACTIONS
from torchjac.compiler.codegen.scalar_ir import ArrayRef, Deployment, Granularity, Places
from torchjac.errors import PlanRefused
from torchjac.ops import IN_PLACE, Fact, having

# Elements of operations up to which every element is an expression of its own; up to which that may
# be; expressions and results up to which it is preferred, and how much shorter one with lanes is
# otherwise.
_SMALL, _UNROLLED, _BRIEF, _SHORTER = 500, 60_000, 1500, 6
# Products of a sample with matrices that all share, from which on these are kept whole.
_SHARED = 1500
_PRODUCTS = having(Fact.LOOPED_PRODUCT)
# How many numbers products multiply and add for each of theirs to be kept whole.
_INNER = 8
# Elements of all operations together.
_ELEMENTS = 200_000_000


@dataclass(frozen=True, slots=True)
class ScalarProgram:
    """A program as scalar expressions.

    Attributes:
        expressions: All of them.
        outputs: For each output the expression, and the lane, of every element.
        tables: Constants that are read, by their array.
        live: Tensors from elsewhere whose numbers may change (parameters), in the same way.
        sampled: Inputs that hold samples.
    """

    expressions: Expressions
    outputs: tuple[tuple[Places, Places], ...]
    tables: dict[ArrayRef, Tensor]
    live: dict[ArrayRef, Tensor]
    sampled: frozenset[ArrayRef]


def expand(
    recordings: Sequence[tuple[Recording, int]], samples: int | None, deployment: Deployment
) -> ScalarProgram:
    """Expands the operations that the first outputs of recordings need.

    Args:
        recordings: Operations on the same inputs, what does not vary being among their constants;
            and how many of their outputs are wanted.
        samples: The leading size of tensors that hold independent samples, if there are such.
        deployment: Where the program runs.

    Raises:
        PlanRefused: It runs an operation that is not known, or there are too many expressions.
    """
    parts = _parts(recordings)
    elements = _counted(parts)

    def expanded(how: Granularity, most: int = EXPRESSIONS) -> ScalarProgram:
        return _expanded(how, parts, samples or 0, deployment, most)

    if elements <= _SMALL:
        return expanded(Granularity.ELEMENTS)
    if samples is not None and samples > 1:
        if elements // samples <= _UNROLLED:
            with suppress(PlanRefused):
                return expanded(Granularity.SAMPLES)
    elif elements <= _UNROLLED:
        with suppress(PlanRefused):
            single = expanded(Granularity.ELEMENTS)
            # Lanes make programs short; single elements let more of them be known.
            size = len(single.expressions.all) + _stored(single)
            if size <= _BRIEF:
                return single
            with suppress(PlanRefused):  # given up as soon as it is too long
                return expanded(Granularity.LANES, (size - 1) // _SHORTER)
            return single
    return expanded(Granularity.LANES)


def expand_samples(
    recordings: Sequence[tuple[Recording, int]], samples: int, deployment: Deployment
) -> ScalarProgram:
    """The same, every element of a sample an expression of its own, whose lanes are the samples.

    Raises:
        PlanRefused: As `expand`.
    """
    parts = _parts(recordings)
    elements = _counted(parts) // samples
    if elements > _UNROLLED:
        raise PlanRefused(f"{elements} scalar operations for each sample")
    return _expanded(Granularity.SAMPLES, parts, samples, deployment, EXPRESSIONS)


def expand_strips(
    recordings: Sequence[tuple[Recording, int]], samples: int, deployment: Deployment
) -> ScalarProgram:
    """The same, elements that are made alike being lanes, and products of matrices kept whole.

    Raises:
        PlanRefused: As `expand`.
    """
    parts = _parts(recordings)
    _counted(parts)
    return _expanded(Granularity.MATRICES, parts, samples, deployment, EXPRESSIONS)


def shares_matrices(recordings: Sequence[tuple[Recording, int]], samples: int) -> bool:
    """Whether most of it are products with matrices that all samples share: wide layers.

    Args:
        recordings: As for `expand`.
        samples: How many samples they hold.
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
            for matrix in matrices:  # what is zero is not multiplied, element by element
                if matrix.kind == "constant" and not matrix.base.varies:
                    numbers = recording.constants[matrix.position]
                    products *= int(numbers.count_nonzero()) / max(numbers.numel(), 1)
            shared += products
    return shared > _SHARED * samples and 2 * shared > work


def multiplies(recordings: Sequence[tuple[Recording, int]]) -> bool:
    """Whether most of it are products of matrices that are worth to be kept whole."""
    products, work = 0, 0
    for _, calls, _ in _parts(recordings):
        for call in calls:
            size = _work(call)
            if call.operation in _PRODUCTS:
                (result,) = call.results
                assert result is not None
                inner = call.args[-2].shape[-1]
                size = result.shape.numel() * inner
                products += size if inner >= _INNER else 0
            work += size
    return products > _SHARED and 2 * products > work


def _stored(scalars: ScalarProgram) -> int:
    """Elements of outputs that vary: each is a statement of its own, where it has no lanes."""
    count = 0
    for numbers, _ in scalars.outputs:
        different, times = np.unique(numbers, return_counts=True)
        known = zip(different.tolist(), times.tolist(), strict=True)
        count += sum(t for n, t in known if scalars.expressions.value(n) is None)
    return count


# A recording, the calls that its first outputs need, and how many these are.
_Part = tuple[Recording, list[Called], int]


def _parts(recordings: Sequence[tuple[Recording, int]]) -> list[_Part]:
    return [(recording, _needed(recording, count), count) for recording, count in recordings]


def _counted(parts: Sequence[_Part]) -> int:
    """Scalar operations, all together.

    Raises:
        PlanRefused: There are too many.
    """
    elements = sum(_work(call) for _, calls, _ in parts for call in calls)
    if elements > _ELEMENTS:
        raise PlanRefused(f"{elements} scalar operations")
    return elements


def _expanded(
    how: Granularity, parts: Sequence[_Part], samples: int, deployment: Deployment, most: int
) -> ScalarProgram:
    try:
        expansion = Expansion(how, samples, deployment, most)
        outputs = [x for part in parts for x in expansion.outputs(*part)]
        return ScalarProgram(
            expansion.expressions,
            tuple(outputs),
            expansion.tables,
            expansion.live,
            frozenset(expansion.sampled),
        )
    except PlanRefused:
        raise
    except RuntimeError as error:  # of torch, about codes
        raise PlanRefused(f"elements cannot be followed: {error}") from error


def _needed(recording: Recording, count: int) -> list[Called]:
    """The calls that some outputs need, writes to memory that they look at included."""
    outputs = [v for v in recording.outputs[:count] if v is not None]
    needed, memory = {id(v) for v in outputs}, {id(v.base) for v in outputs}
    found = []
    for call in reversed(recording.calls):
        made = any(v is not None and id(v) in needed for v in call.results)
        if made or any(id(base) in memory for base in call.written):
            found.append(call)
            for value in values_in((*call.args, *call.kwargs.values())):
                needed.add(id(value))
                memory.add(id(value.base))
    return found[::-1]


def _work(call: Called) -> int:
    """Scalar operations that a call may take."""
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
