"""The tensor program: a straight line of tensor operations that gives the Jacobian."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from torchjac._torch.inductor import NotCompiled, compile_graph
from torchjac._torch.trace.recording import Recording
from torchjac.compiler.program.cost import work_of
from torchjac.compiler.program.optimize import beside_results, compilable
from torchjac.errors import PlanRefused
from torchjac.host.costs import Work
from torchjac.request import Mode


@dataclass(frozen=True, slots=True, eq=False)
class TensorProgram:
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

    def compiled(self, inputs: Sequence[Tensor]) -> TensorProgram:
        """The same program as compiled code; as it is, with a note, where that cannot be done."""
        module, constants = compilable(self.recording)
        inputs = [x.contiguous() for x in inputs]
        try:
            run = compile_graph(module, [*inputs, *constants])
        except NotCompiled as refusal:
            return replace(self, note=str(refusal))
        return replace(self, module=module, constants=constants, run=run)

    def with_graph(self) -> TensorProgram:
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
