"""The examples run as a reader runs them: as programs, from a directory of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

import torchjac

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


def number_behind(text: str, printed: str) -> float:
    return float(printed.split(text)[1].split()[0])


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
    assert "package" in printed
    assert printed.split().count("right") == 2


def test_inverse_kinematics(tmp_path: Path) -> None:
    printed = run_example("inverse_kinematics.py", "--targets", "40", "--steps", "60", cwd=tmp_path)
    assert printed.count("of 40 targets reached") == 3
    assert number_behind("differ by ", printed) < 1e-9


def test_bundle_adjustment(tmp_path: Path) -> None:
    """Every loop ends where residuals are what the noise left: one standard deviation in size."""
    printed = run_example("bundle_adjustment.py", "--points", "60", cwd=tmp_path)
    ends = [float(line.split()[-1]) for line in printed.splitlines() if " -> " in line]
    assert len(ends) == 3
    assert all(abs(end - 1) < 0.1 for end in ends)
    assert number_behind("differ by ", printed) < 1e-5


def test_jacobians_of_bundle_adjustment(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of torch, and the step is the one of the whole system, nothing eliminated."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import bundle_adjustment as bundle

    scene = bundle.make(cameras=4, points=9)
    J = torchjac.jacobian(scene.residuals, argnums=(0, 1), layout=scipy.sparse.csr_array)
    dense = torch.func.jacrev(scene.residuals, argnums=(0, 1))(scene.cameras, scene.points)
    for _ in range(3):
        blocks = J(scene.cameras, scene.points)
        for block, expected in zip(blocks, dense, strict=True):
            np.testing.assert_allclose(
                block.toarray(), expected.reshape(block.shape), rtol=1e-10, atol=1e-10
            )
    whole = np.concatenate([block.toarray() for block in blocks], -1)
    r = scene.residuals(scene.cameras, scene.points).flatten().numpy()
    normal = whole.T @ whole
    normal += 0.1 * np.diag(np.diag(normal))
    step = np.concatenate(bundle.solve(*blocks, r, 0.1))
    np.testing.assert_allclose(step, np.linalg.solve(normal, -whole.T @ r), rtol=1e-6)


def test_stiff_chemistry(tmp_path: Path) -> None:
    printed = run_example("stiff_chemistry.py", "--boxes", "2", cwd=tmp_path)
    counts = {line.split()[0]: int(line.split()[2]) for line in printed.splitlines()[1:4]}
    assert counts["torchjac"] == counts["jacrev"] > 20
    assert number_behind("differ by ", printed) < 1e-6
    assert number_behind("ends within ", printed) < 1e-5


@pytest.mark.parametrize("method", ["BDF", "Radau"])
def test_atoms_of_stiff_chemistry(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nitrogen and sulfur only change partners, which an exact Jacobian keeps to rounding."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import stiff_chemistry as chemistry

    slope, starts = chemistry.mechanism(), chemistry.air(2)
    J = torchjac.jacobian(slope)
    ends = chemistry.follow(slope, J, starts, method).ends
    nitrogen = {"NO": 1, "NO2": 1, "NO3": 1, "N2O5": 2, "PAN": 1, "HNO3": 1}
    for atoms in (nitrogen, {"SO2": 1, "SO4": 1}):
        count = np.array([atoms.get(name, 0) for name in chemistry.SPECIES])
        np.testing.assert_allclose(ends @ count, starts @ count, rtol=1e-10)
    for end in map(torch.from_numpy, ends):
        torch.testing.assert_close(J(end), torch.func.jacrev(slope)(end))


def test_brusselator(tmp_path: Path) -> None:
    printed = run_example("brusselator.py", "--size", "10", "--steps", "4", cwd=tmp_path)
    counts = [int(line.split()[2]) for line in printed.splitlines()[1:4]]
    assert len(set(counts)) == 1
    assert counts[0] <= 4 * 6
    assert number_behind("differ by ", printed) < 1e-9
    assert number_behind("off by ", printed) < 1e-13


def test_convergence_of_the_brusselator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the step, half the error; a Jacobian of another function would not converge at all."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import brusselator

    size = 6
    f, state = brusselator.rates(size), brusselator.start(size)
    J = torchjac.jacobian(f, layout=scipy.sparse.csc_array)
    dense = torch.func.jacrev(f)(state).reshape(2 * size**2, -1)
    np.testing.assert_allclose(J(state).toarray(), dense, rtol=1e-12)
    coarse, middle, fine = (
        brusselator.walk(f, J, state, 10 * n, step=0.02 / n).states[-1] for n in (1, 2, 4)
    )
    ratio = float((coarse - middle).norm() / (middle - fine).norm())
    assert 1.7 < ratio < 2.3
