"""Graphs for any number of samples: cases x the law that they give what passes give, for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import torchjac
from accumulating import plan_of
from benchmarks.workloads import build
from laws import oracle_jacobian, same, value
from test_samples import ONE
from torchjac.call import Call
from torchjac.compiler.program.record import recording_of
from torchjac.compiler.program.resize import NotResizable, _fit, resize
from torchjac.export import _for_any_batch

Function = Callable[..., Any]
WORKLOADS = ["arm(joints=3, poses=40)", "chemistry(batch=40)", "bundle(observations=40)"]


def module_of(f: Function, *args: Tensor) -> torch.nn.Module | None:
    plan, _ = plan_of(f, *args, batched=True)
    with torch.no_grad():
        return _for_any_batch(Call(f, 0, False, args, {}), plan)


@pytest.mark.parametrize("name", ONE)
def test_programs(name: str) -> None:
    f = ONE[name]
    resized = module_of(f, value(40, 4))
    assert resized is not None
    for samples in (1, 2, 7, 39, 101):
        x = value(samples, 4, seed=samples)
        want = oracle_jacobian(f, 0, batched=True)(x)
        values = f(x)
        expected = [*(values if isinstance(values, tuple) else [values])]
        expected += [*(want if isinstance(want, tuple) else [want])]
        for got, w in zip(resized(x), expected, strict=True):
            same(got.reshape(w.shape), w)


@pytest.mark.parametrize("spec", WORKLOADS)
def test_workloads(spec: str) -> None:
    w = build(spec)
    x = w.make(0)
    plan, _ = plan_of(w.f, *x, batched=True)
    with torch.no_grad():
        resized = _for_any_batch(Call(w.f, 0, False, x, {}), plan)
    assert resized is not None
    for samples in (1, 12, 33):
        y = tuple(t[:samples] for t in x)
        _, got = resized(*y)
        same(got, oracle_jacobian(w.f, 0, batched=True)(*y))


TABLE = value(40, 4, seed=5)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.sin() * x.shape[0],
        lambda x: x.sin() if len(x) > 20 else x.cos(),
        lambda x: x.sin() if len(x) < 50 else x.cos(),
        lambda x: x.sin() if len(x) > 5 else x.cos(),
        lambda x: x.sin() * TABLE[: len(x)],
        lambda x: x.sin() + (1.0 if len(x) < 20 else 0.0),
        lambda x: x.sin() + x.shape[0] % 2,
        lambda x: x.sin() + len(x) // 20,
        lambda x: x.sin() + (len(x) > 50),
        lambda x: x.sin() * {40: 1.0}[len(x)],
        lambda x: x.sin() * (1 / (len(x) // 40)),
        lambda x: x.sin() * next(iter([2.0] * (len(x) // 40))),
        lambda x: x.sin() + 1 / (len(x) - 11),
    ],
)
def test_what_depends_on_how_many_there_are(f: Function) -> None:
    """It is for one number of samples then; nothing that the function raises gets out."""
    assert module_of(f, value(40, 4)) is None


@pytest.mark.parametrize(
    "f", [lambda x: x.sum(1), lambda x: (x.sin(), x.sum(1)), lambda x: x[:, ::2] + x[:, 1::2]]
)
def test_constant_jacobians(f: Function) -> None:
    resized = module_of(f, value(40, 4))
    assert resized is not None
    for samples in (1, 33):
        x = value(samples, 4, seed=samples)
        want = oracle_jacobian(f, 0, batched=True)(x)
        wanted = want if isinstance(want, tuple) else (want,)
        for got, w in zip(resized(x)[len(wanted) :], wanted, strict=True):
            same(got.reshape(w.shape), w)


def test_failing_with_few_samples_is_no_failure(tmp_path: Path) -> None:
    """Plain C as well: what a function raises with fewer samples is not the user's error."""

    def f(x: Tensor) -> Tensor:
        return x.sin() * {40: 1.0}[len(x)]

    files = torchjac.jacobian(f, batched=True).export(tmp_path / "made", value(40, 4))
    assert [file.suffix for file in files] == [".c", ".h", ".hpp"]


def test_no_batch() -> None:
    plan, _ = plan_of(torch.sin, value(40))
    assert _for_any_batch(Call(torch.sin, 0, False, (value(40),), {}), plan) is None


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (lambda x: x * torch.arange(4).double() if x.shape[0] > 8 else x, "operations"),
        (lambda x: x[: x.shape[0] ** 2 // 4], "is given"),
        (lambda x: x * (1.0 / x.shape[0]), "more samples, not"),
        (lambda x: torch.cat([x] * x.shape[0]), "another length"),
    ],
    ids=["branch", "square", "factor", "list"],
)
def test_recordings_that_differ(f: Function, reason: str) -> None:
    counts = (7, 11, 13)
    recordings = []
    for n in counts:
        x = value(n, 4)

        class Run:
            def __call__(self, argument: Tensor) -> tuple[Tensor]:
                return (f(argument),)

        recordings.append(recording_of(Run(), [x]))  # type: ignore[arg-type]
    with pytest.raises(NotResizable, match=reason):
        resize(recordings, counts)


class TestFit:
    """How constants depend on the number of samples."""

    COUNTS = (7, 11, 13)

    def fit(self, make: Callable[[int], Tensor]) -> Any:
        return _fit([make(n) for n in self.COUNTS], self.COUNTS)

    @pytest.mark.parametrize(
        "make",
        [
            lambda n: torch.arange(5),
            lambda n: torch.arange(3 * n),
            lambda n: torch.arange(3 * n).view(n, 3).T.reshape(-1),
            lambda n: torch.cat([torch.arange(n), torch.arange(n) + 4 * n]),
            lambda n: torch.tensor([1.0, 2.0]).repeat(n),
            lambda n: torch.tensor([1.0, 2.0]).repeat_interleave(n),
            lambda n: torch.ones(2, n, 3),
            lambda n: (torch.arange(n)[:, None] * torch.tensor([5, 0]) + 7 * n).reshape(-1),
        ],
    )
    def test_what_it_finds(self, make: Callable[[int], Tensor]) -> None:
        assert self.fit(make) is not None

    @pytest.mark.parametrize(
        "make",
        [
            lambda n: torch.arange(n) ** 2,
            lambda n: torch.arange(n).double(),
            lambda n: torch.full((n,), n * n),
            lambda n: torch.full((4,), n),
            lambda n: torch.ones(n, n),
            lambda n: torch.ones(n + 1),
            lambda n: torch.arange(n).flip(0) // 2,
        ],
    )
    def test_what_it_does_not(self, make: Callable[[int], Tensor]) -> None:
        assert self.fit(make) is None
