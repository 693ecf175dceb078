"""The process replay: every run gives the same texts, and another computation other ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from test_tools import tool
from tools.replaying.cases import Case, Use
from tools.replaying.collect import replayed, warm_up
from tools.replaying.normal import digest, normal_c, normal_words

ROOT = Path(__file__).parents[1]
# A case that takes a second, in every way.
CHEAP = "problem the question"

TEXT = """
int kernel(const double *const *in, double *out)
{
  const double *const in0 = in[0];
  /* Of two numbers. */
  const double v7 = sin(in0[3]) * 1.5e-3;
  TORCHJAC_LOOP(v7)
  out[0] = helper(v7, 0x1.8p+3);
}
"""


class TestNormalC:
    def test_names_do_not_count(self) -> None:
        other = TEXT.replace("v7", "product").replace("in0", "x").replace("kernel", "f")
        assert other != TEXT
        assert normal_c(other) == normal_c(TEXT)

    def test_comments_and_spaces_do_not_count(self) -> None:
        other = TEXT.replace("/* Of two numbers. */", "").replace("  const", "    const")
        assert normal_c(other) == normal_c(TEXT)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("1.5e-3", "1.5e-4"),
            ("0x1.8p+3", "0x1.8p+2"),
            ("in0[3]", "in0[2]"),
            ("sin(", "cos("),
            (") * 1", ") / 1"),
            ("double *const in0", "float *const in0"),
            ("TORCHJAC_LOOP", "TORCHJAC_SPAN"),
            ("helper(v7", "helper(in0"),
        ],
    )
    def test_what_is_computed_counts(self, old: str, new: str) -> None:
        assert old in TEXT
        other = TEXT.replace(old, new)
        assert digest(normal_c(other)) != digest(normal_c(TEXT))

    def test_functions_of_the_text_are_numbered(self) -> None:
        text = "static double own(double x) { return sin(x); } double all(void) { return own(2); }"
        assert normal_c(text) == normal_c(text.replace("own", "other"))
        assert "sin" in normal_c(text)

    def test_two_names_are_not_one(self) -> None:
        assert normal_c("a = b + c;") != normal_c("a = b + b;")


def test_words_name_no_place() -> None:
    one = normal_words(f"20 at sin ({ROOT}/tests/programs.py:12), <object at 0x7f0012ab34cd>")
    other = normal_words("20 at sin (/elsewhere/tests/programs.py:14), <object at 0x7f0012ab34ce>")
    assert one == other


def apart(folder: Path, seed: str) -> dict[str, dict[str, list[str]]]:
    """The hashes of a replay in a process of its own."""
    out = folder / f"{seed}.json"
    command = [sys.executable, str(ROOT / "tools" / "replay.py"), "--out", str(out), "-k", CHEAP]
    env = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=300)
    hashes: dict[str, dict[str, list[str]]] = json.loads(out.read_text(encoding="utf-8"))
    return hashes


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each case is a copy of a process")
def test_two_processes_give_the_same(tmp_path: Path) -> None:
    """Whatever the seed of hashes is; and something is given."""
    one, other = apart(tmp_path, "1"), apart(tmp_path, "2")
    assert one == other
    assert set(one[f"{CHEAP}: compile"]) == {"c", "program", "record"}
    assert one[f"{CHEAP}: compile"]["program"]
    assert one[f"{CHEAP}: calls"]["record"]


def test_twice_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that the first replay leaves behind is seen by the second one."""
    monkeypatch.setattr("torchjac.host.costs._known", {})  # what it measures is not for others

    def f(x: torch.Tensor) -> torch.Tensor:
        return x.sin() * x.sum()

    case = Case("own", lambda: Use(f, (torch.ones(3),)), ("graph", "calls", "compile csr"))
    warm_up()
    first, second = replayed(case), replayed(case)
    assert first == second
    assert first["own: calls"]["program"]
    assert first["own: compile csr"]["record"]


class TestCompare:
    replay: ModuleType = tool("replay")

    def sides(self, folder: Path, before: str, after: str) -> None:
        for side, text in (("before", before), ("after", after)):
            hashes = {"case: way": {"c": [text]}, f"only {side}": {"c": []}}
            (folder / f"{side}.json").write_text(json.dumps(hashes), encoding="utf-8")
            (folder / side).mkdir()
            (folder / side / "case-way.c.txt").write_text(f"{text}\n", encoding="utf-8")

    def test_what_differs_is_shown(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.sides(tmp_path, "a = 1;", "a = 2;")
        assert self.replay.compare(tmp_path) == 1
        printed = capsys.readouterr().out
        for line in ("differs: case: way (c)", "-a = 1;", "+a = 2;", "only before: only before"):
            assert line in printed

    def test_what_is_alike_is_fine(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.sides(tmp_path, "a = 1;", "a = 1;")
        assert self.replay.compare(tmp_path) == 0
        assert "1 cases are alike, 0 differ" in capsys.readouterr().out
