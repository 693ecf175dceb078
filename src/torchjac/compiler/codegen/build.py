"""Build the source unit of a program."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from torchjac._torch.trace.ir import Value
from torchjac._torch.trace.recording import Recording
from torchjac.compiler.codegen.batch_schedule import batch_loop, batch_tensor_loops
from torchjac.compiler.codegen.granularity import (
    ScalarProgram,
    is_mostly_matmuls,
    is_mostly_shared_matmuls,
    lower_per_sample,
    lower_program,
    lower_tensors,
)
from torchjac.compiler.codegen.scalar_ir import STRUCTURAL, ArrayRef, Deployment
from torchjac.compiler.codegen.schedule import (
    LoopProgram,
    ScheduleKind,
    parallelize,
    schedule,
    tensor_loops,
)
from torchjac.compiler.codegen.target import Signature, SourceUnit, Target
from torchjac.compiler.codegen.targets import HOST
from torchjac.errors import PlanRefused

# Default name of the function.
NAME = "torchjac_kernel"


def build_source(
    recordings: Sequence[tuple[Recording, int]],
    samples: int | None,
    name: str = NAME,
    deployment: Deployment = Deployment.PROCESS,
    target: Target = HOST,
) -> SourceUnit:
    """Builds the source unit of a function that computes the first outputs of recordings.

    Args:
        recordings: Operations on the same inputs, with the number of outputs that are wanted.
        samples: The leading size of tensors that hold independent samples; None without samples.
        name: The name of the function.
        deployment: The place where the program runs.
        target: The target that renders the program.

    Raises:
        PlanRefused: An operation has no scalar form, or the program gets too long.
    """
    recordings = _of_floats(recordings)
    reasons = []
    if is_mostly_matmuls(recordings):
        try:
            scalars = lower_tensors(recordings, 0, deployment)
            return _render(recordings, scalars, tensor_loops(scalars), name, target)
        except PlanRefused as refusal:
            reasons.append(str(refusal))
    try:
        scalars = lower_program(recordings, samples, deployment)
        program = schedule(scalars)
        if deployment is Deployment.PROCESS and ScheduleKind.PARALLEL in target.limits.schedules:
            program = parallelize(program)
        return _render(recordings, scalars, program, name, target)
    except PlanRefused as refusal:
        raise PlanRefused("; ".join([*reasons, str(refusal)])) from None


def build_batch_source(
    recordings: Sequence[tuple[Recording, int]],
    few: int,
    many: int,
    name: str = NAME,
    deployment: Deployment = Deployment.PROCESS,
    target: Target = HOST,
) -> SourceUnit:
    """Builds the source unit for any number of samples, from recordings with a few samples.

    Args:
        recordings: As for `build_source`; a leading axis of size `few` is the axis of samples.
        few: The number of samples of the recordings.
        many: The number of samples of each call.
        name: The name of the function.
        deployment: The place where the program runs.
        target: The target that renders the program.

    Raises:
        PlanRefused: As for `build_source`, or samples depend on each other.
    """
    recordings = _of_floats(recordings)

    def with_batch_loop() -> SourceUnit:
        scalars = lower_per_sample(recordings, few, deployment)
        program = batch_loop(scalars, few)
        return _render(recordings, scalars, program, name, target)

    def with_tensor_loops() -> SourceUnit:
        scalars = lower_tensors(recordings, few, deployment)
        return _render(recordings, scalars, batch_tensor_loops(scalars, few), name, target)

    if is_mostly_shared_matmuls(recordings, few):
        unit = with_tensor_loops()
    else:
        try:
            unit = with_batch_loop()
        except PlanRefused as refusal:  # the unrolled sample is too long
            try:
                unit = with_tensor_loops()
            except PlanRefused as second:
                raise PlanRefused(f"{refusal}; in strips: {second}") from None

    def whole(shape: torch.Size) -> torch.Size:
        return torch.Size((many, *shape[1:])) if shape and shape[0] == few else shape

    count = len(unit.inputs) - len(unit.live)
    inputs = [(whole(s), d) for s, d in unit.inputs[:count]]
    source = replace(unit.source, work=replace(unit.source.work, samples=(few, many)))
    return replace(
        unit,
        source=source,
        inputs=(*inputs, *unit.inputs[count:]),
        outputs=tuple((whole(s), d) for s, d in unit.outputs),
        samples=many,
    )


def _of_floats(recordings: Sequence[tuple[Recording, int]]) -> Sequence[tuple[Recording, int]]:
    """The recordings.

    Raises:
        PlanRefused: An output is neither float64 nor float32.
    """
    if not all(v.dtype in (torch.float64, torch.float32) for v in _results(recordings)):
        raise PlanRefused("it is neither float64 nor float32")
    return recordings


def _results(recordings: Sequence[tuple[Recording, int]]) -> list[Value]:
    return [v for r, count in recordings for v in r.outputs[:count] if v is not None]


def _render(
    recordings: Sequence[tuple[Recording, int]],
    scalars: ScalarProgram,
    program: LoopProgram,
    name: str,
    target: Target,
) -> SourceUnit:
    _check(scalars, program, target)
    results = _results(recordings)
    inputs: list[tuple[ArrayRef, Any]] = [
        (ArrayRef("in", i), v) for i, v in enumerate(recordings[0][0].inputs)
    ]
    inputs += scalars.live.items()
    read = [
        (i, array, _name(v.dtype))
        for i, (array, v) in enumerate(inputs)
        if v.dtype.is_floating_point
    ]
    sizes = [(_name(v.dtype), math.prod(v.shape)) for v in results]
    source = target.render(scalars, program, Signature(name, tuple(read), tuple(sizes)))
    if source.statements > target.limits.statements:
        raise PlanRefused(f"{source.statements} statements in {target.limits.name}")
    return SourceUnit(
        name,
        target,
        program.kind,
        source,
        tuple((v.shape, v.dtype) for _, v in inputs),
        tuple(scalars.live.values()),
        tuple((v.shape, v.dtype) for v in results),
    )


def _check(scalars: ScalarProgram, program: LoopProgram, target: Target) -> None:
    """Refuses a program beyond the limits of a target.

    Raises:
        PlanRefused: The target lacks the schedule, a dtype or an operation.
    """
    limits, every = target.limits, scalars.expressions.all
    if program.kind not in limits.schedules:
        raise PlanRefused(f"{limits.name} has no {program.kind.value}")
    dtypes = {x.dtype for x in every} - limits.dtypes
    if dtypes:
        raise PlanRefused(f"{limits.name} does not compute in {', '.join(sorted(dtypes))}")
    operations = {x.kind for x in every} - limits.operations - STRUCTURAL
    if operations:
        raise PlanRefused(f"{limits.name} has no {', '.join(sorted(operations))}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
