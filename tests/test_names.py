"""Names in texts lead somewhere: docstrings, comments, messages, pages, and targets of patches.

A module that moves leaves its name behind in texts, which no import and no type checker reads.
"""

from __future__ import annotations

import functools
import importlib
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import torchjac

ROOT = Path(__file__).parents[1]
SOURCE = Path(torchjac.__file__).parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("**/*.md")),
]
# Changelogs are left out: they tell of the past, and may name what is gone.
FOLDERS = ["src", "tests", "benchmarks", "examples", "tools"]
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("**/*.py"))

SETTINGS = [ROOT / "pyproject.toml", ROOT / "Makefile"]

# `torchjac.passes.candidates` as part of any text.
ABSOLUTE = re.compile(r"(?<![\w./-])torchjac((?:\.[A-Za-z_]\w*)+)")
# `passes.candidates` in backticks: the first part is a folder or a module of torchjac.
RELATIVE = re.compile(r"`([A-Za-z_]\w*(?:\.(?!(?:py|md)`)[A-Za-z_]\w*)+)`")
# `passes/candidates.py`, `cost.py`, `plan/` in backticks.
FILE = re.compile(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|md)|(?:[\w.-]+/)+)`")
# `tests/test_names.py` as part of any text.
ROOTED = re.compile(
    r"(?<![\w./-])((?:src|tests|benchmarks|examples|tools|docs)/[\w./-]+\.(?:py|md))"
)

# Names that lead nowhere, and why they may stand in a text.
FICTIONAL = {
    "torchjac.changes_detours": "a logger of a test: loggers need no module",
    "torchjac.passes.race.foretell": "what the test of this test must find",
}


def is_there(name: str) -> bool:
    """Whether a dotted name after `torchjac` is a module, or an attribute of something there."""
    value: Any = torchjac
    path = "torchjac"
    for part in name.strip(".").split("."):
        path = f"{path}.{part}"
        if hasattr(value, part):
            value = getattr(value, part)
        elif part in getattr(value, "__dataclass_fields__", ()):
            return True
        else:
            try:
                value = importlib.import_module(path)
            except ImportError:
                return False
    return True


@functools.cache
def files() -> frozenset[str]:
    """Paths of files and folders, from the root and from the package on, and last parts of both."""
    paths = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/"}
    for top in (*FOLDERS, "docs"):
        for path in (ROOT / top).rglob("*"):
            if "__pycache__" in path.parts:
                continue
            name = path.relative_to(ROOT).as_posix() + "/" * path.is_dir()
            paths |= {name, f"{top}/"}
            parts = name.removeprefix("src/torchjac/").split("/")
            paths |= {"/".join(parts[k:]) for k in range(len(parts))}
    return frozenset(paths)


@functools.cache
def parts() -> frozenset[str]:
    """Folders and modules of the package."""
    return frozenset(p.stem for p in SOURCE.iterdir() if p.suffix == ".py" or p.is_dir())


def texts(path: Path) -> Iterator[str]:
    """A page, or the strings and comments of a source."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield text
        return
    kinds = {tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", -1)}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in kinds:
            yield token.string


@functools.cache
def lost(path: Path) -> set[str]:
    """Names in the texts of a file that lead nowhere."""
    ours = path.suffix != ".py" or SOURCE in path.parents
    names = set()
    for text in texts(path):
        names |= {f"torchjac{m[1]}" for m in ABSOLUTE.finditer(text) if not is_there(m[1])}
        if not ours:
            continue
        relative = {m[1] for m in RELATIVE.finditer(text)}
        names |= {n for n in relative if n.split(".")[0] in parts() and not is_there(n)}
        named = [*FILE.finditer(text), *ROOTED.finditer(text)]
        names |= {m[1] for m in named if m[1] not in files()}
    return names


def file_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*PAGES, *SETTINGS, *SOURCES], ids=file_id)
def test_names_lead_somewhere(path: Path) -> None:
    assert lost(path) - FICTIONAL.keys() == set()


def test_names_that_lead_nowhere_are_reported(tmp_path: Path) -> None:
    """One of each kind, beside one that is there."""
    page = tmp_path / "page.md"
    page.write_text(
        "torchjac.passes.race.Race and torchjac.passes.race.foretell, torchjac.Record.passes,\n"
        "`guards.guard` and `capture.wardens`, `passes/race.py` and `plan/price.py`, `linear/`,\n"
        "`laws/`, `python tests/test_names.py` and `python tests/test_none.py`\n"
    )
    places = {"plan/price.py", "laws/", "tests/test_none.py"}
    assert lost(page) == {"torchjac.passes.race.foretell", "capture.wardens", *places}


def test_exceptions_are_needed() -> None:
    everything = {name for path in SOURCES for name in lost(path)}
    assert FICTIONAL.keys() <= everything
