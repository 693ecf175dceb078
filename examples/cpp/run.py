"""Exports a 7-joint arm as C, and a small function as C and as a package; builds the programs
next to this file, runs them, and compares.

Run: python examples/cpp/run.py [folder]   (needs cmake and a C++ compiler)
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import torchjac

HERE = Path(__file__).parent


def chain(joints: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Axes, link rotations and offsets of an arm."""
    generator = torch.Generator().manual_seed(7)
    axes = torch.randn(joints, 3, dtype=torch.float64, generator=generator)
    axes = axes / axes.norm(dim=-1, keepdim=True)
    links = torch.linalg.qr(torch.randn(joints, 3, 3, dtype=torch.float64, generator=generator))[0]
    return axes, links, 0.3 * torch.randn(joints, 3, dtype=torch.float64, generator=generator)


AXES, LINKS, OFFSETS = chain()


def cross(v: Tensor) -> Tensor:
    """The matrix K with `K @ w == cross(v, w)`."""
    zero = torch.zeros_like(v[0])
    x, y, z = v
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero]).view(3, 3)


def arm(q: Tensor) -> Tensor:
    """Position of the tip, then its rotation: 12 numbers."""
    rotation, position = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for i in range(len(AXES)):
        hat = cross(AXES[i])
        turn = torch.eye(3, dtype=torch.float64) + q[i].sin() * hat + (1 - q[i].cos()) * hat @ hat
        rotation = rotation @ LINKS[i] @ turn
        position = position + rotation @ OFFSETS[i]
    return torch.cat([position, rotation.flatten()])


def question(q: Tensor) -> Tensor:
    """The question that torchjac answers."""
    return torch.cat([2 * q, 4 * q * q], -1)


def build(folder: Path) -> None:
    """Exports, configures and compiles."""
    q = torch.zeros(len(AXES), dtype=torch.float64)
    files = torchjac.jacobian(arm).export(folder / "arm", q)
    J, two = torchjac.jacobian(question), torch.zeros(2, dtype=torch.float64)
    files += J.export(folder / "question", two) + J.export(folder / "question.pt2", two)
    print("exported", *[file.name for file in files])
    target = folder / "build"
    settings = [
        f"-DEXPORTED={folder}",
        f"-DTORCHJAC_INCLUDE={Path(torchjac.__file__).parent / 'include'}",
        f"-DTORCH_FOLDER={Path(torch.__file__).parent}",
    ]
    subprocess.run(["cmake", "-S", HERE, "-B", target, *settings], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", target], check=True, capture_output=True)


def main(folder: Path) -> None:
    """Builds and runs; the numbers must be those of Python."""
    build(folder)
    q = torch.linspace(-1, 1, len(AXES), dtype=torch.float64)
    words = [float.hex(x) for x in q.tolist()]
    ran = subprocess.run(
        [folder / "build" / "plain", *words], check=True, capture_output=True, text=True
    )
    numbers = [float.fromhex(line) for line in ran.stdout.split()]
    numbers_of_c = torch.tensor(numbers, dtype=torch.float64)
    value, J = torchjac.jacobian(arm).value_and(q)
    apart = (numbers_of_c - torch.cat([value, J.flatten()])).abs().max()
    print(ran.stderr.strip())
    print(f"largest difference from Python: {float(apart):.1e}")
    assert apart < 1e-14, "C and Python disagree"
    subprocess.run([folder / "build" / "tensors"], check=True)
    subprocess.run([folder / "build" / "packaged", folder / "question.pt2"], check=True)


if __name__ == "__main__":
    if shutil.which("cmake") is None:
        sys.exit("cmake is not installed: pip install cmake")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        main(Path(sys.argv[1]).resolve())
    else:
        with tempfile.TemporaryDirectory() as name:
            main(Path(name))
