"""Calls that go straight to the kernel: whatever changes is seen there too."""

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


def made(f: Function, *args: Tensor, **options: Any) -> Any:
    """A Jacobian that takes the shortcut."""
    J = torchjac.jacobian(f, compile=True, **options)
    for _ in range(12):  # the first call compiles; the trial takes seven, the next one installs it
        J(*args)
    assert taken(J, *args)
    return J


def taken(J: Any, *args: Tensor) -> bool:
    """Whether the shortcut answers."""
    shortcut = J._dispatcher.fast_path
    return shortcut is not None and shortcut(args) is not None


class TestShortcut:
    def test_closures(self) -> None:
        scale, number = value(3, seed=3), [2.0]

        def f(x: Tensor) -> Tensor:
            return x.sin() * scale * number[0]

        x = value(3)
        J = made(f, x)
        for change in (lambda: scale.mul_(2), lambda: number.append(number.pop() + 1)):
            change()
            same(J(x), oracle_jacobian(f)(x))

    def test_other_arguments(self) -> None:
        def f(x: Tensor) -> Tensor:
            return x.sin() * x.sum()

        J = made(f, value(3))
        single = value(4, dtype=torch.float32)
        for x in (value(4), value(2, 2), single, value(3).requires_grad_()):
            same(J(x), oracle_jacobian(f)(x.detach()))
        for x in (value(6)[::2], torch._neg_view(value(3)), inside(value(3))):
            same(J(x), oracle_jacobian(f)(x.clone()))

    def test_not_finite(self) -> None:
        def f(x: Tensor) -> Tensor:
            return x.sqrt()[1:] * 2

        J = made(f, value(3).abs())
        x = torch.zeros(3, dtype=torch.float64)
        want = oracle_jacobian(f)(x)
        got = J(x)
        assert torch.equal(got.isinf(), want.isinf())

    def test_inside_transforms(self) -> None:
        def f(x: Tensor) -> Tensor:
            return x.sin() * x.sum()

        J = made(f, value(3))
        x = value(5, 3)
        same(torch.vmap(J)(x), torch.stack([oracle_jacobian(f)(row) for row in x]))
        same(torch.func.jacrev(J)(x[0]), torch.func.jacrev(torch.func.jacrev(f))(x[0]))
        y = value(3).requires_grad_()
        assert not J(y).requires_grad

    def test_two_arguments_in_another_order(self) -> None:
        def f(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            return x * y.sum() + z.sin()

        args = value(3), value(2, seed=1), value(3, seed=2)
        J = made(f, *args, argnums=(2, 0))
        other = tuple(0.5 * a + 1 for a in args)
        for got, want in zip(J(*other), oracle_jacobian(f, (2, 0))(*other), strict=True):
            same(got, want)

    def test_results_are_ones_own(self) -> None:
        def f(x: Tensor) -> Tensor:
            return torch.cat([2 * x, x * x])

        J = made(f, value(3))
        one = J(value(3))
        kept = one.clone()
        J(value(3, seed=1)).zero_()
        same(one, kept)

    def test_it_stays_while_others_are_asked_for(self) -> None:
        J = made(product, value(3))
        for size in (4, 3, 5, 3, 4):
            same(J(value(size)), oracle_jacobian(product)(value(size)))
        assert taken(J, value(3))

    def test_another_one_is_made_where_that_is_worth_it(self) -> None:
        J = made(product, value(3))
        for _ in range(12):
            J(value(4))
        assert taken(J, value(4))

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
    def test_under_another_state_it_is_not_taken(self, state: Callable[[], Any]) -> None:
        J, want = made(product, value(3)), oracle_jacobian(product)(value(3))
        with state():
            assert not taken(J, value(3))
            same(J(value(3)), want)
        assert taken(J, value(3))

    def test_settings(self) -> None:
        J = made(product, value(3))
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float16 if before is torch.float32 else torch.float32)
        try:
            assert not taken(J, value(3))
        finally:
            torch.set_default_dtype(before)
        assert taken(J, value(3))

    @pytest.mark.parametrize("args", [(), (1,), (None,), ([1.0],)], ids=str)
    def test_other_arguments_are_not_for_it(self, args: tuple[Any, ...]) -> None:
        J = made(product, value(3))
        assert not taken(J, *args)
        with pytest.raises((TypeError, ValueError)):
            J(*args)

    def test_the_record(self) -> None:
        J = made(product, value(3))
        J(value(3))
        record = torchjac.last_run()
        assert record is not None
        assert "kernel" in str(record)


def test_a_million_calls() -> None:
    """They leave nothing behind."""
    resource = pytest.importorskip("resource", reason="the system does not tell memory this way")

    def used() -> int:
        found: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return found

    x = value(3)
    J = made(product, x)
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

        J = made(f, x, batched=batched)
        rows = [oracle_jacobian(f)(row) for row in x] if batched else [oracle_jacobian(f)(x)]
        same(J(x), torch.stack(rows) if batched else rows[0])

    def test_other_threads_run_meanwhile(self) -> None:
        """No thread is made to yield: another one runs only while a call gives the lock up."""
        x = value(20_000, 4)
        J = made(lambda x: (x.sin() * x.sum(-1, keepdim=True)).exp(), x, batched=True)
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
