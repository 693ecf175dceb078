"""From a derivative to a straight line of operations that computes the entries of J."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from torchjac._torch.inductor import NotCompiled, compiled
from torchjac._torch.recorder import Recorder
from torchjac._torch.recording import Recording, recorded
from torchjac._torch.straight import beside_results, compilable, executable, folded
from torchjac._torch.work import Work, work_of
from torchjac.capture.derivative import Derivative
from torchjac.engines.accumulate import write
from torchjac.engines.accumulate.sweep import Sweep
from torchjac.engines.accumulate.terms import Adjoint
from torchjac.engines.accumulate.write import Mode
from torchjac.errors import PlanRefused, RefusedHere
from torchjac.structure import Pattern

R = TypeVar("R")


@dataclass(frozen=True, slots=True, eq=False)
class Emitted:
    """A program that computes the entries of a Jacobian.

    Attributes:
        recording: Its operations: they take the inputs, and give the parts of the result and a
            number that is not finite where one of them is not.
        module: The same, made fewer; takes the inputs and the constants.
        constants: What it read or could compute beforehand.
        run: The module, or what it was compiled to.
        mode: The order in which local Jacobians were multiplied.
        fixed: Entries that are the same for every input, and all of them.
        waists: Values that took the place of rows: their size, and where they are.
        note: Why it was not compiled, though that was asked for.
        differentiable: Whether its results keep their graph.
        kernel: What runs in the place of the module, if there is such.
        samples: How many samples the operations are for, and how many the kernel, where these are
            more: it runs for each of them.
    """

    recording: Recording
    module: fx.GraphModule
    constants: tuple[Tensor, ...]
    run: Callable[..., Any]
    mode: Mode
    fixed: tuple[int, int]
    waists: tuple[str, ...]
    note: str | None = None
    differentiable: bool = False
    kernel: Callable[[Sequence[Tensor]], tuple[Tensor, ...] | None] | None = None
    samples: tuple[int, int] | None = None

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """The parts of the Jacobian at other inputs; None where they are not all finite.

        In another order of multiplication infinities meet other zeros: passes say what is right.
        """
        if self.kernel is not None:
            return self.kernel(inputs)
        *parts, probe = self.run(*(x.contiguous() for x in inputs), *self.constants)
        if not math.isfinite(probe.item()):
            return None
        # Whoever writes to a result must not write to what its graph has saved.
        return tuple([p.clone() for p in parts]) if self.differentiable else tuple(parts)

    @property
    def is_compiled(self) -> bool:
        """Whether it runs as compiled code."""
        return bool(self.kernel is not None or self.run != self.module.forward)

    @property
    def form(self) -> str:
        """How it runs, in words."""
        if self.kernel is not None:
            return f"{self.mode}, kernel"
        return f"{self.mode}, compiled" if self.is_compiled else self.mode

    @property
    def work(self) -> Work:
        """What its operations do."""
        work = work_of(self.module.graph)
        return work if self.samples is None else work.times(self.samples[1] / self.samples[0])

    def compiled(self, inputs: Sequence[Tensor]) -> Emitted:
        """The same program as compiled code; as it is, with a note, where that cannot be done."""
        module, constants = compilable(self.recording)
        inputs = [x.contiguous() for x in inputs]
        try:
            run = compiled(module, [*inputs, *constants])
        except NotCompiled as refusal:
            return replace(self, note=str(refusal))
        return replace(self, module=module, constants=constants, run=run)

    def with_graph(self) -> Emitted:
        """The same program, whose results can be differentiated again.

        Raises:
            PlanRefused: Torch has no derivative of something that it runs.
        """
        beside = beside_results(self.recording)
        if beside:
            raise PlanRefused(f"torch has no derivative of a second result of {beside[0]}")
        module, constants = compilable(self.recording)
        return replace(
            self, module=module, constants=constants, run=module.forward, differentiable=True
        )


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
) -> Emitted:
    """Accumulates the Jacobian once, at some inputs, and keeps the operations that it took.

    Args:
        derivative: The traced backward pass, or that of J'.
        inputs: A tensor for each of its placeholders that is not a cotangent.
        target: What the result looks like.
        most: Numbers that intermediate adjoints may have, all together.
        limit: Seconds that the walk over the graph may take.

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
        samples = derivative.row_shapes[0][0] if target.batched else 1
        sweep = Sweep(derivative, given, record, most, limit, samples)
        gradients = sweep.gradients()
        terms = [x for g in gradients if g is not None for x in g.terms]
        if sum(math.prod(x.loop) for x in terms) > most:
            raise PlanRefused("far more products than entries would be added up")
        parts = record(lambda: _parts(derivative, gradients, inputs, target, recorder.varies))
        probe = record(lambda: _probe(parts))
        fixed = sum(
            math.prod(x.loop)
            for x in terms
            if not any(recorder.varies(factor) for factor in x.factors)
        )
    recording = folded(recorded(recorder, [*parts, probe]))
    module, constants = executable(recording)
    whole = sum(math.prod(x.loop) for x in terms)
    about = target.mode, (fixed, whole), sweep.waists
    return Emitted(recording, module, constants, module.forward, *about)


def recording_of(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Recording:
    """The operations of a graph, with what does not vary computed beforehand."""
    recorder = Recorder(_Everything(), parameters_vary=True)
    for tensor in inputs:
        recorder.input(tensor)
    with torch.no_grad(), recorder:
        made = module(*inputs)
    return folded(recorded(recorder, list(made)))


def evaluated(emitted: Emitted, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What a program gives, to be checked: as it will run, on memory of another kind.

    Raises:
        RefusedHere: The result is not finite.
    """
    with torch.no_grad():
        parts = emitted([elsewhere(x) for x in inputs])
    if parts is None:
        raise RefusedHere("values are not finite")
    return parts


def elsewhere(tensor: Tensor) -> Tensor:
    """The same numbers, not at the beginning of their memory."""
    memory = torch.empty(tensor.numel() + 3, dtype=tensor.dtype, device=tensor.device)
    return memory[3:].view(tensor.shape).copy_(tensor)


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
        mode: Whether the derivative is that of J (`reverse`) or that of J' (`forward`).
    """

    pattern: Pattern | None = None
    batched: bool = False
    mode: Mode = "reverse"


def _parts(
    derivative: Derivative,
    gradients: Sequence[Adjoint | None],
    inputs: Sequence[Tensor],
    target: Target,
    varies: Callable[[Tensor], bool],
) -> list[Tensor]:
    """The values of a sparse result, or every block of a dense one, row by row."""
    elements = [tuple(s) for s in derivative.column_shapes]
    if target.pattern is not None:
        starts = [0, *accumulate(math.prod(s) for s in elements)]
        present = [(g, k) for g, k in zip(gradients, starts, strict=False) if g is not None]
        slots = write.Slots.of(target.pattern, target.mode)
        return [write.sparse(present, slots, inputs[0], varies)]
    seeds = [tuple(s) for s in derivative.row_shapes]
    starts = [0, *accumulate(math.prod(s) for s in seeds)]
    rows, columns = (seeds, elements) if target.mode == "reverse" else (elements, seeds)
    parts = []
    for i, j in product(range(len(rows)), range(len(columns))):
        source, leaf = (i, j) if target.mode == "reverse" else (j, i)
        samples = rows[i][0] if target.batched else None
        block = write.Block(
            starts[source], math.prod(seeds[source]), elements[leaf], samples, target.mode
        )
        outer = (*rows[i], *(columns[j] if samples is None else columns[j][1:]))
        parts.append(write.dense(gradients[leaf], block, inputs[j]).view(outer))
    return parts
