"""Loop programs over the samples of a batch: one loop, each iteration computes one sample."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from torchjac.compiler.codegen.granularity import ScalarProgram
from torchjac.compiler.codegen.scalar_ir import SCALAR, ArrayRef, load_of
from torchjac.compiler.codegen.schedule import Loop, LoopProgram, ScheduleKind, Store
from torchjac.errors import PlanRefused


def batch_loop(scalars: ScalarProgram, count: int) -> LoopProgram:
    """One loop, whose iterations compute one sample each, independently.

    Args:
        scalars: The program for a few samples, lowered per sample.
        count: The number of samples.

    Raises:
        PlanRefused: Samples depend on each other.
    """
    _check(scalars, count)
    program = batch_tensor_loops(scalars, count)
    every, (loop,) = np.arange(count), program.loops
    for store in loop.stores:
        is_scalar = scalars.expressions.all[store.expression].domain is SCALAR
        if not is_scalar and not (store.points == every).all():
            raise PlanRefused("a sample looks at another")
    return replace(program, kind=ScheduleKind.BATCH)


def batch_tensor_loops(scalars: ScalarProgram, count: int) -> LoopProgram:
    """One loop, whose iterations write the results of one sample each.

    Args:
        scalars: The program for a few samples.
        count: The number of samples.

    Raises:
        PlanRefused: Samples have different expressions.
    """
    every = np.arange(count)
    stores, fixed = [], []
    for k, (numbers, points) in enumerate(scalars.outputs):
        of, where = numbers.reshape(count, -1), points.reshape(count, -1)
        width = of.shape[1]
        if not (of == of[0]).all():
            raise PlanRefused("samples are not computed alike")
        values = np.zeros(width)
        for position, number in enumerate(of[0].tolist()):
            value = scalars.expressions.constant_value(number)
            if value is not None:
                values[position] = value
                continue
            stores.append(
                Store(number, where[:, position], ArrayRef("out", k), position + width * every)
            )
        fixed.append((np.arange(width), values))
    loop = Loop(count, tuple(stores))
    return LoopProgram((loop,), {}, tuple(fixed), (), ScheduleKind.BATCH_TENSORS)


def _check(scalars: ScalarProgram, count: int) -> None:
    """Refuses a program that is not one computation for each sample, on its own inputs.

    Raises:
        PlanRefused: A sample reads another sample, or samples are computed differently.
    """
    every = scalars.expressions.all
    stack = [int(n) for numbers, _ in scalars.outputs for n in np.unique(numbers)]
    seen: set[int] = set()
    while stack:
        number = stack.pop()
        if number in seen:
            continue
        seen.add(number)
        expression = every[number]
        if expression.domain is not SCALAR and expression.domain.size != count:
            raise PlanRefused("samples are not computed one by one")
        if expression.kind == "load" and expression.domain is not SCALAR:
            array, step, start = load_of(expression)
            if array.kind != "in" or start >= step:
                raise PlanRefused("samples read different constants")
        for argument, by in expression.arguments:
            if by is not None and not (by.indices == by.indices[0]).all():
                raise PlanRefused("a sample looks at another")
            if by is not None and every[argument].domain is not SCALAR:
                raise PlanRefused("all samples look at one")
            stack.append(argument)
