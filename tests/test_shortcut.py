"""The fast path: its predicate sees every change too."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import torchjac
from laws import oracle_jacobian, same, value
from test_accumulate import inside
from test_kernel import cache  # noqa: F401
from torchjac import testing
from torchjac.compiler.codegen.c import cpython_entry as entry
from torchjac.passes.plan import Plan
from torchjac.passes.race import forced_plan

Function = Callable[..., Any]


def product(x: Tensor) -> Tensor:
    return x.sin() * x.sum()


def settled(f: Function, *args: Tensor, **options: Any) -> Any:
    """A Jacobian with a fast path."""
    J = torchjac.jacobian(f, compile=True, **options)
    for _ in range(12):  # the first call compiles; the trial takes seven, the next one installs it
        J(*args)
    assert answers(J, *args)
    return J


def answers(J: Any, *args: Tensor) -> bool:
    """Whether the fast path answers."""
    fast_path = J._dispatcher.fast_path
    return fast_path is not None and fast_path(args) is not None


class TestShortcut:
    def test_closures(self) -> None:
        scale, number = value(3, seed=3), [2.0]

        def f(x: Tensor) -> Tensor:
            return x.sin() * scale * number[0]

        x = value(3)
        J = settled(f, x)
        for change in (lambda: scale.mul_(2), lambda: number.append(number.pop() + 1)):
            change()
            same(J(x), oracle_jacobian(f)(x))

    def test_other_arguments(self) -> None:
        def f(x: Tensor) -> Tensor:
            return x.sin() * x.sum()

        J = settled(f, value(3))
        single = value(4, dtype=torch.float32)
        for x in (value(4), value(2, 2), single, value(3).requires_grad_()):
            same(J(x), oracle_jacobian(f)(x.detach()))
        for x in (value(6)[::2], torch._neg_view(value(3)), inside(value(3))):
            same(J(x), oracle_jacobian(f)(x.clone()))

    def test_not_finite(self) -> None:
        def f(x: Tensor) -> Tensor:
            return x.sqrt()[1:] * 2

        J = settled(f, value(3).abs())
        x = torch.zeros(3, dtype=torch.float64)
        want = oracle_jacobian(f)(x)
        got = J(x)
        assert torch.equal(got.isinf(), want.isinf())

    def test_inside_transforms(self) -> None:
        def f(x: Tensor) -> Tensor:
            return x.sin() * x.sum()

        J = settled(f, value(3))
        x = value(5, 3)
        same(torch.vmap(J)(x), torch.stack([oracle_jacobian(f)(row) for row in x]))
        same(torch.func.jacrev(J)(x[0]), torch.func.jacrev(torch.func.jacrev(f))(x[0]))
        y = value(3).requires_grad_()
        assert not J(y).requires_grad

    def test_two_arguments_in_another_order(self) -> None:
        def f(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            return x * y.sum() + z.sin()

        args = value(3), value(2, seed=1), value(3, seed=2)
        J = settled(f, *args, argnums=(2, 0))
        other = tuple(0.5 * a + 1 for a in args)
        for got, want in zip(J(*other), oracle_jacobian(f, (2, 0))(*other), strict=True):
            same(got, want)

    def test_results_are_ones_own(self) -> None:
        def f(x: Tensor) -> Tensor:
            return torch.cat([2 * x, x * x])

        J = settled(f, value(3))
        one = J(value(3))
        copy = one.clone()
        J(value(3, seed=1)).zero_()
        same(one, copy)

    def test_it_stays_while_other_shapes_are_asked_for(self) -> None:
        J = settled(product, value(3))
        for size in (4, 3, 5, 3, 4):
            same(J(value(size)), oracle_jacobian(product)(value(size)))
        assert answers(J, value(3))

    def test_a_new_fast_path_pays_after_more_calls(self) -> None:
        J = settled(product, value(3))
        for _ in range(12):
            J(value(4))
        assert answers(J, value(4))

    @pytest.mark.parametrize(
        "state",
        [
            testing.check_plans,
            torch.no_grad,
            torch.inference_mode,
            lambda: forced_plan(Plan("reverse", 1)),
            lambda: torch.device("cpu"),
            lambda: torch.autocast("cpu"),
            lambda: torch.autograd.graph.save_on_cpu(),
        ],
        ids=["checks", "no_grad", "inference", "forced", "device", "autocast", "hooks"],
    )
    def test_under_another_state_it_does_not_answer(self, state: Callable[[], Any]) -> None:
        J, want = settled(product, value(3)), oracle_jacobian(product)(value(3))
        with state():
            assert not answers(J, value(3))
            same(J(value(3)), want)
        assert answers(J, value(3))

    def test_settings(self) -> None:
        J = settled(product, value(3))
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float16 if before is torch.float32 else torch.float32)
        try:
            assert not answers(J, value(3))
        finally:
            torch.set_default_dtype(before)
        assert answers(J, value(3))

    @pytest.mark.parametrize("args", [(), (1,), (None,), ([1.0],)], ids=str)
    def test_other_arguments_are_not_for_it(self, args: tuple[Any, ...]) -> None:
        J = settled(product, value(3))
        assert not answers(J, *args)
        with pytest.raises((TypeError, ValueError)):
            J(*args)

    def test_the_record(self) -> None:
        J = settled(product, value(3))
        J(value(3))
        record = torchjac.last_run()
        assert record is not None
        assert "kernel" in str(record)


def test_a_million_calls() -> None:
    """They leave nothing behind."""
    resource = pytest.importorskip("resource", reason="the system does not tell memory this way")

    def used() -> int:
        peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak

    x = value(3)
    J = settled(product, x)
    for _ in range(20_000):
        J(x)
    before = used()
    for _ in range(1_000_000):
        J(x)
    assert used() - before < 8 * 1024  # KiB


class TestEntry:
    @pytest.mark.parametrize("own", [True, False], ids=["CPython", "ctypes"])
    @pytest.mark.parametrize("batched", [False, True], ids=["single", "batched"])
    def test_both_ways_in(self, own: bool, batched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if own and not entry.has_native_calls():
            pytest.skip("this interpreter is entered through ctypes")
        monkeypatch.setattr(entry, "has_native_calls", lambda: own)
        x = value(64, 3) if batched else value(3)

        def f(x: Tensor) -> Tensor:
            return x.sin() * x.sum(-1, keepdim=True)

        J = settled(f, x, batched=batched)
        rows = [oracle_jacobian(f)(row) for row in x] if batched else [oracle_jacobian(f)(x)]
        same(J(x), torch.stack(rows) if batched else rows[0])

    def test_other_threads_run_meanwhile(self) -> None:
        """No thread is made to yield: another one runs only while a call gives the lock up."""
        x = value(20_000, 4)
        J = settled(lambda x: (x.sin() * x.sum(-1, keepdim=True)).exp(), x, batched=True)
        ticks, stop = [0], threading.Event()

        def tick() -> None:
            while not stop.is_set():
                ticks[0] += 1
                time.sleep(0)

        other = threading.Thread(target=tick)
        interval = sys.getswitchinterval()
        other.start()
        try:
            sys.setswitchinterval(3600)
            time.sleep(0.01)
            before = ticks[0]
            for _ in range(2000):  # one call may end before a busy machine wakes the other thread
                J._dispatcher.fast_path((x,))
                if ticks[0] > before:
                    break
            else:
                pytest.fail("no call let another thread run")
        finally:
            sys.setswitchinterval(interval)
            stop.set()
            other.join()
