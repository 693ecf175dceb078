"""Words that are not names: they say that something is there, and not what."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORDS = frozenset(
    (
        "glance",
        "beside",
        "made",
        "found",
        "given",
        "taken",
        "kept",
        "look",
        "note",
        "such",
        "others",
    )
)
FOLDERS = ("src", "tests", "tools", "benchmarks", "examples")
# Names that stay.
EXEMPT = {
    "captured.py found": "the name is in texts of the replay, which are compared between revisions",
}


def names(node: ast.AST) -> Iterator[str]:
    """The names that a node brings in."""
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()):
            yield name
        case ast.Attribute(attr=name, ctx=ast.Store()) | ast.alias(asname=str(name)):
            yield name


def parts(name: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}


def folders() -> list[str]:
    files = (path for folder in FOLDERS for path in (ROOT / folder).glob("**/*.py"))
    return sorted({str(path.parent.relative_to(ROOT)) for path in files})


def unclear(folder: Path) -> list[str]:
    return sorted(
        f"{path.name}:{getattr(node, 'lineno', 0)} {name}"
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in names(node)
        if parts(name) & WORDS and f"{path.name} {name}" not in EXEMPT
    )


@pytest.mark.parametrize("folder", folders())
def test_names_say_what_they_are(folder: str) -> None:
    assert not unclear(ROOT / folder)


def test_the_words_are_seen(tmp_path: Path) -> None:
    text = "def found_it(note): taken, clear = note; self.kept = 1\nclass GlanceLike: pass\n"
    (tmp_path / "a.py").write_text(text, encoding="utf-8")
    assert len(unclear(tmp_path)) == 5
