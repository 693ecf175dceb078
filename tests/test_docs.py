"""The README and docs/ tell the truth: their snippets run, their links lead somewhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_snippets_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All snippets of a page run in order, in one namespace; failures name the page's own line."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": f"docs.{page.stem}"}
    for match in FENCE.finditer(text):
        tree = ast.parse(match[1])
        ast.increment_lineno(tree, text.count("\n", 0, match.start(1)))
        exec(compile(tree, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_fence_is_closed(page: Path) -> None:
    """An unclosed fence would hide the snippets after it from the test above."""
    fences = re.findall(r"^```", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) % 2 == 0


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_relative_links_lead_somewhere(page: Path) -> None:
    targets = [m[1] for m in LINK.finditer(page.read_text(encoding="utf-8"))]
    local = [t for t in targets if "://" not in t]
    assert [t for t in local if not (page.parent / t).exists()] == []


def test_readme_has_the_place_for_the_benchmark_table() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert 0 < text.find("<!-- benchmark:begin -->") < text.find("<!-- benchmark:end -->")
