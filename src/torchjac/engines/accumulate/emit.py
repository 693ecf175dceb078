"""From a derivative to a straight line of operations that computes the entries of J."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from torchjac._torch.inductor import NotCompiled, compiled
from torchjac._torch.recorder import Recorder
from torchjac._torch.recording import Recording, recorded
from torchjac._torch.straight import compilable, executable, folded
from torchjac.capture.derivative import Derivative
from torchjac.engines.accumulate import write
from torchjac.engines.accumulate.sweep import Sweep
from torchjac.engines.accumulate.terms import Adjoint
from torchjac.errors import PlanRefused, RefusedHere
from torchjac.structure import Pattern

R = TypeVar("R")


@dataclass(frozen=True, slots=True, eq=False)
class Emitted:
    """A program that computes the entries of a Jacobian.

    Attributes:
        module: Takes the inputs and the constants, gives the parts of the result and a number that
            is not finite where one of them is not.
        constants: What it read or could compute beforehand.
        run: The module, or what it was compiled to.
        note: Why it was not compiled, though that was asked for.
    """

    module: fx.GraphModule
    constants: tuple[Tensor, ...]
    run: Callable[..., Any]
    note: str | None = None

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """The parts of the Jacobian at other inputs; None where they are not all finite.

        In another order of multiplication infinities meet other zeros: passes say what is right.
        """
        *parts, probe = self.run(*(x.contiguous() for x in inputs), *self.constants)
        return tuple(parts) if math.isfinite(probe) else None


class _Everything:
    """Operations that are not decomposed: all of them."""

    def __contains__(self, operation: object) -> bool:
        return True

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0


def emit(
    derivative: Derivative, inputs: Sequence[Tensor], target: Target, most: int, limit: float = 60.0
) -> tuple[Emitted, tuple[Tensor, ...]]:
    """Accumulates the Jacobian once, at some inputs, and keeps the operations that it took.

    Args:
        derivative: The traced backward pass.
        inputs: A tensor for each of its placeholders that is not a cotangent.
        target: What the result looks like.
        most: Numbers that intermediate adjoints may have, all together.
        limit: Seconds that the walk over the graph may take.

    Returns:
        The program, and the parts of the Jacobian at these inputs.

    Raises:
        PlanRefused: It cannot be done this way, or would take too much.
    """
    recorder = Recorder(_Everything(), parameters_vary=True)
    placeholders = [n for n in derivative.module.graph.nodes if n.op == "placeholder"]
    free = [p for p in placeholders if p not in derivative.cotangents]
    inputs = [x.contiguous() for x in inputs]
    for tensor in inputs:
        recorder.input(tensor)

    def record(run: Callable[[], R]) -> R:
        with recorder:
            return run()

    given = dict(zip(free, inputs, strict=True))
    with torch.no_grad():
        gradients = Sweep(derivative, given, record, most, limit).gradients()
        count = sum(math.prod(x.loop) for g in gradients if g is not None for x in g.terms)
        if count > most:
            raise PlanRefused("far more products than entries would be added up")
        parts = record(lambda: _parts(derivative, gradients, inputs, target, recorder.varies))
        probe = record(lambda: _probe(parts))
    recording = folded(recorded(recorder, [*parts, probe]))
    emitted = _emitted(recording, inputs, target.compiled)
    with torch.no_grad():  # what is checked is what will run, on memory of another kind
        again = emitted([_elsewhere(x) for x in inputs])
    if again is None:
        raise RefusedHere("values are not finite")
    return emitted, again


def _elsewhere(tensor: Tensor) -> Tensor:
    """The same numbers, not at the beginning of their memory."""
    memory = torch.empty(tensor.numel() + 3, dtype=tensor.dtype, device=tensor.device)
    return memory[3:].view(tensor.shape).copy_(tensor)


def _emitted(recording: Recording, inputs: Sequence[Tensor], compiling: bool) -> Emitted:
    note = None
    if compiling:
        module, constants = compilable(recording)
        try:
            return Emitted(module, constants, compiled(module, [*inputs, *constants]))
        except NotCompiled as refusal:
            note = str(refusal)
    module, constants = executable(recording)
    return Emitted(module, constants, module.forward, note)


def _probe(parts: Sequence[Tensor]) -> Tensor:
    """The sum of everything."""
    sums = [part.sum() for part in parts]
    return sums[0] if len(sums) == 1 else torch.stack([s.to(sums[0].dtype) for s in sums]).sum()


@dataclass(frozen=True, slots=True)
class Target:
    """What the result looks like.

    Attributes:
        pattern: Structural nonzeros of a sparse result; None for a dense one.
        batched: Whether a dense one has a batch of independent samples.
        compiled: Whether the program is to be compiled.
    """

    pattern: Pattern | None = None
    batched: bool = False
    compiled: bool = False


def _parts(
    derivative: Derivative,
    gradients: Sequence[Adjoint | None],
    inputs: Sequence[Tensor],
    target: Target,
    varies: Callable[[Tensor], bool],
) -> list[Tensor]:
    """The values of a sparse result, or every block of a dense one, row by row."""
    columns = [tuple(s) for s in derivative.column_shapes]
    if target.pattern is not None:
        starts = [0, *accumulate(math.prod(s) for s in columns)]
        present = [(g, k) for g, k in zip(gradients, starts, strict=False) if g is not None]
        slots = write.Slots.of(target.pattern)
        return [write.sparse(present, slots, inputs[0], varies)]
    parts = []
    first = 0
    for row_shape in derivative.row_shapes:
        for gradient, shape, like in zip(gradients, columns, inputs, strict=False):
            samples = row_shape[0] if target.batched else None
            block = write.Block(first, row_shape.numel(), shape, samples)
            outer = (*row_shape, *(shape if samples is None else shape[1:]))
            parts.append(write.dense(gradient, block, like).view(outer))
        first += row_shape.numel()
    return parts
