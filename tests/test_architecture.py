"""Imports point one way: a stage knows itself, the stages before it, and the leaves.

The table is the picture of ``docs/architecture.md`` in data. A new module is added here first.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import torchjac

ROOT = Path(torchjac.__file__).parent

# In the order of the flow. A stage may import the stages before it, never the ones after it.
STAGES = ["capture", "structure", "plan", "engines", "layout"]
# Known to all; they import nothing of torchjac but each other, in this order.
LEAVES = ["errors", "host", "_torch", "disk"]
# What stands on top of the stages: each may import the stages, the leaves and what is named.
ABOVE: dict[str, set[str]] = {
    "explain": set(),
    "solve": {"explain"},
    "transform": {"explain"},
    "sparsity": {"solve"},
    "remembered": {"sparsity"},
    "unused": set(),
    "collection": set(),
    "compilation": {"collection"},
    "accumulated": {"compilation", "explain"},
    "report": set(),
    "saved": {"accumulated"},
    "orders": {"accumulated", "compilation"},
    "sampling": {"accumulated", "compilation", "orders"},
    "elimination": {
        "accumulated",
        "collection",
        "compilation",
        "orders",
        "report",
        "sampling",
        "saved",
    },
    "accumulation": {"accumulated", "elimination", "report", "saved"},
    "shortcut": {"accumulated", "accumulation", "explain"},
    "export": {"accumulated", "compilation", "sampling"},
    "function": {
        "accumulated",
        "accumulation",
        "elimination",
        "explain",
        "export",
        "remembered",
        "shortcut",
        "solve",
        "sparsity",
        "transform",
        "unused",
    },
    "api": {"function", "solve", "sparsity", "unused"},
    "testing": {"accumulation"},
    "__init__": {"api", "explain", "function"},
}
# The only place where names that PyTorch does not promise may be used.
PRIVATE_TORCH = {"_torch"}
MODULES = sorted(ROOT.rglob("*.py"))


def part(path: Path) -> str:
    """The stage or top module that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Absolute names of everything a file imports, wherever in the file."""
    package = ["torchjac", *path.relative_to(ROOT).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def allowed(own: str) -> set[str]:
    """The parts that a part may import."""
    if own in LEAVES:
        return set(LEAVES[: LEAVES.index(own) + 1])
    if own in STAGES:
        return {*LEAVES, *STAGES[: STAGES.index(own) + 1]}
    return {own, *LEAVES, *STAGES, *ABOVE[own]}


def test_every_module_has_a_place() -> None:
    """No module stands outside of the picture, and the picture holds no ghosts."""
    assert {part(p) for p in MODULES} == {*STAGES, *LEAVES, *ABOVE}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    """Left to right in the pipeline."""
    own = part(path)
    used = {
        name.split(".")[1]
        for name in imports(path)
        if name.split(".")[0] == "torchjac" and "." in name
    }
    assert used <= allowed(own), f"{own} must not import {sorted(used - allowed(own))}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_private_torch_stays_in_one_place(path: Path) -> None:
    """Private torch APIs go through one package, so that a new torch breaks one package."""
    if part(path) in PRIVATE_TORCH:
        return
    private = [
        name
        for name in imports(path)
        if name.split(".")[0] in ("torch", "functorch")
        and any(p.startswith("_") and p != "__future__" for p in name.split(".")[1:])
    ]
    assert not private
    chains = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    ]
    assert not [c for c in chains if re.fullmatch(r"torch(\.\w+)*\._[a-z]\w*(\.\w+)*", c)]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_one_module_reads_the_clock(path: Path) -> None:
    """All others ask it, so that tests can drive every duration."""
    if path == ROOT / "host" / "clock.py":
        return
    assert not [name for name in imports(path) if name.split(".")[0] in ("time", "timeit")]
    clocks = r"perf_counter|monotonic|(process|thread)_time|\btime\.time\b"
    assert not re.search(clocks, path.read_text())


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_read_in_one_sitting(path: Path) -> None:
    """Files of at most 400 lines, functions of at most 60."""
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert length <= 60, f"{node.name} has {length} lines"


def test_public_names() -> None:
    """The surface that is promised, and its errors in one module."""
    for name in ("jac", "jacobian", "hessian", "last_run", "Jacobian", "Record"):
        assert hasattr(torchjac, name)
    errors = importlib.import_module("torchjac.errors")
    for name in [
        "TorchjacError",
        "UnusedInputError",
        "CoupledBatchError",
        "DtypeError",
        "ArgumentError",
        "UnusedInputWarning",
        "LoopWarning",
    ]:
        assert getattr(torchjac, name) is getattr(errors, name)
    assert issubclass(torchjac.TorchjacError, RuntimeError)
    assert issubclass(torchjac.DtypeError, (torchjac.TorchjacError, TypeError))
    assert issubclass(torchjac.DtypeError, TypeError)
    assert issubclass(torchjac.ArgumentError, ValueError)
    assert issubclass(torchjac.UnusedInputWarning, UserWarning)
    assert issubclass(torchjac.LoopWarning, UserWarning)


def test_every_module_imports_and_has_a_docstring() -> None:
    for info in pkgutil.walk_packages([str(ROOT)], "torchjac."):
        assert importlib.import_module(info.name).__doc__, info.name
    assert (ROOT / "py.typed").exists()
