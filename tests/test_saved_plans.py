"""Plans in files: the same Jacobian in another process, and nothing for another program."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchjac
from laws import same, value
from test_accumulate import PROBLEMS
from torchjac import PlanError
from torchjac.compiler.compiled import Compiled
from torchjac.errors import PlanRefused

WIDE = value(6, 6, seed=3)


def f(x: Tensor) -> Tensor:
    """With a constant from elsewhere, a reduction and a gather."""
    return torch.tanh(WIDE @ x) * x.roll(1) + x.square().mean()


def fresh(
    path: Path, g: Callable[..., Any] = f, *args: Tensor, **options: Any
) -> tuple[Any, torchjac.Record]:
    """The first result of a Jacobian that has loaded a plan, and its record."""
    J = torchjac.jacobian(g, **options).load(path)
    return J(*args), J.explain(*args)


@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_csr, torch.sparse_coo])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_same_jacobian(name: str, layout: torch.layout, tmp_path: Path) -> None:
    """Saved by one object, used by another, at another point."""
    g, shape = PROBLEMS[name]
    x, path = value(*shape), tmp_path / "plan"
    torchjac.jacobian(g, layout=layout).save(path, x)
    got, record = fresh(path, g, x + 0.1, layout=layout)
    want = torchjac.jacobian(g)(x + 0.1)
    same(got if layout is torch.strided else got.to_dense().reshape(want.shape), want)
    assert record.engine == "accumulate"


def test_used_at_once_and_in_another_process(tmp_path: Path) -> None:
    """The first call does not plan."""
    path = tmp_path / "plan"
    torchjac.jacobian(f).save(path, value(6))
    code = (
        "import torch, torchjac, test_saved_plans as t\n"
        f"J = torchjac.jacobian(t.f).load({str(path)!r})\n"
        "x = t.value(6, seed=7)\n"
        "J(x); assert torchjac.last_run().engine == 'accumulate', torchjac.last_run()\n"
        "t.same(J(x), torch.func.jacrev(t.f)(x))\n"
    )
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=here)


def test_batched(tmp_path: Path) -> None:
    """A batch that was proved to be one."""

    def g(x: Tensor) -> Tensor:
        return torch.tanh(x @ WIDE)

    x, path = value(9, 6), tmp_path / "plan"
    torchjac.jacobian(g, batched=True).save(path, x)
    got, record = fresh(path, g, x, batched=True)
    same(got, torch.func.vmap(torch.func.jacrev(g))(x))
    assert record.engine == "accumulate"
    fresh(path, g, x)  # without a batch it is another one
    assert torchjac.last_run().rows == 54


def test_compiled(tmp_path: Path) -> None:
    x, path = value(6), tmp_path / "plan"
    torchjac.jacobian(f).save(path, x)
    got, record = fresh(path, f, x, compile=True)
    same(got, torch.func.jacrev(f)(x))
    assert record.engine == "accumulate"


def test_parameters_are_those_of_now(tmp_path: Path) -> None:
    """What is trained is not in the file."""
    layer = nn.Linear(4, 3, dtype=torch.float64)
    path = tmp_path / "plan"
    x = value(4)
    torchjac.jacobian(layer).save(path, x)
    other = nn.Linear(4, 3, dtype=torch.float64)
    got, record = fresh(path, other, x)
    same(got, other.weight.detach())
    assert record.engine == "accumulate"
    with torch.no_grad():
        other.weight.mul_(2)
    same(fresh(path, other, x)[0], other.weight.detach())


CHANGED: dict[str, Callable[[Tensor], Tensor]] = {
    "a constant": lambda x: torch.tanh((WIDE + 1e-12) @ x) * x.roll(1) + x.square().mean(),
    "a branch not taken here": lambda x: (
        torch.tanh(WIDE @ x.clamp(max=100)) * x.roll(1) + x.square().mean()
    ),
    "a number": lambda x: torch.tanh(WIDE @ x) * x.roll(2) + x.square().mean(),
}


@pytest.mark.parametrize("name", CHANGED)
def test_another_function_has_another_plan(name: str, tmp_path: Path) -> None:
    """Even where its Jacobian is the same at this point."""
    path = tmp_path / "plan"
    torchjac.jacobian(f).save(path, value(6))
    J = torchjac.jacobian(CHANGED[name]).load(path)
    x = value(6, seed=2)
    same(J(x), torch.func.jacrev(CHANGED[name])(x))
    same(J(200 * x), torch.func.jacrev(CHANGED[name])(200 * x))


def test_other_shapes_are_as_if_it_were_not_there(tmp_path: Path) -> None:
    def g(x: Tensor) -> Tensor:
        return x.sin() * x.sum()

    path = tmp_path / "plan"
    torchjac.jacobian(g).save(path, value(6))
    J = torchjac.jacobian(g).load(path)
    for x in (value(5), value(6), value(6).float()):
        same(J(x), torch.func.jacrev(g)(x))


def test_no_plan_to_save(tmp_path: Path) -> None:
    path = tmp_path / "plan"

    def decides(x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x

    with pytest.raises(PlanError, match="depends on the values"):
        torchjac.jacobian(decides).save(path, value(3))
    assert not path.exists()


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes what a file says."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    about = json.loads(arrays["about"].tobytes())
    change(about)
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
    with path.open("wb") as file:
        np.savez(file, **arrays)


class TestDamaged:
    """Files that hold something else."""

    @pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"not a plan", b"\x80\x04K*."])
    def test_not_a_plan(self, data: bytes, tmp_path: Path) -> None:
        path = tmp_path / "plan"
        path.write_bytes(data)
        with pytest.raises(PlanError, match="not a saved plan"):
            torchjac.jacobian(f).load(path)

    def test_cut_off(self, tmp_path: Path) -> None:
        path = tmp_path / "plan"
        torchjac.jacobian(f).save(path, value(6))
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(PlanError):
            torchjac.jacobian(f).load(path)

    def test_any_byte(self, tmp_path: Path) -> None:
        """Whatever readers of archives, arrays and JSON raise is one error."""
        path = tmp_path / "plan"
        torchjac.jacobian(f).save(path, value(6))
        good = path.read_bytes()
        for position in range(0, len(good), max(len(good) // 150, 1)):
            data = bytearray(good)
            data[position] ^= 0x55
            path.write_bytes(bytes(data))
            with contextlib.suppress(PlanError):
                torchjac.jacobian(f).load(path)

    def test_a_pattern_is_not_a_plan(self, tmp_path: Path) -> None:
        path = tmp_path / "pattern.npz"
        torchjac.jacobian(f).pattern(value(6)).save(path)
        with pytest.raises(PlanError, match="torchjac plan"):
            torchjac.jacobian(f).load(path)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            torchjac.jacobian(f).load(tmp_path / "nothing")

    @pytest.mark.parametrize("key", ["format", "version", "torch"])
    def test_other_versions(self, key: str, tmp_path: Path) -> None:
        path = tmp_path / "plan"
        torchjac.jacobian(f).save(path, value(6))
        rewritten(path, lambda about: about.update({key: "other"}))
        with pytest.raises(PlanError, match="other"):
            torchjac.jacobian(f).load(path)

    @pytest.mark.parametrize(
        "change",
        [
            lambda a: a["recording"]["calls"][0].update(operation="from_file.default"),
            lambda a: a["recording"]["calls"][0].update(operation="no_such.default"),
            lambda a: a["recording"]["calls"][0].update(args=[{"value": 10_000}]),
            lambda a: a["recording"]["calls"][0].update(args=["/etc/passwd"]),
            lambda a: a["recording"]["calls"].append(
                {
                    "operation": "zero_.default",
                    "args": [{"value": a["recording"]["inputs"][0]}],
                    "kwargs": {},
                    "results": [],
                    "single": True,
                    "written": [a["recording"]["inputs"][0]],
                }
            ),
            lambda a: a["recording"]["calls"][0].update(operation="_reshape_alias.default"),
            lambda a: a["recording"].update(outputs=[]),
            lambda a: a.update(constants=[]),
            lambda a: a.pop("recording"),
        ],
    )
    def test_nonsense_gives_the_result_all_the_same(self, change: Any, tmp_path: Path) -> None:
        """Passes compute it; the record says what is wrong."""
        path = tmp_path / "plan"
        torchjac.jacobian(f).save(path, value(6))
        rewritten(path, change)
        x = value(6, seed=4)
        before = x.clone()
        J = torchjac.jacobian(f).load(path)
        same(J(x), torch.func.jacrev(f)(x))
        same(x, before)
        assert torchjac.last_run().engine != "accumulate"
        assert any(name == "accumulate" for name, _ in J.explain(x).refusals)

    def test_wrong_numbers_are_noticed(self, tmp_path: Path) -> None:
        """A plan that computes something else is given up, with a report."""
        path = tmp_path / "plan"
        torchjac.jacobian(f).save(path, value(6))
        saved = np.load(path)
        arrays = {name: saved[name].copy() for name in saved.files}
        about = json.loads(arrays["about"].tobytes())
        calls = about["recording"]["calls"]
        product = next(c for c in calls if c["operation"] == "mul.Tensor")
        product["operation"] = "add.Tensor"
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
        with path.open("wb") as file:
            np.savez(file, **arrays)
        x = value(6, seed=4)
        J = torchjac.jacobian(f).load(path)
        same(J(x), torch.func.jacrev(f)(x))
        record = J.explain(x)
        assert record.engine != "accumulate"
        assert record.report is not None
        for part in (torch.__version__, "float64", "tanh", "u'J"):
            assert part in record.report
        assert "issue tracker" in str(record)


class TestCheckedOnDemand:
    """`torchjac.testing.check_plans`."""

    def test_agrees(self) -> None:
        J = torchjac.jacobian(f, compile=True)
        x = value(6)
        with torchjac.testing.check_plans():
            for k in range(3):
                same(J(x + k), torch.func.jacrev(f)(x + k))
                assert torchjac.last_run().engine == "accumulate"

    def test_a_plan_gone_wrong_is_dropped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        J = torchjac.jacobian(f, compile=True)
        x = value(6)
        J(x)
        good = Compiled.parts
        monkeypatch.setattr(
            Compiled, "parts", lambda *arguments: [p + 1e-3 for p in good(*arguments)]
        )
        with torchjac.testing.check_plans():
            same(J(x), torch.func.jacrev(f)(x))
        record = J.explain(x)
        assert record.engine != "accumulate"
        assert record.report is not None
        assert "it does not agree" in str(record)

    def test_a_plan_may_be_refused(self) -> None:
        with torchjac.testing.check_plans(), pytest.raises(PlanRefused):
            raise PlanRefused("the context lets errors through")
