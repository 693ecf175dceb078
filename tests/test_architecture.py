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

# Known to every room; they import nothing of torchjac but each other, in this order.
LEAVES = ["errors", "host", "_torch"]
# The rooms in the order of the flow. Each names the rooms before it that it imports, beside the
# leaves. A room within a room (`compiler.codegen`) is a room of its own.
ROOMS: dict[str, set[str]] = {
    "ops": set(),
    "call": set(),
    "guards": {"call"},
    "capture": {"call", "guards"},
    "linear": {"capture", "ops"},
    "sparsity": {"call", "capture", "linear"},
    "request": {"sparsity"},
    "passes": {"capture", "request", "sparsity"},
    "layout": {"capture", "passes", "request", "sparsity"},
    "compiler.program": {"ops", "request"},
    "compiler.accumulate": {
        "capture",
        "compiler.program",
        "linear",
        "ops",
        "request",
        "sparsity",
    },
    "compiler.codegen": {"compiler.program", "ops"},
    "compiler": {
        "call",
        "capture",
        "compiler.accumulate",
        "compiler.codegen",
        "compiler.program",
        "layout",
        "ops",
        "passes",
        "request",
        "sparsity",
    },
    "record": set(),
    "jit": {
        "call",
        "capture",
        "compiler",
        "compiler.codegen",
        "guards",
        "layout",
        "passes",
        "record",
        "request",
        "sparsity",
    },
    "export": {
        "call",
        "capture",
        "compiler",
        "compiler.codegen",
        "compiler.program",
        "passes",
        "request",
        "sparsity",
    },
    "jacobian": {
        "call",
        "export",
        "jit",
        "record",
        "request",
        "sparsity",
    },
    "api": {"call", "capture", "jacobian", "jit", "request", "sparsity"},
    "testing": {"call", "jit", "passes"},
    "__init__": {"api", "errors", "jacobian", "record", "sparsity"},
}
# The only place where names that PyTorch does not promise may be used.
PRIVATE_TORCH = {"_torch"}
# One idea each, which would be harder to follow in parts: all states and events of the tiers.
LONGER = {"jit/tiers.py"}
MODULES = sorted(ROOT.rglob("*.py"))
# Code generation before the border of targets, and the one module there that imports a target.
CODEGEN = ROOT / "compiler" / "codegen"
REGISTRY = CODEGEN / "targets.py"
NEUTRAL = [p for p in MODULES if p.is_relative_to(CODEGEN) and CODEGEN / "c" not in p.parents]
# Text of C: a directive, the end of a statement, a type, a call of its library.
C_TEXT = (
    r"#\s*(pragma|include|define|if|endif)\b"
    r"|;(\s*\n|$)"
    r"|\b(double|long long|void|const)\b"
    r"|\w(\{f\})?\(\{"
)


def room(names: tuple[str, ...]) -> str:
    """The room of a module, by the parts of its name below `torchjac`."""
    whole = ".".join(names[:2])
    return whole if whole in ROOMS else names[0]


def room_of(path: Path) -> str:
    """The room that a file belongs to."""
    return room(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> list[str]:
    """Absolute names of everything a file imports, wherever in the file."""
    package = ["torchjac", *path.relative_to(ROOT).parts[:-1]]
    absolute = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            absolute += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            absolute += [f"{module}.{alias.name}" for alias in node.names]
    return absolute


def imported(path: Path) -> set[str]:
    """The rooms that a file imports, without its own."""
    names = [name.split(".")[1:] for name in imports(path) if name.split(".")[0] == "torchjac"]
    return {room(tuple(parts)) for parts in names if parts} - {room_of(path)}


def allowed(own: str) -> set[str]:
    """The rooms that a room may import."""
    if own in LEAVES:
        return set(LEAVES[: LEAVES.index(own)])
    return {*LEAVES, *ROOMS[own]}


def test_every_module_has_a_place() -> None:
    """No module stands outside of the picture, and the picture holds no ghosts."""
    assert {room_of(p) for p in MODULES} == {*LEAVES, *ROOMS}


def test_the_picture_points_one_way() -> None:
    """A room names rooms before it only, so there is no circle."""
    order = [*LEAVES, *ROOMS]
    for own, named in ROOMS.items():
        assert all(order.index(n) < order.index(own) for n in named), own


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    """A file imports its own room, the leaves, and the rooms that its room names."""
    own = room_of(path)
    used = imported(path)
    assert used <= allowed(own), f"{own} must not import {sorted(used - allowed(own))}"


@pytest.mark.parametrize("own", ROOMS)
def test_every_arrow_is_there(own: str) -> None:
    """The picture draws no arrow that no import takes."""
    used = {name for path in MODULES if room_of(path) == own for name in imported(path)}
    assert ROOMS[own] <= used, f"{own} does not import {sorted(ROOMS[own] - used)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_private_torch_stays_in_one_place(path: Path) -> None:
    """Private torch APIs go through one package, so that a new torch breaks one package."""
    if room_of(path) in PRIVATE_TORCH:
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
    """Files of at most 400 lines (600 for one idea that needs it), functions of at most 60."""
    text = path.read_text()
    long = str(path.relative_to(ROOT)) in LONGER
    assert len(text.splitlines()) <= (600 if long else 400)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert length <= 60, f"{node.name} has {length} lines"


# Signatures that are not ours to choose: public options, and those of torch's operators.
SIGNATURES = {
    "api.py": {"jac", "jacobian", "hessian"},
    "jacobian.py": {"__init__"},
    "_torch/trace/attention.py": {"forward", "backward"},
    "compiler/codegen/ops_reduce.py": {"_convolution"},
}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_few_parameters(path: Path) -> None:
    longer = SIGNATURES.get(str(path.relative_to(ROOT)), set())
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name not in longer:
            names = [
                a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            ]
            count = len(names) - (names[:1] in (["self"], ["cls"]))
            assert count <= 6, f"{node.name} has {count} parameters"


@pytest.mark.parametrize("path", NEUTRAL, ids=lambda p: p.name)
def test_code_generation_knows_no_target(path: Path) -> None:
    """Only the registry imports a target; all else goes through `Target`."""
    if path == REGISTRY:
        return
    inside = "torchjac.compiler.codegen.c"
    assert not [x for x in imports(path) if x == inside or x.startswith(f"{inside}.")]


@pytest.mark.parametrize("path", NEUTRAL, ids=lambda p: p.name)
def test_no_text_of_c_before_the_border(path: Path) -> None:
    """Expressions and loops name arrays, lanes and operations: no string of theirs is C."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    said = {ast.get_docstring(node, clean=False) for node in nodes}
    texts = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert not [text for text in texts - said if re.search(C_TEXT, text)]


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
