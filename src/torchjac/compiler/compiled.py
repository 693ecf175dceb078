"""A compiled Jacobian: its programs, its timings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchjac._torch import modes
from torchjac.call import Call, arguments, to_differentiate
from torchjac.capture.eager_graph import Program
from torchjac.capture.linear_program import Derivative
from torchjac.compiler.native import PATIENCE, faster, kernel_seconds, with_kernel
from torchjac.compiler.program.tensor_program import Emitted
from torchjac.errors import PlanRefused
from torchjac.host.costs import machine
from torchjac.passes.verify import Reference
from torchjac.request import Mode
from torchjac.sparsity.pattern import Pattern

# Seconds of runs before a kernel is thought of.
_EARLIEST = 0.3


# Seconds of one call that may go into a kernel that nobody asked for.
_LATEST = 30.0


# Timings of either way, of which the best counts.
_RUNS = 3


# A plan that ran this much slower than passes do is not run again.
_SLOW = 3.0


# Passes predicted this much slower need not be timed; measured this much slower, not once more.
_CLEAR, _FAR = 4.0, 20.0


@dataclass(frozen=True, slots=True)
class Tried:
    """An order of elimination that a plan could have been made with.

    Attributes:
        mode: The order.
        predicted: Seconds that its operations should take; None if there are none.
        measured: Seconds that they took, best of some; None if that was not tried.
        refused: Why it was not to be had; None if it was.
        form: How it runs: its operations one by one, compiled, as a kernel.
    """

    mode: Mode
    predicted: float | None = None
    measured: float | None = None
    refused: str | None = None
    form: str = ""

    @property
    def name(self) -> str:
        """The order, and how it runs."""
        return self.form or self.mode


@dataclass(eq=False)
class Accumulated:
    """A Jacobian that a straight line of operations computes.

    Attributes:
        derivative: What was accumulated.
        emitted: The operations.
        pattern: Structural nonzeros of a sparse result; None for a dense one.
        finish: Nests what they give as the user nests outputs and inputs.
        shape: Rows, columns, samples.
        predicted: Seconds that passes were predicted to take.
        budget: Bytes that intermediate values were allowed to take.
        tried: Orders of elimination that were looked at.
        blame: Operations that made J dense.
        seconds: Of the runs so far.
        others: Of calls that were answered by passes.
        spent: Seconds of all runs so far, until a kernel was made or refused.
        alternatives: Programs of other orders, until a kernel was made or refused.
    """

    derivative: Derivative
    emitted: Emitted
    pattern: Pattern | None
    finish: Callable[[Any], Any]
    shape: tuple[int, int, int | None]
    predicted: float
    budget: int
    tried: tuple[Tried, ...] = ()
    blame: tuple[str, ...] = ()
    seconds: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    spent: float = 0.0
    alternatives: tuple[Emitted, ...] = ()

    @property
    def programs(self) -> tuple[Emitted, ...]:
        """All programs that give this Jacobian."""
        return (self.emitted, *self.alternatives)

    def wins(self) -> bool:
        """Whether the next call is for this plan, by what was measured."""
        mine = min(self.seconds, default=0.0)
        if mine > _SLOW * min(self.others, default=max(self.predicted, 1e-3)):
            return False  # not even a second time
        if len(self.seconds) < _RUNS:
            return True
        if not self.others and self.predicted > _CLEAR * mine:
            return True
        if len(self.others) < _RUNS:
            return bool(self.others) and min(self.others) > _FAR * mine
        return mine <= min(self.others)

    def settled(self) -> bool:
        """Whether nothing is measured any more: the plan wins as it is."""
        return len(self.seconds) >= _RUNS and self.wins()

    def passed(self, seconds: float, call: Call) -> None:
        """Notes how long a call took that was answered by passes; makes a kernel as `ran` does.

        Passes may be faster than the operations one by one, and slower than a kernel of them.
        """
        if len(self.others) < _RUNS:
            self.others.append(seconds)
        self._spend(seconds, call)

    def parts(self, call: Call) -> tuple[Tensor, ...] | None:
        """Blocks, or the values of the pattern, at the arguments of a call; None if not finite."""
        keeps = self.emitted.differentiable
        with torch.set_grad_enabled(keeps), modes.ordinary_tensors():
            return self.emitted(to_differentiate(call) if keeps else arguments(call))

    def ran(self, seconds: float, call: Call) -> None:
        """Notes how long a run took; makes a kernel where that is due.

        It is when all runs have taken as long as that will take, so that it at most doubles the
        time; never while algorithms are to be deterministic: results change by rounding.
        """
        if len(self.seconds) < _RUNS:
            self.seconds.append(seconds)
        self._spend(seconds, call)

    def _spend(self, seconds: float, call: Call) -> None:
        if math.isinf(self.spent):
            return
        self.spent += seconds
        if self.spent < _EARLIEST or self.spent < (needed := kernel_seconds(self.programs)):
            return
        self.spent = math.inf
        if needed > _LATEST:
            why = f"it should take {needed:.0f} s to write; compile=True has it done"
            self.tried = (*self.tried, Tried(self.emitted.mode, refused=why, form="kernel"))
            return
        if self.emitted.differentiable or self.emitted.is_compiled:
            return
        if not torch.are_deterministic_algorithms_enabled():
            with modes.ordinary_tensors():
                self._improve(arguments(call))

    def _improve(self, inputs: list[Tensor]) -> None:
        try:
            made = with_kernel(self.programs, inputs, self.shape[2], PATIENCE)
        except PlanRefused as refusal:
            refused = Tried(self.emitted.mode, refused=str(refusal), form="kernel")
            self.tried = (*self.tried, refused)
        else:
            best, (_, took) = faster([self.emitted, made], inputs)
            predicted = machine().seconds(made.work)
            self.tried = (*self.tried, Tried(made.mode, predicted, took, form=made.form))
            if best is made:
                self.emitted = made
                self.seconds.clear()
        self.alternatives = ()

    def __call__(self, call: Call) -> Any:
        """The Jacobian at the arguments of a call; None where it is not finite."""
        parts = self.parts(call)
        return None if parts is None else self.finish(parts)

    def checked(self, call: Call, program: Program) -> Any:
        """The same, compared with passes.

        Raises:
            Disagrees: They give something else.
            RefusedHere: They are not finite.
        """
        parts = self.parts(call)
        if parts is None:
            return None
        Reference(program).check(parts, self.pattern)
        return self.finish(parts)
