"""A clock that tests drive, and a reading of which tier answered each call of a Jacobian.

No time here is real. A run of the function, of a backward pass, of a plan or of a kernel costs what
the test says, so that no machine decides otherwise. Functions say that they run through a logger:
guards let loggers alone, since no derivative depends on one.

Two internal names stand here. `TensorProgram.__call__` is where a plan or a kernel runs, so that
it can take its time. `machine` holds the costs that predictions rest on: the default ones on any
machine.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import torchjac
from laws import value
from torchjac.compiler.program.tensor_program import TensorProgram
from torchjac.host import costs as machine
from torchjac.host.clock import clock as replaced

meter = logging.getLogger("torchjac-ticking")
meter.propagate = False
meter.setLevel(logging.INFO)


@dataclass
class Ticking:
    """A clock that stands still but for what is spent.

    Making a plan takes no time but that of `trace`, `plan` and `kernel`.

    Attributes:
        step: Seconds that every reading takes.
        body: Seconds that a run of the function takes.
        backward: Seconds that a backward pass through `metered` takes for one seed.
        batched: Seconds that it takes for several seeds at once.
        plan: Seconds that a run of a plan takes.
        kernel: Seconds that a run of a kernel takes.
        trace: Seconds that it takes to trace the function.
        operation: Seconds that an operation is predicted to take.
        now: Seconds since the clock was made.
        runs: How often each of them ran within the last call.
    """

    step: float = 0.0
    body: float = 0.0
    backward: float = 0.0
    batched: float = 0.0
    plan: float = 0.0
    kernel: float = 0.0
    trace: float = 0.0
    operation: float = 2.5e-6
    now: float = 0.0
    runs: Counter[str] = field(default_factory=Counter)

    def __call__(self) -> float:
        self.now += self.step
        return self.now

    def ran(self, name: str) -> None:
        """Counts a run, and lets it take its time."""
        planning = self.runs["trace"] and name in ("body", "backward", "batched")
        self.runs[name] += 1
        self.now += 0.0 if planning else getattr(self, name)


class _Heard(logging.Handler):
    def __init__(self, clock: Ticking):
        super().__init__()
        self._clock = clock

    def emit(self, record: logging.LogRecord) -> None:
        traced = torch._C._len_torch_dispatch_stack() > 0
        if not traced:
            self._clock.ran(record.msg)
        elif record.msg == "body":
            self._clock.ran("trace")


@contextlib.contextmanager
def ticking(**costs: float) -> Iterator[Ticking]:
    """Replaces the clock of torchjac by one that is driven."""
    ticks = Ticking(**costs)  # type: ignore[arg-type]
    heard, run = _Heard(ticks), TensorProgram.__call__

    def metered_run(self: TensorProgram, inputs: Any) -> Any:
        ticks.ran("plan" if self.kernel is None else "kernel")
        return run(self, inputs)

    model = replace(machine.DEFAULT, operation=ticks.operation)  # not measured by this clock
    with pytest.MonkeyPatch.context() as patch, replaced(ticks):
        patch.setitem(machine._known, machine._name(), model)
        patch.setattr(TensorProgram, "__call__", metered_run)
        meter.addHandler(heard)
        try:
            yield ticks
        finally:
            meter.removeHandler(heard)


class _Metered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        batched = torch._C._functorch.is_batchedtensor(gradient)
        meter.info("batched" if batched else "backward")
        return gradient


def metered(x: Tensor) -> Tensor:
    """The same tensor; a backward pass through it is heard."""
    result: Tensor = _Metered.apply(x)  # type: ignore[no-untyped-call]
    return result


def answered(ticks: Ticking, J: Any, *args: Any, **kwargs: Any) -> str:
    """Which tier answers a call: passes, plan, kernel, or fast for a kernel by the fast path.

    A plus stands before it where the function was traced within the call. Where a kernel is made
    after the run of a plan, the record of the call names the kernel, and so does this.
    """
    ticks.runs.clear()
    J(*args, **kwargs)
    record = torchjac.last_run()
    assert record is not None
    tier = "passes"
    if record.engine == "accumulate":
        ran = ticks.runs["plan"] + ticks.runs["kernel"]
        tier = "plan" if "kernel" not in record.mode else "kernel" if ran else "fast"
    elif record.engine == "torch.func":
        tier = "torch.func"
    return f"+{tier}" if ticks.runs["trace"] else tier


def history(ticks: Ticking, J: Any, calls: Iterable[Any]) -> list[str]:
    """Which tier answers each of some calls, each given by its argument or arguments."""
    return [answered(ticks, J, *(c if isinstance(c, tuple) else (c,))) for c in calls]


# Passes are slow, plans faster, kernels the fastest: far apart, none of them hopeless.
USUAL = {"body": 10.0, "plan": 1.0, "kernel": 0.1}
# A compiled function: runs of its own, passes as the incumbent, then the kernel for good.
TRIAL = "+kernel kernel*4 passes kernel"


def product(x: Tensor) -> Tensor:
    meter.info("body")
    return x.sin() * x.sum()


def drawing(x: Tensor) -> Tensor:
    meter.info("body")
    return x * torch.rand(3, dtype=x.dtype)


def branching(x: Tensor) -> Tensor:
    meter.info("body")
    return x.sin() if x.sum() > 0 else x.cos()


INPUTS = {
    **{str(n): value(n).abs() for n in range(3, 8)},
    "9": value(9),
    "n": torch.full((3,), torch.nan, dtype=torch.float64),
    "b": value(40, 3),
    "s": value(31, 3),
}


def told(tiers: list[str]) -> str:
    """Words one after the other, equal neighbors counted: `plan*2 passes`."""
    runs = [(tier, len(list(alike))) for tier, alike in itertools.groupby(tiers)]
    return " ".join(tier if count == 1 else f"{tier}*{count}" for tier, count in runs)


def joined(text: str) -> str:
    """The same text where equal neighbors are counted together."""
    pairs = [word.partition("*") for word in text.split()]
    return told([tier for tier, _, count in pairs for _ in range(int(count or 1))])


def ran(ticks: Ticking, J: Any, calls: str) -> str:
    """Which tier answers some calls, given by the names of their inputs."""
    return told(history(ticks, J, [INPUTS[name] for name in calls]))


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Algorithms are to be deterministic."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
