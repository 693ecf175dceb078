"""The plans of a function whose Jacobian is accumulated: when they are made, and found again.

A plan holds as long as nothing that the function reads has changed (`guards.guard`). It is made
when calls have taken as long as it will take, or when this one would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from torchjac.call import Call
from torchjac.capture.eager_graph import Program
from torchjac.compiler.batch_invariance import MANY
from torchjac.compiler.bug_report import report
from torchjac.compiler.compile import planned
from torchjac.compiler.compiled import Accumulated
from torchjac.compiler.store import Saved
from torchjac.errors import CaptureRefused, Disagrees, PlanError, PlanRefused, RefusedHere
from torchjac.guards.builder import Policy
from torchjac.guards.guard import Fingerprint
from torchjac.guards.objects import inert
from torchjac.host.memory import default_budget
from torchjac.jit.cache import Before, CaptureCache
from torchjac.passes.candidates import plain_seconds
from torchjac.request import Wanted

# Seconds that a plan takes: to trace, and for each operation of the graph.
_PLAN, _PLAN_NODE = 25e-3, 0.8e-3
# And more of them for a batch, whose kernel is made in the same turn.
_KERNEL, _KERNEL_NODE = 0.3, 4e-3
# Plans that did not hold before this function is not planned any more.
_PATIENCE = 3
# Calls that miss a shortcut for each that makes another one, at most: that takes as long as some
# hundred of them, and a shortcut that is never taken is to be replaced.
_SELDOM = 256

_checking: ContextVar[bool] = ContextVar("torchjac_checking", default=False)


# Whether every result of a plan is compared with passes.
is_checking: Callable[[], bool] = _checking.get


@contextmanager
def checking() -> Iterator[None]:
    """Compares every result of a plan in this context with passes."""
    token = _checking.set(True)
    try:
        yield
    finally:
        _checking.reset(token)


@inert
class Accumulation:
    """The plans of one function.

    Attributes:
        refused: Why there is no plan, where there is none.
        report: What the issue tracker needs to know of a plan that was wrong.
        shortcut: To the result of calls like the last one, if there is one.
    """

    def __init__(self, wanted: Wanted):
        """Begins without any.

        Args:
            wanted: What plans are made for.
        """
        self._wanted = wanted
        self._plans: CaptureCache[Accumulated | str] = CaptureCache(
            policy=Policy(parameters="objects")
        )
        self._spent = 0.0
        self._needed = 0.0  # to have been spent before a plan is made; known after the first call
        self._made = 0
        self.refused: str | None = None
        self.report: str | None = None
        self.shortcut: Callable[[tuple[Any, ...]], Any] | None = None
        self._missed, self._until = 0, 1

    def find(self, call: Call) -> Accumulated | None:
        """The plan for a call, if there is one."""
        if not len(self._plans) or torch.is_autocast_enabled("cpu"):
            return None
        found = self._plans.lookup(call)
        if isinstance(found, str):
            self.refused = found
            return None
        return found

    def latest(self) -> tuple[Fingerprint, Any] | None:
        """The plan that was used last, and the fingerprint of its calls."""
        return self._plans.latest()

    def missed(self, make: Callable[[], Callable[[tuple[Any, ...]], Any] | None]) -> None:
        """Notes a call that a shortcut could have answered; now and then makes one for its like.

        It is done ever more seldom.
        """
        self._missed += 1
        if self._missed == self._until:
            self._missed, self._until = 0, min(2 * self._until, _SELDOM)
            self.shortcut = make()

    def spent(self, seconds: float) -> None:
        """Notes how long a call took that was answered by passes."""
        self._spent += seconds

    def before(self, call: Call) -> Before | None:
        """What a call reads, where it may be planned once its function has run.

        A function that changes what it reads, by whatever means, does something each time it runs:
        it is not planned.
        """
        if self._made >= _PATIENCE:
            return None
        return self._plans.before(call) if self._soon or self._spent >= self._needed else None

    def plan(
        self, call: Call, program: Program, before: Before | None
    ) -> tuple[Accumulated, Any] | None:
        """A new plan and the Jacobian at this call, where that is worth the time.

        Args:
            call: The function and its arguments.
            program: Its graph at these arguments, to check the plan against.
            before: What it read before the graph was made.
        """
        if before is None or self._made >= _PATIENCE or not _is_supported(call, program):
            return None
        nodes, predicted = self._passes(program)
        self._needed = _PLAN + _PLAN_NODE * nodes - predicted
        if (program.batch or 0) >= MANY:
            self._needed += _KERNEL + _KERNEL_NODE * nodes
        if not self._soon and self._spent < self._needed:
            return None
        if self._plans.lookup(call) is not None:
            return None
        self._made += 1
        made: list[Any] = []

        def make() -> Accumulated | str:
            try:
                wanted = replace(self._wanted, predicted=predicted)
                plan, value = planned(call, program, wanted)
            except RefusedHere:  # it says nothing of other values
                raise
            except (CaptureRefused, PlanRefused) as refusal:
                if isinstance(refusal, Disagrees):
                    self.report = refusal.report
                return str(refusal)
            except Exception as error:  # passes give the result; the record says what went wrong
                return f"{type(error).__name__}: {error}"
            made.append(value)
            return plan

        try:
            found = make()
        except RefusedHere as refusal:
            self.refused = str(refusal)
            return None
        changed = self._plans.keep(before, call, found)
        self.refused = found if isinstance(found, str) else changed
        if isinstance(found, str) or changed is not None:
            return None
        return found, made[0]

    def save(self, path: str | Path, call: Call, capture: Callable[[], Program]) -> None:
        """Writes the plan for a call to a file; it is made now if there is none.

        Args:
            path: The file.
            call: The function and its arguments.
            capture: Gives its graph at these arguments.

        Raises:
            PlanError: There is no plan, or it cannot be written down.
        """
        Saved.of(self.made(call, capture), self._wanted.layout).write(path)

    def made(self, call: Call, capture: Callable[[], Program], whole: bool = False) -> Accumulated:
        """The plan for a call; it is made now if there is none.

        Args:
            call: The function and its arguments.
            capture: Gives its graph at these arguments.
            whole: Whether its operations must be on whole tensors, not on a few samples.

        Raises:
            PlanError: There is none.
        """
        plan, why = self.find(call), self.refused
        if whole and plan is not None and plan.emitted.samples is not None:
            plan = None
        before = self._plans.before(call)
        if plan is None and _is_supported(call, program := capture()):
            _, predicted = self._passes(program)
            try:
                wanted = replace(self._wanted, predicted=predicted, whole=whole)
                plan, _ = planned(call, program, wanted)
            except (CaptureRefused, PlanRefused) as refusal:
                why = str(refusal)
            else:
                if not whole:
                    self._plans.keep(before, call, plan)
        if plan is None:
            raise PlanError(f"torchjac: there is no plan: {why or 'not supported'}.")
        return plan

    def load(self, path: str | Path) -> None:
        """Reads a plan, to be used for the calls that it was made for.

        Raises:
            PlanError: The file holds something else.
        """
        saved = (*self._wanted.saved, Saved.read(path))
        self._wanted = replace(self._wanted, saved=saved)
        self.shortcut = None

    def _passes(self, program: Program) -> tuple[int, float]:
        """Operations of its graph, and seconds that passes should take."""
        return plain_seconds(program, self._wanted.budget or default_budget(program.device))

    @property
    def _soon(self) -> bool:
        """Whether a plan is made at the first call, whatever that takes."""
        return self._wanted.compiled or bool(self._wanted.saved)

    def checked(
        self, plan: Accumulated | None, call: Call, program: Program, before: Before | None
    ) -> tuple[Accumulated, Any] | None:
        """A plan and the Jacobian at this call, compared with passes; None where there is none.

        Args:
            plan: The plan there is, if there is one; if it is wrong it is given up.
            call: The function and its arguments.
            program: Its graph at these arguments.
            before: What it read before the graph was made.
        """
        if plan is None:
            return self.plan(call, program, before)
        try:
            value = plan.checked(call, program)
        except RefusedHere:
            return None
        except Disagrees as wrong:
            self._plans.clear()
            self.shortcut = None
            self._made = _PATIENCE
            self.refused = str(wrong)
            self.report = report(call, plan.derivative, plan.emitted, wrong)
            return None
        return None if value is None else (plan, value)


def _is_supported(call: Call, program: Program) -> bool:
    given = (*program.inputs, *program.outputs)
    return (
        bool(program.inputs)
        and len(program.inputs) == len(program.nest.inputs)
        and all(t.device.type == "cpu" and t.numel() for t in given)
        and not torch.is_autocast_enabled("cpu")
    )
