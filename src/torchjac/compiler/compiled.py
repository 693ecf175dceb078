"""A compiled Jacobian: one frozen value, which a call runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchjac._torch import modes
from torchjac.call import Call, arguments, differentiable_variables
from torchjac.capture.eager_graph import EagerGraph
from torchjac.capture.linear_program import LinearProgram
from torchjac.compiler.native import PATIENCE, with_kernel
from torchjac.compiler.program.tensor_program import TensorProgram
from torchjac.host.costs import cost_model
from torchjac.passes.verify import Reference
from torchjac.request import Mode, Output


@dataclass(frozen=True, slots=True)
class Tried:
    """An order of elimination, and the kind of code of its program, that was tried.

    Attributes:
        mode: The order.
        predicted: Predicted seconds of its program; None if there is no program.
        measured: Seconds of its best run; None if it was not timed.
        refused: Why there is no program; None if there is one.
        form: The kind of code: tensor operations, compiled, or a kernel.
    """

    mode: Mode
    predicted: float | None = None
    measured: float | None = None
    refused: str | None = None
    form: str = ""

    @property
    def name(self) -> str:
        """The form, or the order where it runs as tensor operations."""
        return self.form or self.mode


@dataclass(frozen=True, eq=False)
class Compiled:
    """A Jacobian that a straight line of operations, or native code made of it, computes.

    Attributes:
        derivative: The linear program that was accumulated.
        program: The tensor program, with its native code if there is any.
        output: The output that it computes, with its pattern if it has one.
        finish: Nests the parts of the result as the user nests outputs and inputs.
        shape: Rows, columns, samples.
        passes: Predicted seconds of passes.
        budget: Bytes that intermediate values may take.
        tried: Orders of elimination, and native code, that were tried.
        blame: Operations that made J dense.
        alternatives: Tensor programs of the orders that were slower.
    """

    derivative: LinearProgram
    program: TensorProgram
    output: Output
    finish: Callable[[Any], Any]
    shape: tuple[int, int, int | None]
    passes: float
    budget: int
    tried: tuple[Tried, ...] = ()
    blame: tuple[str, ...] = ()
    alternatives: tuple[TensorProgram, ...] = ()

    @property
    def programs(self) -> tuple[TensorProgram, ...]:
        """All tensor programs of this Jacobian."""
        return (self.program, *self.alternatives)

    def parts(self, call: Call) -> tuple[Tensor, ...] | None:
        """Blocks, or the values of the pattern, at the arguments of a call; None if not finite."""
        keeps = self.program.differentiable
        with torch.set_grad_enabled(keeps), modes.ordinary_tensors():
            return self.program(differentiable_variables(call) if keeps else arguments(call))

    def __call__(self, call: Call) -> Any:
        """The Jacobian at the arguments of a call; None where it is not finite."""
        parts = self.parts(call)
        return None if parts is None else self.finish(parts)

    def checked(self, call: Call, graph: EagerGraph) -> Any:
        """The Jacobian at the arguments of a call, compared with passes; None where not finite.

        Raises:
            Disagrees: Passes give another Jacobian.
            RefusedHere: Passes are not finite.
        """
        parts = self.parts(call)
        if parts is None:
            return None
        Reference(graph).check(parts, self.output)
        return self.finish(parts)

    def native(self, call: Call) -> Compiled:
        """The same Jacobian as native code.

        Args:
            call: Arguments to compare native code with tensor operations at.

        Raises:
            PlanRefused: There is no native code.
        """
        with modes.ordinary_tensors():
            program = with_kernel(self.programs, arguments(call), self.shape[2], PATIENCE)
        tried = Tried(program.mode, cost_model().seconds(program.work), form=program.form)
        return replace(self, program=program, tried=(*self.tried, tried), alternatives=())
