"""The detection benchmark: its problems are what they claim, its laws see a breach, tables work."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.detection import __main__ as cli
from benchmarks.detection.measure import laws
from benchmarks.detection.problems import QUICK, SMALL, TIMED, Problem, build
from benchmarks.detection.report import Entry, Laws, Report, markdown
from benchmarks.detection.worker import StagesBackend, nonzeros
from benchmarks.peers import JAX_PORTS

SMALLEST = ("heat(n=4)", "convnet(n=5)")


class TestProblems:
    @pytest.mark.parametrize("spec", [*SMALLEST, *(p.spec for p in (*SMALL, *QUICK))])
    def test_has_the_claimed_size(self, spec):
        w = build(spec)
        args = w.make(0)
        out = w.f(*args)
        assert out.numel() == w.m
        assert sum(args[i].numel() for i in w.positions) == w.n
        assert w.batch is None
        assert w.port is not None

    def test_every_port_has_a_small_problem(self):
        assert {build(p.spec).port for p in SMALL} == {*JAX_PORTS, "heat", "convnet"}

    def test_every_target_is_of_a_timed_problem(self):
        targets = [p for p in (*TIMED, *SMALL) if p.faster or p.within]
        assert len(targets) == 5
        assert all(p.timed and (p.peers or not p.faster) for p in targets)

    def test_heat_has_three_diagonals(self):
        w = build("heat(n=4)")
        jacobian = torch.func.jacrev(w.f)(*w.make(0))
        ones = torch.ones(3, dtype=torch.float64)
        expected = torch.diag(ones, 1) + torch.diag(ones, -1) - 2 * torch.eye(4)
        torch.testing.assert_close(jacobian, expected)

    def test_convnet_sees_four_neighbors_on_each_side(self):
        w = build("convnet(n=30)")
        entries = nonzeros(w, 0)
        assert np.abs(entries[0] % 30 - entries[1]).max() == 4

    @pytest.mark.parametrize("spec", ["heat(n=__import__('os').getpid())", "nothing(n=3)", "("])
    def test_a_call_takes_known_families_and_literals(self, spec):
        with pytest.raises(ValueError, match=r"malformed node|no workload"):
            build(spec)


class TestStages:
    @pytest.mark.parametrize(
        "spec", [*SMALLEST, "bundle_full(cameras=2, points=3, observations=4)"]
    )
    def test_stages_agree(self, spec):
        backend = StagesBackend(0)
        whole, detect, numeric = (
            backend.matrix(backend.prepare(f"{stage} {spec}")())
            for stage in ("whole", "detect", "numeric")
        )
        np.testing.assert_array_equal(whole, detect)
        w = build(spec)
        keys = [set((p[0] * w.n + p[1]).tolist()) for p in (whole, numeric)]
        assert keys[0] >= keys[1] > set()

    def test_a_stage_is_prepared_afresh(self):
        backend = StagesBackend(0)
        capture = backend.prepare("capture heat(n=4)")
        assert capture() is not capture()

    def test_numeric_takes_some_rows_of_a_large_jacobian(self):
        rows = np.unique(nonzeros(build("heat(n=3000)"), 0)[0])
        assert len(rows) == 64
        assert np.ptp(rows) > 1000


class TestLaws:
    W = build("heat(n=4)")
    FULL = np.stack(np.nonzero(np.ones((4, 4))))
    EYE = np.stack([np.arange(4), np.arange(4)])

    def test_counts_what_is_lacking(self):
        counts = laws(self.W, self.EYE, self.FULL, self.FULL)
        assert counts == Laws(numeric=16, missed=12, asdex_missed=0, beyond=0)
        assert laws(self.W, self.FULL, self.EYE, self.EYE) == Laws(4, 0, 0, 12)

    def test_without_peers_and_without_numbers(self):
        assert laws(self.W, self.EYE, None, None) == Laws()

    def test_breaches(self):
        good = entry(nnz=5, asdex_nnz=5, laws=Laws(5, 0, 0, 0))
        assert not good.breaches
        assert "lacks 2 nonzeros" in replace(good, laws=Laws(5, 2, 0, 0)).breaches[0]
        assert "6 entries, asdex has 5" in replace(good, nnz=6).breaches[0]
        assert "boom" in replace(good, failure="boom").breaches[0]
        assert not replace(good, nnz=6, asdex_nnz=None).breaches


class TestReport:
    def test_ratios_are_paired_by_round(self):
        timed = entry(samples={"detect": (1.0, 10.0, 1.0), "asdex": (2.0, 20.0, 2.0)})
        assert timed.ratio("detect") == 2.0
        assert timed.ratio("whole") is None
        assert timed.seconds("capture") is None

    def test_targets(self):
        samples = {"detect": (1e-3,), "asdex": (5e-3,)}
        targets = entry(faster=10, within=2e-3, samples=samples).targets
        assert [good for good, _ in targets] == [False, True]
        assert "5x faster than asdex, to reach 10x" in targets[0][1]
        assert not entry(faster=10, within=2e-3).targets

    def test_table(self):
        samples = {k: (1e-3, 1e-3) for k in ("capture", "detect", "whole")}
        timed = entry(
            nnz=10, asdex_nnz=12, samples=samples | {"asdex": (0.02, 0.04)}, peak=5000, faster=10
        )
        text = markdown(report(timed))
        row = "| toy | 3 x 2 | 10 | 12 | 1.00 ms | 1.00 ms | 30.0 ms | 30x | 1.00 ms | 30x |"
        assert row in text
        assert "| 500 |" in text  # bytes per entry
        assert "- reached: toy: 30x faster" in text
        assert "Laws broken" not in text

    def test_table_without_peers(self):
        text = markdown(report(entry(nnz=10, samples={"detect": (1e-3,)})))
        assert "| toy | 3 x 2 | 10 | – | – | 1.00 ms | – | – |" in text
        assert "Targets" not in text

    def test_misses_and_failures_are_listed(self):
        text = markdown(report(entry(laws=Laws(missed=1), asdex_failure="no rule")))
        assert "**Laws broken**\n\n- toy: the pattern lacks 1 nonzeros" in text
        assert "**asdex failed**\n\n- toy: no rule" in text

    def test_json_round_trip(self, tmp_path):
        original = report(entry(samples={"detect": (1.0, 2.0)}, laws=Laws(1, 0, None, 2)))
        original.save(tmp_path / "run.json")
        assert Report.load(tmp_path / "run.json") == original


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def _undo_paths(self, monkeypatch):
        monkeypatch.setattr(sys, "path", sys.path[:])
        monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))

    def test_runs_quick_without_peers(self, tmp_path, capsys):
        args = ["--quick", "--only", "heat(n=5)", "--rounds", "1", "--out", str(tmp_path)]
        assert cli.main(args) == 0
        (heat,) = Report.load(tmp_path / "detection.json").entries
        assert (heat.nnz, heat.laws) == (13, Laws(numeric=13, missed=0))
        assert {k: len(v) for k, v in heat.samples.items()} == dict.fromkeys(
            ("capture", "detect", "whole"), 1
        )
        assert "| heat-5 | 5 x 5 | 13 |" in capsys.readouterr().out
        assert (tmp_path / "detection.md").read_text().startswith("# Sparsity detection")

    def test_a_broken_law_is_the_exit_status(self, tmp_path, capsys):
        report(entry(laws=Laws(missed=1))).save(tmp_path / "run.json")
        assert cli.main(["--render", str(tmp_path / "run.json"), "--out", str(tmp_path)]) == 1
        assert "toy: the pattern lacks 1 nonzeros" in capsys.readouterr().err

    def test_groups(self):
        groups = cli.chosen(None, quick=False)
        assert [g[0] for g in groups[:-1]] == list(TIMED)  # each in processes of its own
        assert groups[-1] == list(SMALL)
        assert cli.chosen(None, quick=True) == [list(QUICK)]
        assert cli.chosen(["heat(n=7)"], quick=False) == [[Problem("heat(n=7)")]]
        assert [[p.spec for p in g] for g in cli.chosen(["convnet*"], quick=False)] == [
            ["convnet(n=200)"],
            ["convnet(n=2000)"],
            ["convnet(n=11)"],
        ]
        with pytest.raises(ValueError, match="no workload"):
            cli.chosen(["nothing"], quick=False)


def entry(**changes) -> Entry:
    return replace(Entry("toy", "toy()", 3, 2), **changes)


def report(*entries: Entry) -> Report:
    machine = {"cpu": "one", "cpus": 1, "load_at_start": []}
    return Report("2026-01-01T00:00:00+00:00", machine, {"python": "3"}, {}, list(entries))
