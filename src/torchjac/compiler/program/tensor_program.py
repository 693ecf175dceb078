"""The tensor program: a straight line of tensor operations that computes the Jacobian."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from torchjac._torch.inductor import NotCompiled, compile_graph
from torchjac._torch.trace.recording import Recording
from torchjac.compiler.program.optimize import plain_graph, undifferentiable_results
from torchjac.compiler.program.work import work_of
from torchjac.errors import PlanRefused
from torchjac.host.costs import ProgramWork
from torchjac.request import Mode


@dataclass(frozen=True, slots=True, eq=False)
class TensorProgram:
    """A program that computes the entries of a Jacobian.

    Attributes:
        recording: Its operations. They take the inputs, and give the parts of the result and a sum
            of all entries, which is not finite where an entry is not.
        module: The optimized operations; they take the inputs and the constants.
        constants: Tensors that the program reads, and results that were computed beforehand.
        run: The module, or code that it was compiled to.
        mode: The order in which local Jacobians were multiplied.
        fixed: Number of entries that are the same for every input, and of all entries.
        waists: Values that took the place of rows: their size, and where they are.
        refusal: Why the program was not compiled, where a request asked for compiled code.
        differentiable: Whether its results keep their graph.
        kernel: Native code that runs in the place of the module; None if there is none.
        samples: Samples of the operations, and samples of the kernel, which runs for each of them;
            None where both have the same number.
    """

    recording: Recording
    module: fx.GraphModule
    constants: tuple[Tensor, ...]
    run: Callable[..., Any]
    mode: Mode
    fixed: tuple[int, int]
    waists: tuple[str, ...]
    refusal: str | None = None
    differentiable: bool = False
    kernel: Callable[[Sequence[Tensor]], tuple[Tensor, ...] | None] | None = None
    samples: tuple[int, int] | None = None

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """The parts of the Jacobian at some inputs; None where an entry is not finite.

        In another order of multiplication infinities meet other zeros: passes give the result.
        """
        if self.kernel is not None:
            return self.kernel(inputs)
        *parts, total = self.run(*(x.contiguous() for x in inputs), *self.constants)
        if not math.isfinite(total.item()):
            return None
        # A caller may write to a result, and must not write to tensors that its graph has saved.
        return tuple([p.clone() for p in parts]) if self.differentiable else tuple(parts)

    @property
    def is_compiled(self) -> bool:
        """Whether it runs as compiled code."""
        return bool(self.kernel is not None or self.run != self.module.forward)

    @property
    def form(self) -> str:
        """Its mode, and the kind of code that runs, in words."""
        if self.kernel is not None:
            return f"{self.mode}, kernel"
        return f"{self.mode}, compiled" if self.is_compiled else self.mode

    @property
    def work(self) -> ProgramWork:
        """The work of its operations, in counts."""
        work = work_of(self.module.graph)
        return work if self.samples is None else work.times(self.samples[1] / self.samples[0])

    def compiled(self, inputs: Sequence[Tensor]) -> TensorProgram:
        """The same program as compiled code, or with the refusal of the compiler."""
        module, constants = plain_graph(self.recording)
        inputs = [x.contiguous() for x in inputs]
        try:
            run = compile_graph(module, [*inputs, *constants])
        except NotCompiled as refusal:
            return replace(self, refusal=str(refusal))
        return replace(self, module=module, constants=constants, run=run)

    def with_graph(self) -> TensorProgram:
        """The same program, whose results can be differentiated again.

        Raises:
            PlanRefused: Torch has no derivative of one of its operations.
        """
        operations = undifferentiable_results(self.recording)
        if operations:
            raise PlanRefused(f"torch has no derivative of a second result of {operations[0]}")
        module, constants = plain_graph(self.recording)
        return replace(
            self, module=module, constants=constants, run=module.forward, differentiable=True
        )
