"""Tries torchjac on another Python or another torch, in an environment of its own.

    python tools/try_version.py                                  the newest torch, on this Python
    python tools/try_version.py --python newest                  the newest torch, the newest Python
    python tools/try_version.py --python oldest --torch oldest   the oldest of both

It installs torchjac as its users do (`pip install .`), runs the first screen of the README, and a
part of the tests that takes some minutes. If that Python or torch is unavailable, the script says
so and ends with 0. It needs only the standard library.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEWEST_MINOR = 16  # newest minor version of Python 3 to search for
# Contracts; the README's snippets; one file or more for each stage; a tenth of OpInfo.
TESTS = (
    *("test_torch_contracts.py", "test_tracing_contracts.py", "test_native.py", "test_degraded.py"),
    *("test_host.py", "test_docs.py"),
    *("test_capture.py", "test_capture_cache.py", "test_guards.py", "test_guard_detours.py"),
    *("test_pattern.py", "test_race.py", "test_batched.py", "test_hessian.py", "test_sparse.py"),
    *("test_accumulate_graph.py", "test_strips.py", "test_shortcut.py", "test_saved_plans.py"),
    *("test_opinfo.py", "test_patterns_opinfo.py", "test_kernel_opinfo.py"),
    "test_accumulate.py::test_operations",
)
SHARE = 10  # one of so many OpInfo tests runs


class Unavailable(Exception):
    """A Python or a torch is not available on this machine."""


def main() -> int:
    """Tries one combination; 0 if tests pass or it is unavailable, else pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--python", default=sys.executable, help="a command, `newest` or `oldest`")
    parser.add_argument("--torch", default="newest", help="a version, `newest` or `oldest`")
    parser.add_argument("--keep", action="store_true", help="keep the environment for another run")
    asked = parser.parse_args()
    try:
        python = find_python(asked.python)
        with Environment(python, asked.torch, asked.keep) as folder:
            return tried(folder)
    except Unavailable as reason:
        print(f"skipped: {reason}", flush=True)
        return 0


def lower_bound(of: str) -> str:
    """The oldest version that pyproject.toml allows, of `torch` or `python`."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pattern = r'requires-python = ">=([\d.]+)"' if of == "python" else r'"torch>=([\d.]+)"'
    (version_text,) = re.findall(pattern, text)
    return str(version_text)


def find_python(asked: str) -> str:
    """The command of an interpreter.

    Raises:
        Unavailable: No interpreter of that name or version runs.
    """
    if asked not in ("newest", "oldest"):
        command = shutil.which(asked)
        if command is None or version(command) is None:
            raise Unavailable(f"there is no {asked} here")
        return command
    oldest = int(lower_bound("python").split(".")[1])
    minors = range(oldest, NEWEST_MINOR + 1)
    for minor in minors if asked == "oldest" else reversed(minors):
        for command in candidates(minor):
            if version(command) == f"3.{minor}":
                return command
    raise Unavailable("there is no python3 here")


def candidates(minor: int) -> list[str]:
    """Commands of an interpreter: on the path, and among the versions of pyenv."""
    name = f"python3.{minor}"
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    managed = sorted(versions.glob(f"3.{minor}.*/bin/{name}"), key=_patch, reverse=True)
    return [*filter(None, [shutil.which(name)]), *map(str, managed)]


def _patch(path: Path) -> int:
    """The 10 of `.../3.13.10/bin/python3.13`."""
    digits = re.match(r"\d+", path.parts[-3].rsplit(".", 1)[-1])
    return int(digits[0]) if digits else -1


def version(command: str) -> str | None:
    """Major and minor version of an interpreter; None if it does not run."""
    about = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([command, "-c", about], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


class Environment:
    """A virtual environment with torch and torchjac, removed at the end unless `keep` is set."""

    def __init__(self, python: str, torch: str, keep: bool):
        self.python, self.torch, self.keep = python, torch, keep
        name = f"{version(python)}-{torch}"
        self.folder = ROOT / ".venv-other" / name if keep else Path(tempfile.mkdtemp()) / name

    def __enter__(self) -> Path:
        """Installs torch and torchjac.

        Raises:
            Unavailable: torch cannot be installed.
        """
        wanted = {"newest": "torch", "oldest": f"torch=={lower_bound('torch')}.*"}
        torch = wanted.get(self.torch, f"torch=={self.torch}")
        print(f"setting up Python {version(self.python)} with {torch}", flush=True)
        try:
            run([self.python, "-m", "venv", str(self.folder)])
            done = self.pip(torch, "numpy", "scipy")
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["pip says nothing"]
                reason = next((x for x in lines if x.startswith("ERROR")), lines[-1])
                raise Unavailable(f"{torch} cannot be installed: {reason}")
            done = self.pip(f"{ROOT}[test]")
            if done.returncode:
                raise SystemExit(done.stderr)
        except BaseException:
            self.__exit__()
            raise
        return self.folder

    def __exit__(self, *_: object) -> None:
        """Removes the environment."""
        if not self.keep:
            shutil.rmtree(self.folder.parent, ignore_errors=True)

    def pip(self, *wanted: str) -> subprocess.CompletedProcess[str]:
        """Installs packages, without this project's constraints: as a user does."""
        command = [str(interpreter(self.folder)), "-m", "pip", "install", "--quiet"]
        flags = ["--disable-pip-version-check", *os.environ.get("PIP_FLAGS", "").split()]
        done = subprocess.run([*command, *flags, *wanted], capture_output=True, text=True)
        print(done.stdout, end="", flush=True)
        return done


def interpreter(folder: Path) -> Path:
    """The Python of an environment."""
    scripts = "Scripts/python.exe" if os.name == "nt" else "bin/python"
    return folder / scripts


def run(command: list[str]) -> None:
    """Runs a command that must succeed."""
    subprocess.run(command, check=True)


def tried(folder: Path) -> int:
    """Runs the first screen of the README and the tests."""
    python = str(interpreter(folder))
    about = "import sys, torch; print(sys.version.split()[0], 'with torch', torch.__version__)"
    run([python, "-c", about])
    first_screen(python)
    command = [python, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", "-m", "not slow"]
    files = [f"tests/{name}" for name in TESTS]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    share = [f"--opinfo-share={SHARE}"]
    return subprocess.run([*command, *share, *files], cwd=ROOT, env=environ).returncode


def first_screen(python: str) -> None:
    """Runs the first example of the README away from the sources, every warning an error."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    match = re.search(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert match is not None, "the README begins with an example"
    with tempfile.TemporaryDirectory() as elsewhere:
        subprocess.run([python, "-W", "error", "-c", match[1]], check=True, cwd=elsewhere)


if __name__ == "__main__":
    sys.exit(main())
