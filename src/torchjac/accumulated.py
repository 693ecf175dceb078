"""Functions whose Jacobian is accumulated: planned once, checked, timed, and then just computed.

A plan holds as long as nothing that the function reads has changed (`capture.guards`). It is made
when calls have taken as long as it will take, or when this one would; it is checked against a pass
of autograd, and used where it measures faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from torchjac._torch import modes
from torchjac.capture import Call, Program
from torchjac.capture.cache import Before, CaptureCache
from torchjac.capture.derivative import arguments, trace_function
from torchjac.capture.watch import Policy
from torchjac.engines.accumulate import Emitted, Target, emit
from torchjac.engines.accumulate.check import agrees
from torchjac.errors import CaptureRefused, PlanRefused, RefusedHere
from torchjac.explain import Candidate, Record, remember
from torchjac.layout.nested import finisher
from torchjac.plan import default_budget, plain_seconds
from torchjac.structure import Pattern
from torchjac.structure.detect import KEEP
from torchjac.structure.interpret import interpret
from torchjac.structure.lanes import is_batched
from torchjac.structure.pattern import pattern_of

# Seconds that a plan takes: to trace, and for each operation of the graph.
_PLAN, _PLAN_NODE = 20e-3, 0.5e-3
# Numbers that intermediate values may have for each second that passes would take, and at least.
_NUMBERS, _LEAST = 2e8, 2**21
# Or for each number of the result.
_TIMES = 32
# Seconds that it may take to plan at least, and for each second that passes would take.
_LIMIT, _PATIENT = 1.0, 4.0
# Timings of either way, of which the best counts.
_RUNS = 3
# A plan that ran this much slower than passes do is not run again.
_SLOW = 3.0
# Passes predicted this much slower need not be timed.
_CLEAR = 4.0
# Plans that did not hold before this function is not planned any more.
_PATIENCE = 3


@dataclass(eq=False)
class Accumulated:
    """A Jacobian that a straight line of operations computes.

    Attributes:
        emitted: The operations.
        pattern: Structural nonzeros of a sparse result; None for a dense one.
        finish: Nests what they give as the user nests outputs and inputs.
        seconds: Of the runs so far.
        others: Of calls that were answered by passes.
        predicted: Seconds that passes were predicted to take.
        shape: Rows, columns, samples.
        budget: Bytes that intermediate values were allowed to take.
    """

    emitted: Emitted
    pattern: Pattern | None
    finish: Callable[[Any], Any]
    shape: tuple[int, int, int | None]
    predicted: float
    budget: int
    seconds: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

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
            return False
        return mine <= min(self.others)

    def passed(self, seconds: float) -> None:
        """Notes how long a call took that was answered by passes."""
        if len(self.others) < _RUNS:
            self.others.append(seconds)

    def __call__(self, call: Call) -> Any:
        """The Jacobian at the arguments of a call; None where it is not finite."""
        with torch.no_grad(), modes.ordinary_tensors():
            parts = self.emitted(arguments(call))
            return None if parts is None else self.finish(parts)


class Accumulation:
    """The plans of one function."""

    def __init__(self, compiled: bool, layout: torch.layout, budget: int | None):
        """Begins without any.

        Args:
            compiled: Whether plans are to be compiled.
            layout: Layout of the result.
            budget: Bytes that intermediate values may take, or None for the default.
        """
        self._compiled = compiled
        self._layout = layout
        self._budget = budget
        self._plans: CaptureCache[Accumulated | str] = CaptureCache(
            policy=Policy(parameters="objects")
        )
        self._spent = 0.0
        self._made = 0
        self.refused: str | None = None

    def find(self, call: Call) -> Accumulated | None:
        """The plan for a call, if there is one."""
        if not len(self._plans) or torch.is_autocast_enabled("cpu"):
            return None
        found = self._plans.lookup(call)
        if isinstance(found, str):
            self.refused = found
            return None
        return found

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
        soon = self._compiled or not self._spent or self._spent > _PLAN / 2
        return self._plans.before(call) if soon else None

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
        nodes, predicted = plain_seconds(program, self._budget or default_budget(program.device))
        if not self._compiled and self._spent + predicted < _PLAN + _PLAN_NODE * nodes:
            return None
        if self._plans.lookup(call) is not None:
            return None
        self._made += 1
        made: list[Any] = []

        def make() -> Accumulated | str:
            try:
                plan, value = planned(
                    call, program, self._layout, self._budget, predicted, self._compiled
                )
            except RefusedHere:  # it says nothing of other values
                raise
            except (CaptureRefused, PlanRefused) as refusal:
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


def planned(
    call: Call,
    program: Program,
    layout: torch.layout = torch.strided,
    budget: int | None = None,
    predicted: float = 0.0,
    compiled: bool = False,
) -> tuple[Accumulated, Any]:
    """A plan for a function, checked, and the Jacobian at these arguments.

    Args:
        call: The function and its arguments.
        program: Its graph at these arguments, to check the plan against.
        layout: Layout of the result.
        budget: Bytes that intermediate values may take, or None for the default.
        predicted: Seconds that passes would take.
        compiled: Whether the operations are to be compiled.

    Raises:
        CaptureRefused: The derivative cannot be traced.
        PlanRefused: It cannot be accumulated, or would take too much, or is wrong.
    """
    derivative = trace_function(call, KEEP)
    nest, batched = program.nest, program.batch is not None
    if derivative.writes:
        raise PlanRefused("it writes to tensors that others may read")
    if any(g is None for g in derivative.gradients):
        raise PlanRefused("an input is not used")
    if not derivative.m or not all(s.numel() for s in derivative.column_shapes):
        raise PlanRefused("there is nothing to compute")
    pattern = None
    if layout is not torch.strided or batched:
        found = interpret(derivative)
        if batched and not is_batched(derivative, found):
            raise PlanRefused("samples are not proved to be independent")
        if layout is not torch.strided:
            pattern = pattern_of(derivative, found)
    budget = budget or default_budget(program.device)
    size = pattern.nnz if pattern is not None else derivative.m * derivative.n
    size //= program.batch or 1
    most = min(int(max(_LEAST, _TIMES * size, predicted * _NUMBERS)), budget // 16)
    target = Target(pattern, batched, compiled)
    limit = _LIMIT + _PATIENT * predicted
    with modes.ordinary_tensors():
        emitted, parts = emit(derivative, arguments(call), target, most, limit)
    agrees(parts, pattern, derivative, program)
    samples = program.batch
    plan = Accumulated(
        emitted,
        pattern,
        finisher(pattern, layout, nest.output_spec, nest.input_spec, derivative),
        (derivative.m // (samples or 1), derivative.n // (samples or 1), samples),
        predicted,
        budget,
    )
    return plan, plan.finish(parts)


def accumulate(plan: Accumulated, call: Call, entry: str, layout: torch.layout) -> Any:
    """Computes a Jacobian by its plan, and leaves a record of it; None where it is not finite."""
    started = perf_counter()
    value = plan(call)
    if value is None:
        return None
    took = perf_counter() - started
    if len(plan.seconds) < _RUNS:
        plan.seconds.append(took)
    note(plan, entry, layout, took)
    return value


def note(plan: Accumulated, entry: str, layout: torch.layout, seconds: float) -> None:
    """Leaves a record of a run, which holds no result."""
    remember(lambda: record(plan, entry, layout, seconds))


def record(plan: Accumulated, entry: str, layout: torch.layout, seconds: float) -> Record:
    """The record of one run."""
    m, n, samples = plan.shape
    mine = min(plan.seconds, default=None)
    others = min(plan.others, default=None)
    return Record(
        entry=entry,
        engine="accumulate",
        mode="reverse" if plan.emitted.run == plan.emitted.module.forward else "reverse, compiled",
        passes=0,
        chunk=0,
        budget=plan.budget,
        rows=m,
        columns=n,
        batch=samples,
        layout=layout,
        seconds=seconds,
        independence=None if samples is None else "proved",
        pattern=None if plan.pattern is None else f"{plan.pattern.nnz} nonzeros, global",
        candidates=(
            Candidate("accumulate", mine or seconds, mine),
            Candidate("passes", plan.predicted, others),
        ),
        refusals=() if plan.emitted.note is None else (("compile", plan.emitted.note),),
    )


def _is_supported(call: Call, program: Program) -> bool:
    given = (*program.inputs, *program.outputs)
    return (
        bool(program.inputs)
        and len(program.inputs) == len(program.nest.inputs)
        and all(t.device.type == "cpu" and t.numel() for t in given)
        and not torch.is_autocast_enabled("cpu")
    )
