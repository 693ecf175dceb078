"""Which entry answers a call: guards that fail, refusals that are kept, states around the call.

The notation is that of `test_transitions`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import torchjac
from laws import oracle_jacobian, same, value
from ticking import (
    INPUTS,
    TRIAL,
    USUAL,
    answered,
    branching,
    deterministic,
    drawing,
    joined,
    meter,
    product,
    ran,
    ticking,
)
from torchjac import testing
from torchjac.errors import Disagrees
from torchjac.passes.plan import Plan
from torchjac.passes.race import forced_plan
from torchjac.passes.verify import Reference


class TestEntries:
    """What is read may change: each state has an entry, and is found again."""

    def test_a_closure(self) -> None:
        c = 2.0

        def f(x: Tensor) -> Tensor:
            meter.info("body")
            return x.sin() * x.sum() * c

        with ticking(**USUAL) as ticks:
            J = torchjac.jacobian(f, compile=True)
            assert ran(ticks, J, "3" * 9) == joined(f"{TRIAL} fast*2")
            c = 3.0
            assert ran(ticks, J, "3" * 9) == joined(f"{TRIAL} kernel fast")
            same(J(INPUTS["3"]), oracle_jacobian(f)(INPUTS["3"]))
            c = 2.0
            assert ran(ticks, J, "3" * 5) == "kernel*4 fast", "found again, not made again"
            same(J(INPUTS["3"]), oracle_jacobian(f)(INPUTS["3"]))

    def test_a_tensor_written_to_in_place_misses_its_entry(self) -> None:
        w = value(3)

        def f(x: Tensor) -> Tensor:
            meter.info("body")
            return x.sin() * x.sum() * w

        with ticking(**USUAL) as ticks:
            J = torchjac.jacobian(f, compile=True)
            assert ran(ticks, J, "3" * 8) == joined(f"{TRIAL} fast")
            w.mul_(2)
            assert ran(ticks, J, "3") == "+kernel"
            same(J(INPUTS["3"]), oracle_jacobian(f)(INPUTS["3"]))

    def test_a_function_that_changes_what_it_reads(self) -> None:
        count = [0]

        def f(x: Tensor) -> Tensor:
            meter.info("body")
            count[0] += 1
            return x.sin() * x.sum()

        with ticking(**USUAL) as ticks:
            J = torchjac.jacobian(f, compile=True)
            assert ran(ticks, J, "3" * 9) == "+passes*3 passes*6", "tried three times"
            reasons = dict(J.explain(INPUTS["3"]).refusals)
        assert "changes what it reads" in reasons["accumulate"]

    def test_a_plan_that_is_loaded(self, tmp_path: Path) -> None:
        with ticking(**USUAL) as ticks:
            torchjac.jacobian(product).save(tmp_path / "plan", INPUTS["3"])
            J = torchjac.jacobian(product).load(tmp_path / "plan")
            assert ran(ticks, J, "3" * 7) == "+plan plan*4 passes*2"
            assert ran(ticks, J, "44") == "+plan plan", "others need no warming up either"


class TestRejected:
    """A refusal holds as long as its guard, and says why."""

    @pytest.mark.parametrize(
        ("f", "why"), [(drawing, "draws random numbers"), (branching, "depends on the values")]
    )
    def test_the_reason_stays(self, f: Callable[..., Any], why: str) -> None:
        with ticking(**USUAL) as ticks:
            J = torchjac.jacobian(f, compile=True)
            assert ran(ticks, J, "3" * 5) == "+passes passes*4"
            for _ in range(2):
                assert why in dict(J.explain(INPUTS["3"]).refusals)["accumulate"]

    def test_it_hits_again(self) -> None:
        draws = True

        def f(x: Tensor) -> Tensor:
            meter.info("body")
            return x.sin() * torch.rand(3, dtype=x.dtype) if draws else x.sin() * x.sum()

        with ticking(**USUAL) as ticks:
            J = torchjac.jacobian(f, compile=True)
            assert ran(ticks, J, "33") == "+passes passes"
            draws = False
            assert ran(ticks, J, "33") == "+kernel kernel"
            draws = True
            assert ran(ticks, J, "33") == "passes*2"

    def test_a_plan_that_disagrees_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        disagree(monkeypatch)
        with ticking(**USUAL) as ticks:
            J = torchjac.jacobian(product, compile=True)
            assert ran(ticks, J, "3" * 9) == "+passes passes*8"
            told_why(J)
            monkeypatch.undo()
            assert ran(ticks, J, "34") == "passes +kernel", "it says nothing of other shapes"

    def test_a_plan_that_disagrees_later(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with ticking(**USUAL) as ticks:
            J = torchjac.jacobian(product, compile=True)
            assert ran(ticks, J, "3" * 8) == joined(f"{TRIAL} fast")
            disagree(monkeypatch)
            with testing.check_plans():
                assert ran(ticks, J, "3") == "passes"
            told_why(J)
            monkeypatch.undo()
            assert ran(ticks, J, "34" * 4) == "passes*8", "nothing of this function is trusted"


def disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every comparison with passes fails."""

    def check(*_: object) -> None:
        raise Disagrees("it does not agree with a pass of autograd")

    monkeypatch.setattr(Reference, "check", check)


def told_why(J: Any) -> None:
    """The record holds the refusal, and a report for the issue tracker."""
    record = J.explain(INPUTS["3"])
    assert record.engine == "plain"
    assert "does not agree" in dict(record.refusals)["accumulate"]
    assert record.report is not None


class TestStates:
    """States of torch around a call: some have entries of their own, in some passes answer."""

    @pytest.mark.parametrize(
        ("state", "tier"),
        [
            (torch.no_grad, "+kernel"),
            (torch.inference_mode, "+kernel"),
            (lambda: torch.autocast("cpu"), "passes"),
            (lambda: forced_plan(Plan("reverse", 1)), "passes"),
            (testing.check_plans, "kernel"),
        ],
        ids=["no_grad", "inference", "autocast", "forced", "checked"],
    )
    def test_states(self, state: Callable[[], AbstractContextManager[Any]], tier: str) -> None:
        with ticking(**USUAL) as ticks:
            J = torchjac.jacobian(product, compile=True)
            assert ran(ticks, J, "3" * 8) == joined(f"{TRIAL} fast")
            with state():
                assert ran(ticks, J, "3") == tier
            assert ran(ticks, J, "3") == "fast", "the state leaves nothing behind"

    def test_deterministic_algorithms(self, tmp_path: Path) -> None:
        """Kernels only where they are asked for: results change by rounding."""
        with ticking(**USUAL) as ticks, deterministic():
            J = torchjac.jacobian(product, compile=True)
            assert ran(ticks, J, "3" * 8) == joined(f"{TRIAL} fast")
            J = torchjac.jacobian(product)
            J.save(tmp_path / "plan", INPUTS["3"])
            assert ran(ticks, J, "3" * 20) == "plan*4 passes*3 plan*13"

    def test_a_transform(self) -> None:
        with ticking(**USUAL) as ticks:
            J = torchjac.jacobian(product, compile=True)
            assert answered(ticks, torch.vmap(J), value(5, 3)) == "torch.func"
            assert ran(ticks, J, "3" * 8) == joined(f"{TRIAL} fast")
            assert answered(ticks, torch.vmap(J), value(5, 3)) == "torch.func"
            assert ran(ticks, J, "3") == "fast"

    def test_nested(self) -> None:
        """The outer Jacobian is planned as a whole; the inner one is not called any more."""
        with ticking(**USUAL) as ticks:
            inner = torchjac.jacobian(product, compile=True)

            def f(x: Tensor) -> Tensor:
                jacobian: Tensor = inner(x)
                return jacobian.sum(0)

            J = torchjac.jacobian(f, compile=True)
            assert ran(ticks, J, "3" * 9) == joined(f"{TRIAL} fast*2")
            assert ran(ticks, inner, "3") == "+kernel", "what the outer one did left nothing"

    def test_values_and_jacobian(self) -> None:
        """The same entry; f runs for its value, and there is no fast path."""
        with ticking(**USUAL) as ticks:
            J = torchjac.jacobian(product, compile=True)
            assert ran(ticks, J.value_and, "3" * 9) == joined(f"{TRIAL} kernel*2")
            assert ticks.runs["body"] == 1
            assert ran(ticks, J, "3") == "fast"
            assert ticks.runs["body"] == 0
            assert ran(ticks, J.value_and, "3") == "kernel"
