"""Which tier answers each call of a Jacobian: passes, a plan, a kernel, or the fast path to it.

These are the transitions of `jit.tiers` at the public surface. All time is that of
a clock that stands still but for what a row spends (`ticking`), so that no machine decides. Rows of
warming up, and of native code, rest on seconds that an operation is predicted to take; all others
begin with `save`, `load` or `compile=True`. In a row, `calls` names inputs, one letter a call, and
`expected` counts equal neighbors. A plus marks a call in which the function was traced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import torchjac
from ticking import (
    INPUTS,
    TRIAL,
    USUAL,
    branching,
    deterministic,
    drawing,
    history,
    joined,
    meter,
    metered,
    product,
    ran,
    ticking,
    told,
)
from torchjac.jit import cache


def energy(x: Tensor) -> Tensor:
    meter.info("body")
    y = metered(x)
    return (y.sin() * y).sum()


def sample(x: Tensor) -> Tensor:
    meter.info("body")
    return x.sin() * x.sum(-1, keepdim=True)


def stencil(x: Tensor) -> Tensor:
    meter.info("body")
    return x[1:] * x[:-1]


def scalar(x: Tensor) -> Tensor:
    meter.info("body")
    return (x.sin() * x.sum()).sum()


def with_aux(x: Tensor) -> tuple[Tensor, Tensor]:
    meter.info("body")
    return x.sin() * x.sum(), x


@dataclass(frozen=True)
class Row:
    """Calls of a new Jacobian, and which tier answers each."""

    name: str
    f: Callable[..., Any]
    calls: str
    expected: str
    costs: dict[str, float] = field(default_factory=lambda: USUAL)
    options: dict[str, Any] = field(default_factory=lambda: {"compile": True})
    saved: str = ""
    make: Callable[..., Any] = torchjac.jacobian


SAVED: dict[str, Any] = {"options": {}, "saved": "3"}
WARM = {"backward": 0.02, "body": 0.01, "plan": 1e-3, "kernel": 1e-4}
ROWS = [
    # Cold and warming: the bank of predicted work.
    Row("cheap functions stay cold", product, "3" * 40, "passes*40", options={}),
    Row(
        "planned once the predicted work of calls pays for planning",
        energy,
        "3" * 10,
        "passes*2 +plan plan*7",
        {**WARM, "operation": 1e-3},
        {},
    ),
    Row(
        "planned at the first call where that pays at once",
        energy,
        "3",
        "+plan",
        {**WARM, "operation": 3e-3},
        {},
    ),
    Row("compiled at the first call", product, "3", "+kernel"),
    Row("saving makes the plan", product, "3", "plan", **SAVED),
    # Trial: the plan and passes take turns.
    Row(
        "the faster plan is kept",
        product,
        "3" * 12,
        "+plan plan*4 passes*3 plan*4",
        {**USUAL, "kernel": 3.0},
    ),
    Row(
        "passes far slower run once",
        product,
        "3" * 12,
        "+plan plan*4 passes plan*6",
        {**USUAL, "plan": 0.1, "kernel": 3.0},
    ),
    Row(
        "passes that are faster are kept",
        product,
        "3" * 40,
        "+plan plan*4 passes*35",
        {**USUAL, "plan": 20.0, "kernel": 30.0},
    ),
    Row(
        "a plan far slower is dropped after its trial",
        product,
        "3" * 40,
        "+plan plan*4 passes*35",
        {**USUAL, "plan": 40.0, "kernel": 50.0},
    ),
    Row(
        "passes predicted far slower do not run",
        product,
        "3" * 12,
        "plan*12",
        {"body": 1e-3, "plan": 1e-6},
        **SAVED,
    ),
    Row(
        "short runs: four of the plan, then passes",
        product,
        "3" * 6,
        "plan*4 passes*2",
        {"body": 1e-3, "plan": 1e-4},
        **SAVED,
    ),
    # Tier-up: from the plan to the kernel.
    Row(
        "a kernel once runs took as long as making it",
        product,
        "3" * 14,
        "plan*5 kernel*4 fast*5",
        {"body": 0.1, "plan": 0.06, "kernel": 0.01, "operation": 0.01},
        **SAVED,
    ),
    Row(
        "a kernel that is slower is dropped",
        product,
        "3" * 20,
        "plan*5 kernel*4 plan*11",
        {"body": 0.1, "plan": 0.06, "kernel": 0.2, "operation": 0.01},
        **SAVED,
    ),
    Row(
        "passes that are kept bank for the kernel",
        product,
        "3" * 40,
        "plan*4 passes*23 kernel*4 fast*9",
        {"body": 0.03, "plan": 0.05, "kernel": 0.01, "operation": 1e-3},
        **SAVED,
    ),
    Row("the fast path after the trial", product, "3" * 8, f"{TRIAL} fast"),
    # Shapes: one entry each; the fast path is made again after 1, 2, 4, ... misses.
    Row(
        "every shape has a plan",
        product,
        "3" * 6 + "4" * 7 + "3" * 6 + "4",
        "+kernel kernel*4 passes +kernel kernel*4 passes kernel*3 fast*4 kernel",
    ),
    Row(
        "small batches are planned whole",
        sample,
        "s" * 9,
        f"{TRIAL} fast*2",
        options={"batched": True, "compile": True},
    ),
    Row(
        "batches: a kernel of one sample",
        sample,
        "b" * 8,
        "kernel*4 passes kernel fast*2",
        options={"batched": True},
        saved="b",
    ),
    Row(
        "sparse results",
        stencil,
        "9" * 9,
        "+kernel kernel*4 +passes kernel fast*2",
        options={"layout": torch.sparse_csr, "compile": True},
    ),
    Row(
        "Hessians have no fast path",
        scalar,
        "3" * 12,
        "+kernel kernel*4 passes kernel*6",
        make=torchjac.hessian,
    ),
    Row(
        "aux has no fast path",
        with_aux,
        "3" * 12,
        "+kernel kernel*4 passes kernel*6",
        options={"has_aux": True, "compile": True},
    ),
    Row(
        "results with a graph are plans",
        product,
        "3" * 12,
        "+plan plan*4 passes*3 plan*4",
        options={"create_graph": True, "compile": True},
    ),
    # Rejected, and side exits.
    Row("a function that draws", drawing, "3" * 20, "+passes passes*19"),
    Row("a function that branches on values", branching, "3" * 20, "+passes passes*19"),
    Row("not finite at first", product, "n3", "+passes +kernel"),
    Row("not finite later", product, "3" * 8 + "nn33", f"{TRIAL} fast passes*2 fast*2"),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.replace(" ", "-"))
def test_row(row: Row, tmp_path: Path) -> None:
    with ticking(**row.costs) as ticks:
        J = row.make(row.f, **row.options)
        if row.saved:
            J.save(tmp_path / "plan", INPUTS[row.saved])
        assert ran(ticks, J, row.calls) == joined(row.expected)


def rows(x: Tensor) -> Tensor:
    meter.info("body")
    return metered(x).sin() * torch.rand(3, dtype=x.dtype)  # it draws: passes answer for good


def candidates(calls: int) -> str:
    """Which candidate among passes answers each of some calls."""
    J, engines = torchjac.jacobian(rows), []
    for _ in range(calls):
        J(INPUTS["3"])
        record = torchjac.last_run()
        assert record is not None
        assert record.engine == "plain"
        engines.append("loop" if record.chunk == 1 else f"{record.mode}-{record.chunk}")
    return told(engines)


class TestRace:
    """Candidates among passes: the first calls take turns, then the fastest is kept."""

    def test_the_fastest_stays(self) -> None:
        with ticking(backward=1e-4, batched=2e-3):
            assert candidates(25) == "reverse-3*3 loop*22"

    def test_of_equals_the_prediction_decides(self) -> None:
        with ticking(step=1e-3):
            assert candidates(25) == "reverse-3*3 loop*3 reverse-3*19"

    def test_deterministic_algorithms(self) -> None:
        """The best prediction at once: nothing is measured."""
        with ticking(backward=1e-4, batched=2e-3), deterministic():
            assert candidates(25) == "reverse-3*25"


def defect(reason: str) -> pytest.MarkDecorator:
    return pytest.mark.xfail(strict=True, reason=reason, raises=AssertionError)


class TestDefects:
    """What is asserted is what should be."""

    def test_the_fourth_shape_is_planned(self) -> None:
        with ticking(**USUAL) as ticks:
            J = torchjac.jacobian(product, compile=True)
            assert ran(ticks, J, "3456") == "+kernel*4"

    def test_not_finite_at_the_start(self) -> None:
        with ticking(**USUAL) as ticks:
            J = torchjac.jacobian(product, compile=True)
            ran(ticks, J, "nnn")
            assert ran(ticks, J, "3") == "+kernel"

    def test_a_refusal_costs_one_guard_check(self, monkeypatch: pytest.MonkeyPatch) -> None:
        built: list[Any] = []
        build = vars(cache)["build_guard"]

        def counted(*args: Any) -> Any:
            built.append(args)
            return build(*args)

        monkeypatch.setattr(cache, "build_guard", counted)
        with ticking(**USUAL) as ticks:
            J = torchjac.jacobian(drawing, compile=True)
            ran(ticks, J, "33")
            built.clear()
            ran(ticks, J, "3" * 5)
        assert not built

    def test_one_slow_run_parks_nothing(self, tmp_path: Path) -> None:
        with ticking(body=1e-3, plan=0.1, kernel=1.0) as ticks:
            J = torchjac.jacobian(product)
            J.save(tmp_path / "plan", INPUTS["3"])
            assert ran(ticks, J, "3") == "plan"
            ticks.plan = 1e-4
            assert "plan" in history(ticks, J, [INPUTS["3"]] * 20)[10:]

    @defect("a later change removes the wall-clock deadlines")
    def test_planning_does_not_read_the_clock(self) -> None:
        with ticking(**USUAL, trace=100.0) as ticks:
            J = torchjac.jacobian(product, compile=True)
            assert ran(ticks, J, "3") == "+kernel"
