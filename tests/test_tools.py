"""What sets up environments: which torch it takes, and other versions."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def tool(name: str) -> ModuleType:
    """A program in `tools/` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


which_torch, try_version = tool("which_torch"), tool("try_version")


@pytest.mark.parametrize(
    ("torch", "platform", "expected"),
    [
        ("2.13.0+cpu", "linux", "the build for CPUs"),
        ("2.13.0", "darwin", "the build for CPUs"),
        ("2.13.0+cu130", "linux", "with GPU libraries"),
        ("2.13.0", "linux", "with GPU libraries"),
    ],
)
def test_the_build_is_named(torch: str, platform: str, expected: str) -> None:
    line = which_torch.described(torch, platform)
    assert line.startswith(f"torch {torch}: ")
    assert expected in line
    assert ("PIP_FLAGS" in line) == ("GPU" in expected)


def test_the_pinned_torch_needs_no_index() -> None:
    """`torch==X` takes `X+cpu` where pip can see it, and `X` where it cannot."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (pinned,) = [line for line in lines if line.startswith("torch==")]
    assert "+" not in pinned
    from packaging.specifiers import SpecifierSet

    version = pinned.removeprefix("torch==")
    assert SpecifierSet(f"=={version}").contains(f"{version}+cpu")


class TestOtherVersions:
    def test_bounds_are_those_of_the_package(self) -> None:
        assert try_version.lower_bound("python") == "3.10"
        assert try_version.lower_bound("torch") == "2.12"

    def test_what_it_runs_is_there(self) -> None:
        for name in try_version.TESTS:
            assert (ROOT / "tests" / name.split("::")[0]).exists(), name

    def test_an_interpreter(self) -> None:
        assert try_version.find_python(sys.executable) == sys.executable
        own = f"3.{sys.version_info.minor}"
        assert try_version.version(sys.executable) == own
        assert try_version.find_python("newest")

    def test_what_cannot_be_had_is_skipped(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["try_version.py", "--python", "python9.9"])
        assert try_version.main() == 0
        assert capsys.readouterr().out == "skipped: there is no python9.9 here\n"

    def test_a_torch_that_cannot_be_installed(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def pip(self: Any, *wanted: str) -> subprocess.CompletedProcess[str]:
            return subprocess.CompletedProcess(wanted, 1, "", "ERROR: no such torch\nnotice")

        monkeypatch.setattr(try_version.Environment, "pip", pip)
        monkeypatch.setattr(try_version, "run", lambda command: None)
        monkeypatch.setattr(sys, "argv", ["try_version.py", "--torch", "9.9"])
        assert try_version.main() == 0
        out = capsys.readouterr().out
        assert "skipped: torch==9.9 cannot be installed: ERROR: no such torch" in out

    def test_a_torchjac_that_cannot_be_installed_is_an_error(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def pip(self: Any, *wanted: str) -> subprocess.CompletedProcess[str]:
            return subprocess.CompletedProcess(wanted, int("torch" not in wanted), "", "broken")

        monkeypatch.setattr(try_version.Environment, "pip", pip)
        monkeypatch.setattr(try_version, "run", lambda command: None)
        monkeypatch.setattr(sys, "argv", ["try_version.py"])
        with pytest.raises(SystemExit, match="broken"):
            try_version.main()


def test_a_share_of_opinfo(pytester: Any) -> None:
    """The same tenth on every run; other tests are never left out."""
    (pytester.path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    names = [f"op{k}" for k in range(200)]
    text = f"import pytest\n@pytest.mark.parametrize('n', {names})\ndef test_op(n): pass\n"
    pytester.makepyfile(test_made_opinfo=text, test_made_other=text)
    for _ in range(2):
        ran = pytester.runpytest("--opinfo-share=10", "-q")
        counts = ran.parseoutcomes()
        assert 200 + 5 <= counts["passed"] <= 200 + 40
        assert counts["passed"] + counts["deselected"] == 400
