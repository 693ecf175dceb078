"""Kernels in several threads give the same to the last bit, and only where that is faster."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from accumulating import plan_of, run
from benchmarks.workloads import build
from laws import oracle_jacobian, same, value
from test_accumulate import PROBLEMS
from test_kernel import fresh, kernel_of, script  # noqa: F401
from torchjac.compiler.codegen import schedule
from torchjac.compiler.codegen.executable import Executable, Threads
from torchjac.compiler.native import with_kernel
from torchjac.errors import PlanRefused
from torchjac.host import costs

MESHES = ["finite_volume(19, 17)", "bundle_full(3, 17, 120)", "nbody(19)", "brusselator(16)"]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads are worth it from the first element on."""
    monkeypatch.setattr(schedule, "_PARALLEL_VALUES", 1)
    monkeypatch.setattr(costs, "_THREAD", 1e-12)


def parts(f: Callable[..., Any], *args: Tensor, layout: torch.layout = torch.strided) -> Executable:
    """A kernel whose loops are divided."""
    plan, _ = plan_of(f, *args, layout=layout)
    kernel = with_kernel(plan.programs, args, None).kernel
    assert isinstance(kernel, Executable)
    return kernel


class TestResults:
    @pytest.mark.parametrize("layout", [torch.strided, torch.sparse_csr], ids=["dense", "csr"])
    @pytest.mark.parametrize("name", MESHES)
    @pytest.mark.parametrize("count", [2, 5])
    def test_meshes(
        self,
        always: None,
        monkeypatch: pytest.MonkeyPatch,
        name: str,
        layout: torch.layout,
        count: int,
    ) -> None:
        w = build(name)
        x = w.make(0)
        kernel = parts(w.f, *x, layout=layout)
        assert kernel.source.text.count("TORCHJAC_WAIT") > 0
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        want, _ = kernel.run(x)
        seen: list[int] = []
        monkeypatch.setattr(kernel, "_threads", lambda go: go(seen.append(count) or count))
        for _ in range(8):  # threads meet in other ways each time
            got, fine = kernel.run(x)
            assert fine
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a, b)
        assert seen == [count] * 8

    @pytest.mark.parametrize("name", PROBLEMS)
    def test_problems(self, always: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        f, shape = PROBLEMS[name]
        x = value(*shape)
        try:
            plan = kernel_of(plan_of(f, x)[0], f, x)
        except PlanRefused as refusal:
            pytest.skip(f"no kernel: {refusal}")
        kernel = plan.program.kernel
        assert isinstance(kernel, Executable)
        if kernel._threads is not None:
            monkeypatch.setattr(kernel, "_threads", lambda go: go(3))
        same(run(plan, f, x), oracle_jacobian(f, 0)(x))
        y = x.clone()
        y.view(-1)[0] = float("nan")
        assert run(plan, f, y) is None or bool(oracle_jacobian(f, 0)(y).isfinite().all())

    def test_small_programs_have_no_threads(self) -> None:
        assert parts(torch.sin, value(5))._threads is None

    def test_calls_at_once(self, always: None, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each has memory of its own to work in."""
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        w = build("finite_volume(19, 17)")
        inputs = [w.make(seed) for seed in range(6)]
        kernel = parts(w.f, *inputs[0], layout=torch.sparse_csr)
        want = [kernel.run(x)[0] for x in inputs]
        wrong: list[int] = []

        def work(k: int) -> None:
            for _ in range(50):
                got, _ = kernel.run(inputs[k])
                if not all(map(torch.equal, got, want[k])):
                    wrong.append(k)

        every = [threading.Thread(target=work, args=(k,)) for k in range(6)]
        for t in every:
            t.start()
        for t in every:
            t.join()
        assert not wrong


class TestChoice:
    @pytest.fixture(autouse=True)
    def many(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(costs, "_THREAD", 1e-12)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 5)

    def test_one_first_then_as_many_as_torch_has(self) -> None:
        seen: list[int] = []
        choice = Threads(100)
        for _ in range(4):
            assert choice(lambda n: not seen.append(n))  # type: ignore[func-returns-value]
        assert seen == [1, 1, 1, 5]

    def test_no_more_than_there_are_turns(self) -> None:
        seen: list[int] = []
        choice = Threads(2)
        for _ in range(4):
            choice(lambda n: not seen.append(n))  # type: ignore[func-returns-value]
        assert seen[-1] == 2

    def test_what_it_says(self) -> None:
        choice = Threads(100)
        assert [choice(lambda _: False) for _ in range(6)] == [False] * 6

    def test_errors_are_not_lost(self) -> None:
        choice = Threads(100)

        def fails(_: int) -> bool:
            raise ValueError("no")

        for _ in range(6):
            with pytest.raises(ValueError, match="no"):
                choice(fails)

    def test_back_to_one_where_that_is_faster(self) -> None:
        """As beside another program that keeps the other cores busy."""
        seen: list[int] = []

        def work(n: int) -> bool:
            seen.append(n)
            if n > 1:
                time.sleep(0.02)
            return True

        choice = Threads(100)
        for _ in range(120):
            assert choice(work)
        assert seen[:9] == [1] * 3 + [5] * 5 + [1]
        rests = "".join(map(str, seen)).split("5" * 5)
        assert [len(r) for r in rests[1:3]] == [25, 50]  # tried again, more and more seldom


def test_little_work_is_for_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "_THREAD", 10.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    seen: list[int] = []
    choice = Threads(100)
    for _ in range(9):
        choice(lambda n: not seen.append(n))  # type: ignore[func-returns-value]
    assert seen == [1] * 9


def _in_child(kernel: Executable, x: tuple[Tensor, ...], want: Tensor) -> None:
    used: list[int] = []
    run = kernel._run

    def counted(*arguments: int) -> bool:
        used.append(arguments[-1])
        return run(*arguments)

    kernel._run = counted

    def work() -> None:
        for _ in range(6):
            (got,), _ = kernel.run(x)
            assert torch.equal(got, want)

    work()
    assert used == [1] * 6
    other = threading.Thread(target=work)
    other.start()
    other.join()
    assert used[6] == 3


def test_after_a_fork(always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads do not survive it: the child runs in one, unless it begins another one."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    w = build("finite_volume(19, 17)")
    x = w.make(0)
    kernel = parts(w.f, *x, layout=torch.sparse_csr)
    for _ in range(6):
        (want,), _ = kernel.run(x)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_in_child, args=(kernel, x, want))
    child.start()
    child.join(30)
    assert child.exitcode == 0


def test_a_compiler_without_openmp(
    fresh: Path,  # noqa: F811
    always: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One thread runs it."""
    text = 'case "$*" in *"-fopenmp "*) exit 3;; esac; exec cc "$@"'
    monkeypatch.setenv("CC", script(fresh / "mycc", text))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    w = build("nbody(19)")
    x = w.make(0)
    kernel = parts(w.f, *x)
    want = oracle_jacobian(w.f, 0)(*x)
    for _ in range(6):
        (got,), _ = kernel.run(x)
        same(got.view_as(want), want)
