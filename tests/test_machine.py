"""Costs of this machine, and the directory that they are kept in."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import torchjac
from accumulating import plan_of
from laws import oracle_jacobian, same, value
from torchjac.host import cache_dir as disk
from torchjac.host import costs as machines
from torchjac.host.costs import (
    DEFAULT,
    CostModel,
    PassWork,
    ProgramWork,
    ScalarWork,
    calibrated,
    cost_model,
    measured,
    scalar_products,
    scalar_seconds,
)
from torchjac.jit.entry import Entry


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory, and a process that knows nothing yet."""
    monkeypatch.setenv("TORCHJAC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(machines, "_known", {})
    return tmp_path / "cache"


class TestCostModel:
    def test_measured_once_and_stored(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = calibrated()
        (file,) = cache.iterdir()
        assert json.loads(file.read_text())["operation"] == first.operation
        machines._known.clear()
        monkeypatch.setattr(machines, "measured", lambda: pytest.fail("measured again"))
        assert calibrated() == cost_model() == first

    def test_numbers_make_sense(self) -> None:
        costs = measured()
        assert 1e-8 < costs.operation < 1e-2
        assert 1e7 < costs.memory < 1e13
        assert 1e7 < costs.product < 1e15

    def test_the_default_without_measuring(self, cache: Path) -> None:
        assert cost_model() is DEFAULT
        assert not cache.exists() or not list(cache.iterdir())

    def test_deterministic(self, cache: Path) -> None:
        calibrated()
        torch.use_deterministic_algorithms(True)
        try:
            assert cost_model() is calibrated() is DEFAULT
        finally:
            torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "{}",
            '{"version": 0, "operation": 1}',
            json.dumps({"version": 1, **asdict(DEFAULT), "operation": -1}),
            json.dumps({"version": 1, **asdict(DEFAULT), "memory": "NaN"}),
            json.dumps({"version": 1, **asdict(DEFAULT), "more": 1}),
        ],
    )
    def test_files_that_make_no_sense(self, text: str, cache: Path) -> None:
        calibrated()
        (file,) = cache.iterdir()
        file.write_text(text)
        machines._known.clear()
        assert cost_model() is DEFAULT
        assert calibrated() is not DEFAULT

    def test_more_work_takes_longer(self) -> None:
        costs = CostModel()
        less = ProgramWork(operations=3, products=10**6, near=10**5, far=10**7)
        assert 0 < costs.seconds(less) < costs.seconds(less + less)

    def test_passes_take_as_long_as_operations(self) -> None:
        """On a machine where operations take twice as long, all passes do."""
        work = PassWork("reverse", 30, 10, operations=100, traffic=10**6, largest=10**5, looped=0)
        slow = CostModel(operation=2 * DEFAULT.operation)
        assert slow.pass_seconds(work) == pytest.approx(2 * DEFAULT.pass_seconds(work))
        looped = replace(work, looped=30)
        assert DEFAULT.pass_seconds(work) < DEFAULT.pass_seconds(looped)

    def test_native_code_runs_for_all_samples(self) -> None:
        work = ScalarWork(7000, table_bytes=100, samples=(7, 70))
        assert scalar_seconds(work) == pytest.approx(10 * scalar_seconds(ScalarWork(7000, 100)))
        assert work.sample_products == 1000 < scalar_products(work)
        assert scalar_seconds(replace(work, tile_bytes=8)) < scalar_seconds(work)

    def test_multiplications_are_counted(self) -> None:
        """Of a product of matrices that is known."""
        a = value(20, 30)
        J = torchjac.jacobian(lambda x: torch.tanh(a @ x), compile=True)
        x = value(30, 7)
        J(x)
        record = J.explain(x)
        assert record.engine == "accumulate"
        assert record.counts is not None
        assert record.counts.multiplications >= 20 * 30 * 7
        assert "multiplications" in str(record)


class TestDisk:
    def test_bytes_come_back(self, cache: Path) -> None:
        assert disk.read("a") is None
        assert disk.write("a", b"one")
        assert disk.write("a", b"two")
        assert disk.read("a") == b"two"
        assert [f.name for f in cache.iterdir()] == ["a"]
        assert cache.stat().st_mode & 0o077 == 0

    def test_nothing_is_stored_where_that_is_asked_for(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCHJAC_CACHE_DIR", "")
        assert disk.directory() is None
        assert not disk.write("a", b"one")
        assert disk.read("a") is None

    def test_where_it_is(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TORCHJAC_CACHE_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert disk.directory() == tmp_path / "torchjac"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert disk.directory() == tmp_path / "home" / ".cache" / "torchjac"

    def test_a_directory_that_anybody_can_write_to(self, cache: Path) -> None:
        disk.write("a", b"one")
        cache.chmod(0o777)
        assert disk.read("a") is None
        assert not disk.write("a", b"two")

    def test_a_file_that_anybody_can_write_to(self, cache: Path) -> None:
        disk.write("a", b"one")
        (cache / "a").chmod(0o666)
        assert disk.read("a") is None

    def test_a_file_in_its_place(self, cache: Path) -> None:
        cache.write_text("in the way")
        assert disk.directory() is None
        assert not disk.write("a", b"one")

    def test_many_processes_at_once(self, cache: Path) -> None:
        """Whoever reads gets all of somebody's bytes."""
        context = multiprocessing.get_context("fork")
        writers = [context.Process(target=_write, args=(k,)) for k in range(8)]
        for process in writers:
            process.start()
        for process in writers:
            process.join()
            assert process.exitcode == 0
        data = disk.read("shared")
        assert data is not None
        assert len(data) == 100_000
        assert len(set(data)) == 1
        assert [f.name for f in cache.iterdir()] == ["shared"]


def _write(k: int) -> None:
    for _ in range(20):
        assert disk.write("shared", bytes([k]) * 100_000)
        data = disk.read("shared")
        assert data is not None
        assert len(set(data)) == 1
    os._exit(0)


def test_both_orders_are_measured() -> None:
    """The record says what was predicted and measured, and what there are to tell of it."""

    def f(x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(torch.tanh(WIDE @ x) @ WIDE)
        return torch.sin(WIDE[:, :300].T @ (WIDE @ hidden))

    x = value(1000)
    plan, first = plan_of(f, x)
    same(first, torch.func.jacrev(f)(x))
    record = Entry.of(plan, False).record(plan, "jacobian", 1e-3)
    assert {c.name for c in record.candidates} == {
        "accumulate reverse",
        "accumulate forward",
        "passes",
    }
    assert record.counts is not None
    assert record.counts.waists
    assert "5 at aten" in record.counts.waists[0]
    assert "waist" in str(record)


WIDE = value(5, 1000) / 30


def test_blame_and_constants() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([2 * x, x.sin(), x * x.sum()])

    x = value(30)
    J = torchjac.jacobian(f, layout=torch.sparse_csr, compile=True)
    J(x)
    counts = J.explain(x).counts
    assert counts is not None
    assert 0 < counts.constant < 1
    assert any("rows" in line for line in counts.blame)
    assert "dense by" in str(J.explain(x))


def test_refusals_name_the_operation() -> None:
    """And the line of the user's, where something fills in."""
    x = value(3)
    J = torchjac.jacobian(lambda x: torch.matrix_exp(x.outer(x)), compile=True)
    J(x)
    refused = dict(J.explain(x).refusals)
    assert "at aten." in refused["accumulate"]


@pytest.mark.parametrize("seed", range(12))
def test_chains_are_multiplied_in_the_best_order(seed: int) -> None:
    """Against the matrix chain of the same sizes; a product more costs its operations too."""
    random = torch.Generator().manual_seed(seed)
    choice = torch.tensor([3, 20, 100, 300])
    count = int(torch.randint(3, 7, (1,), generator=random))
    sizes = choice[torch.randint(4, (count,), generator=random)].tolist()
    weights = [value(b, a, seed=seed) / a for a, b in itertools.pairwise(sizes)]

    def f(x: torch.Tensor) -> torch.Tensor:
        for weight in weights:
            x = torch.tanh(weight @ x)
        return x

    plan, first = plan_of(f, value(sizes[0]), orders=("reverse",))
    same(first, oracle_jacobian(f)(value(sizes[0])))
    assert plan.program.work.products <= 1.01 * chain(sizes) + count * 60_000


def chain(sizes: list[int]) -> int:
    """The fewest multiplications that the product of matrices of these sizes takes."""
    count = len(sizes) - 1
    best = {(i, i): 0 for i in range(count)}
    for span in range(1, count):
        for i in range(count - span):
            j = i + span
            best[i, j] = min(
                best[i, k] + best[k + 1, j] + sizes[i] * sizes[k + 1] * sizes[j + 1]
                for k in range(i, j)
            )
    return best[0, count - 1]
