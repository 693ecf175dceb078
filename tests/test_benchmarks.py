"""The benchmark runner: its workloads are what they claim, its tables and orders work."""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import pytest
import torch
from torch.func import jacrev, vmap

from benchmarks import cli, measure, table
from benchmarks.methods import METHODS, matrix
from benchmarks.peers import CASADI_PORTS, JAX_PORTS, PEER_METHODS
from benchmarks.plot import plot
from benchmarks.reference import Reference, reference
from benchmarks.results import Measurement, Row, Run, ratio
from benchmarks.serve import serve
from benchmarks.workloads import FAMILIES, QUICK, REGISTRY, build

SMALL = (
    "forum(inputs=3)",
    "forum(graph=True)",
    "arm(joints=3)",
    "arm(joints=2, poses=3)",
    "mlp(sizes=(2, 5, 3), batch=4)",
    "pinn(points=3, width=4, depth=2)",
    "residuals(7, 2, 3, True)",
    "waist(6, 2, 5)",
    "nbody(bodies=3)",
    "brusselator(n=3)",
    "chemistry(species=5, reactions=6)",
    "chemistry(species=5, reactions=6, batch=2)",
    "finite_volume(nx=2, ny=3)",
    "bundle(observations=3)",
    "bundle_full(cameras=2, points=3, observations=5)",
)


class TestWorkloads:
    @pytest.mark.parametrize("spec", [*SMALL, *REGISTRY])
    def test_has_the_claimed_size(self, spec):
        w = build(spec)
        args = w.make(0)
        out = w.f(*args)
        assert out.numel() == w.m * (w.batch or 1)
        assert sum(args[i].numel() for i in w.positions) == w.n * (w.batch or 1)
        assert torch.isfinite(out).all()
        if w.batched:
            assert all(args[i].shape[0] == w.batch for i in w.positions)

    @pytest.mark.parametrize("spec", [s for s in SMALL if build(s).batched])
    def test_a_batch_is_its_samples(self, spec):
        w = build(spec)
        args = w.make(0)
        one_by_one = torch.stack([w.f(*(x[i] for x in args)) for i in range(w.batch)])
        torch.testing.assert_close(w.f(*args), one_by_one)
        torch.testing.assert_close(vmap(w.f)(*args), one_by_one)

    @pytest.mark.parametrize("spec", SMALL)
    def test_inputs_come_from_the_seed_alone(self, spec):
        w, again = build(spec), build(spec)
        for a, b, other in zip(w.make(1), again.make(1), w.make(2), strict=True):
            assert torch.equal(a, b)
            assert not torch.equal(a, other)

    def test_names_are_the_registry_keys(self):
        for name in REGISTRY:
            assert build(name).name == name

    def test_every_family_is_registered(self):
        assert {call.split("(")[0] for call in REGISTRY.values()} == set(FAMILIES)

    def test_the_shapes_that_users_reported(self):
        reported = {(4, 2), (5, 3), (576, 84), (2000, 321), (10_000, 1001), (12, 30)}
        assert reported <= {(w.m, w.n) for w in map(build, REGISTRY)}

    def test_quick_workloads_are_small(self):
        assert all(build(s).m * build(s).n * (build(s).batch or 1) <= 10_000 for s in QUICK)

    def test_an_unknown_name_lists_the_known(self):
        with pytest.raises(ValueError, match=r"no workload 'nbdy'.*nbody-128"):
            build("nbdy")

    def test_a_call_takes_literals_only(self):
        with pytest.raises(ValueError, match="malformed node"):
            build("nbody(bodies=__import__('os').getpid())")

    def test_ports_name_families(self):
        assert CASADI_PORTS <= JAX_PORTS <= set(FAMILIES)
        assert {build(s).port for s in REGISTRY} - {None} == JAX_PORTS


class TestMethods:
    @pytest.mark.parametrize("spec", SMALL)
    @pytest.mark.parametrize("method", [m for m in METHODS if not m.compiles], ids=lambda m: m.key)
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_gives_the_reference(self, spec, method):
        w = build(spec)
        if not method.applies(w):
            pytest.skip("does not apply")
        args = w.make(0)
        if method.key == "functional-fwd" and w.port == "waist":
            # torch 2.13: forward mode over `vmap` of a vector times a transposed matrix.
            pytest.xfail("Trying to set a forward gradient that has a different size")
        got = matrix(w, method.prepare(w, args)())
        assert reference(w, args).error(got) <= (1e-3 if got.dtype == np.float32 else 1e-9)

    def test_reference_is_the_jacobian(self):
        w = build("brusselator(n=3)")
        (x,) = w.make(0)
        expected = jacrev(w.f)(x).reshape(18, 18)
        torch.testing.assert_close(torch.from_numpy(reference(w, (x,)).values), expected)

    def test_a_sampled_reference_sees_every_row(self, monkeypatch):
        monkeypatch.setattr("benchmarks.reference.LOOP_SECONDS", 0.0)
        monkeypatch.setattr("benchmarks.reference.SAMPLED_ROWS", 2)
        w = build("nbody(bodies=3)")
        (x,) = w.make(0)
        known = reference(w, (x,))
        right = jacrev(w.f)(x).reshape(9, 9).numpy()
        assert len(known.rows) == 2
        assert known.error(right) < 1e-12
        unseen = next(i for i in range(9) if i not in known.rows)
        wrong = right.copy()
        wrong[unseen, 4] += 1
        assert known.error(wrong) > 1e-3

    def test_wrong_shapes_and_nan_are_wrong(self):
        known = Reference(np.arange(2), np.eye(2), np.empty(0), np.empty(0))
        assert known.error(np.eye(3)) == float("inf")
        assert known.error(np.full((2, 2), np.nan)) == float("inf")


class TestTable:
    def test_cells(self):
        base = Measurement("ok", samples=(1e-3, 1e-3), rounds=True)
        slower = Measurement("ok", samples=(2e-3, 4e-3), rounds=True)
        assert table.cell(base, base) == "1.00 ms"
        assert table.cell(slower, base) == "3.00 ms (3x)"
        assert table.cell(Measurement("memory"), base) == "out of memory"
        assert table.cell(Measurement("timeout", detail="> 20 s"), base) == "> 20 s"
        assert table.cell(Measurement("wrong"), base) == "**wrong**"
        assert table.cell(slower, Measurement("timeout", detail="> 20 s")) == "3.00 ms"

    def test_ratios_are_paired_by_round(self):
        base = Measurement("ok", samples=(1.0, 10.0, 1.0), rounds=True)
        other = Measurement("ok", samples=(2.0, 20.0), rounds=True)
        assert ratio(other, base) == 2.0

    def test_a_wrong_result_has_no_ratio(self):
        assert (
            ratio(Measurement("wrong", samples=(1.0,)), Measurement("ok", samples=(1.0,))) is None
        )

    def test_units(self):
        assert [table.duration(s) for s in (12.34, 0.5, 5e-6)] == ["12.3 s", "500 ms", "5.00 µs"]
        assert [table.times(f) for f in (0.051, 3.14, 1234.0)] == ["0.051x", "3.1x", "1234x"]
        assert table.size(2_500_000_000) == "2.5 GB"

    def test_readme_keeps_what_is_outside_the_markers(self, tmp_path):
        readme = tmp_path / "README.md"
        readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
        table.update_readme(readme, fake_run())
        text = readme.read_text()
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "old" not in text
        assert "| toy | 3 x 2 | 1.00 ms | 3.00 ms (3x) | out of memory |" in text

    def test_readme_without_markers_is_refused(self, tmp_path):
        (tmp_path / "README.md").write_text("nothing")
        with pytest.raises(ValueError, match="benchmark:begin"):
            table.update_readme(tmp_path / "README.md", fake_run())

    def test_errors_are_listed(self):
        assert "- toy, JAX jit jacrev: error: boom" in table.markdown(fake_run())

    def test_json_round_trip(self, tmp_path):
        fake_run().save(tmp_path / "run.json")
        assert Run.load(tmp_path / "run.json") == fake_run()

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_plot(self, tmp_path):
        pytest.importorskip("matplotlib")
        assert plot(fake_run(), tmp_path / "run.png")
        assert (tmp_path / "run.png").stat().st_size > 1000


class TestServing:
    def test_a_failure_is_an_answer(self):
        class Script:
            def __init__(self, *orders):
                self.orders, self.replies = list(orders), []

            def recv(self):
                if not self.orders:
                    raise EOFError
                return self.orders.pop(0)

            def send(self, reply):
                self.replies.append(reply)

        class Broken:
            def settled(self):
                return True

            def prepare(self, method):
                raise {"huge": MemoryError(), "bad": RuntimeError("boom\nmore")}[method]

        warm = {"do": "warm", "calls": 1}
        channel = Script({**warm, "method": "huge"}, {**warm, "method": "bad"})
        serve(channel, Broken())
        assert channel.replies == [{"failure": "memory"}, {"failure": "RuntimeError: boom"}]

    def test_sparse_only_methods_skip_dense_workloads(self):
        methods = measure.all_methods()
        assert methods["asdex"].applies(build("brusselator(n=3)"))
        assert not methods["asdex"].applies(build("nbody(bodies=3)"))
        assert not methods["jacrev"].applies(build("forum(graph=True)"))


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def _undo_paths(self, monkeypatch):
        monkeypatch.setattr(sys, "path", sys.path[:])
        monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))

    def test_measures_one_workload(self, tmp_path, capsys):
        args = ["--quick", "--only", "forum(inputs=3)", "--methods", "jacrev", "grad-rows"]
        assert cli.main([*args, "--out", str(tmp_path)]) == 0
        run = json.loads((tmp_path / "benchmark.json").read_text())
        (row,) = run["rows"]
        assert {m["status"] for m in row["measurements"].values()} == {"ok"}
        assert row["measurements"]["jacrev"]["rounds"]
        assert "| forum | 6 x 3 |" in capsys.readouterr().out
        assert (tmp_path / "benchmark.md").exists()

    def test_patterns_and_unknown_names(self):
        assert cli.chosen_workloads(["arm7*"], quick=False) == ["arm7", "arm7-x4096"]
        with pytest.raises(ValueError, match="no workload"):
            cli.chosen_workloads(["nothing"], quick=False)

    def test_methods_without_peers_are_all_torch(self):
        args = cli.parser().parse_args(["--no-compile"])
        keys = {m.key for m in cli.chosen_methods(args)}
        assert "jacrev" in keys
        assert keys.isdisjoint({*PEER_METHODS, "compile", "torchjac-compiled"})

    def test_list(self, capsys):
        assert cli.main(["--list"]) == 0
        assert "brusselator-32" in capsys.readouterr().out


def fake_run() -> Run:
    measurements = {
        "torchjac": Measurement("ok", samples=(1e-3, 1e-3), rounds=True, peak=10**6),
        "jacrev": Measurement("ok", samples=(3e-3, 3e-3), rounds=True, peak=10**7),
        "jacfwd": Measurement("memory", detail="memory"),
        "jax-jacrev": Measurement("error", detail="boom"),
    }
    return Run(
        date="2026-01-01T00:00:00+00:00",
        machine={"cpu": "one", "cpus": 1, "load_at_start": []},
        versions={"python": sys.version.split()[0]},
        options={},
        titles={key: m.title for key, m in measure.all_methods().items() if key in measurements},
        rows=[Row("toy", "toy()", "3 x 2", "nothing", measurements)],
    )
