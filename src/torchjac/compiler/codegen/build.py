"""Build the source unit of a program."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from torchjac._torch.trace.ir import Value
from torchjac._torch.trace.recording import Recording
from torchjac.compiler.codegen.granularity import (
    ScalarProgram,
    expand,
    expand_samples,
    expand_strips,
    multiplies,
    shares_matrices,
)
from torchjac.compiler.codegen.scalar_ir import STRUCTURAL, ArrayRef, Deployment
from torchjac.compiler.codegen.schedule import (
    LoopProgram,
    ScheduleKind,
    each_alone,
    in_parallel,
    over_samples,
    schedule,
    schedule_of_samples,
)
from torchjac.compiler.codegen.target import Signature, SourceUnit, Target
from torchjac.compiler.codegen.targets import HOST
from torchjac.errors import PlanRefused

# What the function is called where nobody asks for another name.
NAME = "torchjac_kernel"


def written(
    recordings: Sequence[tuple[Recording, int]],
    samples: int | None,
    name: str = NAME,
    deployment: Deployment = Deployment.PROCESS,
    target: Target = HOST,
) -> SourceUnit:
    """The first outputs of recordings as a function.

    Args:
        recordings: Operations on the same inputs, and how many of their outputs are wanted.
        samples: The leading size of tensors that hold independent samples, if there are such.
        name: Of the function.
        deployment: Where it runs.
        target: The target that renders it.

    Raises:
        PlanRefused: It runs operations that have no scalar form, or gets too long.
    """
    recordings = _of_floats(recordings)
    reasons = []
    if multiplies(recordings):
        try:
            scalars = expand_strips(recordings, 0, deployment)
            return _written(recordings, scalars, each_alone(scalars), name, target)
        except PlanRefused as refusal:
            reasons.append(str(refusal))
    try:
        scalars = expand(recordings, samples, deployment)
        plan = schedule(scalars)
        if deployment is Deployment.PROCESS and ScheduleKind.PARALLEL in target.limits.schedules:
            plan = in_parallel(plan)
        return _written(recordings, scalars, plan, name, target)
    except PlanRefused as refusal:
        raise PlanRefused("; ".join([*reasons, str(refusal)])) from None


def written_for_samples(
    recordings: Sequence[tuple[Recording, int]],
    few: int,
    many: int,
    name: str = NAME,
    deployment: Deployment = Deployment.PROCESS,
    target: Target = HOST,
) -> SourceUnit:
    """The same for any number of samples, from what is recorded with a few.

    Args:
        recordings: As for `written`; a leading axis of size `few` is that of samples.
        few: How many samples they have.
        many: How many the function is called with.
        name: Of the function.
        deployment: Where it runs.
        target: The target that renders it.

    Raises:
        PlanRefused: As for `written`, or samples are not computed one by one.
    """
    recordings = _of_floats(recordings)

    def alone() -> SourceUnit:
        scalars = expand_samples(recordings, few, deployment)
        plan = schedule_of_samples(scalars, few)
        return _written(recordings, scalars, plan, name, target)

    def in_strips() -> SourceUnit:
        scalars = expand_strips(recordings, few, deployment)
        return _written(recordings, scalars, over_samples(scalars, few), name, target)

    if shares_matrices(recordings, few):
        made = in_strips()
    else:
        try:
            made = alone()
        except PlanRefused as refusal:  # it is too long
            try:
                made = in_strips()
            except PlanRefused as other:
                raise PlanRefused(f"{refusal}; in strips: {other}") from None

    def whole(shape: torch.Size) -> torch.Size:
        return torch.Size((many, *shape[1:])) if shape and shape[0] == few else shape

    given = len(made.inputs) - len(made.live)
    inputs = [(whole(s), d) for s, d in made.inputs[:given]]
    work, seconds = made.source.work // few, made.source.seconds * many / few
    source = replace(made.source, work=work, seconds=seconds)
    return replace(
        made,
        source=source,
        inputs=(*inputs, *made.inputs[given:]),
        outputs=tuple((whole(s), d) for s, d in made.outputs),
        samples=many,
    )


def _of_floats(recordings: Sequence[tuple[Recording, int]]) -> Sequence[tuple[Recording, int]]:
    """The recordings.

    Raises:
        PlanRefused: They give something that is neither float64 nor float32.
    """
    if not all(v.dtype in (torch.float64, torch.float32) for v in _results(recordings)):
        raise PlanRefused("it is neither float64 nor float32")
    return recordings


def _results(recordings: Sequence[tuple[Recording, int]]) -> list[Value]:
    return [v for r, count in recordings for v in r.outputs[:count] if v is not None]


def _written(
    recordings: Sequence[tuple[Recording, int]],
    scalars: ScalarProgram,
    plan: LoopProgram,
    name: str,
    target: Target,
) -> SourceUnit:
    _check(scalars, plan, target)
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
    source = target.render(scalars, plan, Signature(name, tuple(read), tuple(sizes)))
    if source.statements > target.limits.statements:
        raise PlanRefused(f"{source.statements} statements in {target.limits.name}")
    return SourceUnit(
        name,
        target,
        plan.kind,
        source,
        tuple((v.shape, v.dtype) for _, v in inputs),
        tuple(scalars.live.values()),
        tuple((v.shape, v.dtype) for v in results),
    )


def _check(scalars: ScalarProgram, plan: LoopProgram, target: Target) -> None:
    """Refuses what a target cannot do.

    Raises:
        PlanRefused: It has no such schedule, dtype or operation.
    """
    limits, every = target.limits, scalars.expressions.all
    if plan.kind not in limits.schedules:
        raise PlanRefused(f"{limits.name} has no {plan.kind.value}")
    dtypes = {x.dtype for x in every} - limits.dtypes
    if dtypes:
        raise PlanRefused(f"{limits.name} does not compute in {', '.join(sorted(dtypes))}")
    operations = {x.kind for x in every} - limits.operations - STRUCTURAL
    if operations:
        raise PlanRefused(f"{limits.name} has no {', '.join(sorted(operations))}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
