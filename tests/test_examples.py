"""The examples run as a reader runs them: as programs, from a directory of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run_example(name: str, *arguments: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=cwd,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT / "src"),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_demo(tmp_path: Path) -> None:
    printed = run_example("demo.py", "--poses", "8", "--out", "arm.png", cwd=tmp_path)
    assert printed.count("[10.0, 18.0]") == 4
    assert "[0.0, 16.0]" in printed
    assert "vmap(jacfwd(f))" in printed
    picture = (tmp_path / "arm.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 50_000


@pytest.mark.parametrize("missing", ["matplotlib", "rich"])
def test_demo_without_an_extra(missing: str, tmp_path: Path) -> None:
    """A module of that name that cannot be imported stands before the real one."""
    (tmp_path / f"{missing}.py").write_text(
        f"raise ModuleNotFoundError('hidden by the test', name={missing!r})"
    )
    paths = os.pathsep.join([str(ROOT / "src"), str(tmp_path)])
    printed = run_example("demo.py", "--poses", "2", cwd=tmp_path, PYTHONPATH=paths)
    assert ("matplotlib is not installed" in printed) == (missing == "matplotlib")
    assert (tmp_path / "demo.png").exists() == (missing == "rich")


def test_passes(tmp_path: Path) -> None:
    printed = run_example("passes.py", "--seconds", "0.001", cwd=tmp_path)
    assert "| one pass, rows summed | 11 |" in printed
    assert printed.count("| copies of the input |") == 3


def test_arm_is_the_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """At zero angles the flange of the arm is at (0.088, 0, 0.926) m and points down."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import arm

    pose = arm.flange(torch.zeros(7, dtype=torch.float64))
    expected = [0.088, 0, 0.333 + 0.316 + 0.384 - 0.107, 1, 0, 0, 0, -1, 0, 0, 0, -1]
    torch.testing.assert_close(pose, torch.tensor(expected, dtype=torch.float64))


def test_geometric_jacobian_of_the_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Column i of a revolute joint is (axis × lever, axis): geometry, with no derivative in it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import arm
    from torchjac.testing import oracle

    q = arm.sample(1)[0].requires_grad_()
    pose = arm.flange(q)
    J = arm.geometric(pose, oracle(pose, q)).detach()
    origins = torch.stack(arm.chain(q)[0]).detach()
    axes = torch.stack([arm.chain(q.detach()[:k])[1][2] for k in range(1, 8)])
    lever = origins[-1] - origins[1:-1]
    expected = torch.cat([torch.linalg.cross(axes, lever), axes], -1).T
    torch.testing.assert_close(J, expected)


@pytest.mark.slow
def test_cpp(tmp_path: Path) -> None:
    """Exported C, in C and in C++, with the libtorch of the installed wheel."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    printed = run_example("cpp/run.py", str(tmp_path / "made"), cwd=tmp_path)
    assert "us a call" in printed
    assert printed.rstrip().endswith("right")


def test_inverse_kinematics(tmp_path: Path) -> None:
    printed = run_example("inverse_kinematics.py", "--targets", "40", "--steps", "60", cwd=tmp_path)
    assert printed.count("of 40 targets reached") == 3
    assert float(printed.split("differ by ")[1].split()[0]) < 1e-9
