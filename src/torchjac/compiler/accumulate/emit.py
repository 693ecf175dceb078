"""A tensor program that computes the entries of J, from a linear program."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from torchjac._torch.trace.recorder import Recorder
from torchjac._torch.trace.recording import finish_recording
from torchjac.capture.linear_program import LinearProgram
from torchjac.compiler.accumulate import output
from torchjac.compiler.accumulate.output import Goal
from torchjac.compiler.accumulate.sweep import Sweep
from torchjac.compiler.program.optimize import fold_constants, optimized_graph
from torchjac.compiler.program.record import EveryOperation, own_copies
from torchjac.compiler.program.tensor_program import TensorProgram
from torchjac.errors import PlanRefused, RefusedHere

R = TypeVar("R")


def emit(
    derivative: LinearProgram,
    inputs: Sequence[Tensor],
    goal: Goal,
    most: int,
    limit: float = 60.0,
) -> TensorProgram:
    """Accumulates the Jacobian once, at some inputs, and records the operations.

    Args:
        derivative: The traced backward pass, or that of J'.
        inputs: A tensor for each of its placeholders that is not a cotangent.
        goal: What is accumulated.
        most: Largest number of elements of all intermediate adjoints together.
        limit: Seconds after which the sweep over the graph is refused.

    Raises:
        PlanRefused: The program cannot be accumulated, or only beyond a limit.
    """
    recorder = Recorder(EveryOperation(), parameters_vary=True)
    placeholders = [n for n in derivative.module.graph.nodes if n.op == "placeholder"]
    free = [p for p in placeholders if p not in derivative.cotangents]
    inputs = own_copies(inputs)
    for tensor in inputs:
        recorder.input(tensor)

    def record(run: Callable[[], R]) -> R:
        with recorder:
            return run()

    arguments = dict(zip(free, inputs, strict=True))
    with torch.no_grad():
        samples = derivative.row_shapes[0][0] if goal.batched else 1
        sweep = Sweep(derivative, arguments, record, most, limit, samples)
        gradients = sweep.gradients()
        terms = [x for g in gradients if g is not None for x in g.terms]
        if sum(math.prod(x.loop) for x in terms) > most:
            raise PlanRefused("far more products than entries would be added up")
        parts = record(lambda: output.parts(goal, derivative, gradients, inputs, recorder.varies))
        probe = record(lambda: _probe(parts))
        fixed = sum(
            math.prod(x.loop)
            for x in terms
            if not any(recorder.varies(factor) for factor in x.factors)
        )
    recording = fold_constants(finish_recording(recorder, [*parts, probe]))
    module, constants = optimized_graph(recording)
    whole = sum(math.prod(x.loop) for x in terms)
    about = goal.mode, (fixed, whole), sweep.bottlenecks
    return TensorProgram(recording, module, constants, module.forward, *about)


def evaluated(program: TensorProgram, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The result of a program to be checked, on memory that is aligned differently.

    Raises:
        RefusedHere: The result is not finite.
    """
    with torch.no_grad():
        parts = program([elsewhere(x) for x in inputs])
    if parts is None:
        raise RefusedHere("values are not finite")
    return parts


def elsewhere(tensor: Tensor) -> Tensor:
    """A copy that does not begin where its memory begins, so that its alignment differs."""
    memory = torch.empty(tensor.numel() + 3, dtype=tensor.dtype, device=tensor.device)
    return memory[3:].view(tensor.shape).copy_(tensor)


def _probe(parts: Sequence[Tensor]) -> Tensor:
    """A number that is not finite if an element of the result is not: the sum of all."""
    sums = [part.sum() for part in parts]
    return sums[0] if len(sums) == 1 else torch.stack([s.to(sums[0].dtype) for s in sums]).sum()
