"""Replays one case: C, programs and records on the way to its Jacobian, as text."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import torchjac

from .cases import Case, Use
from .hooks import clock, watched
from .normal import normal_c, normal_words

# Texts of one way to ask for one Jacobian, by kind: `c`, `program`, `record`.
Texts = dict[str, list[str]]

# Steps of the clock are large at the start of a call, so that a few calls pay for a plan and a
# kernel, and small afterwards, so that no deadline passes while these are compiled.
_FIRST = 8  # readings with large steps
_EARLY = 2.0**-4  # seconds: a large step; a power of two, so that differences are exact
_LATE = 2.0**-12  # seconds: a small step
_DRIFT = 2.0**-20  # growth of the step per reading: decides which of two timed candidates is faster
_CALLS = 24  # calls: enough for a plan, a kernel and the fast path
_BUDGET = 2**28  # bytes: memory budget of each Jacobian
_CSR = {"layout": torch.sparse_csr}

# Ways to ask for a Jacobian: options, number of calls, and whether the steps of the clock shrink.
WAYS: dict[str, tuple[dict[str, Any], int, bool]] = {
    "calls": ({}, _CALLS, True),
    "calls csr": (_CSR, _CALLS, True),
    "compile": ({"compile": True}, 3, True),
    "compile csr": ({"compile": True, **_CSR}, 3, True),
    "forward first": ({}, _CALLS, False),
    "keeps graph": ({"create_graph": True}, _CALLS, False),
    "batched calls": ({"batched": True}, _CALLS, True),
    "batched compile": ({"batched": True, "compile": True}, 3, True),
}


class Clock:
    """A clock that moves only when read."""

    def __init__(self, falling: bool):
        """Starts at 0.

        Args:
            falling: Whether each step is a little smaller than the last one, instead of larger.
        """
        self._time, self._total, self._since = 0.0, 0, 0
        self._drift = -_DRIFT if falling else _DRIFT

    def __call__(self) -> float:
        """A reading in seconds."""
        self._total += 1
        self._since += 1
        step = _EARLY if self._since <= _FIRST else _LATE
        self._time += step * (1.0 + self._drift * self._total)
        return self._time

    def call(self) -> None:
        """Starts a call: the next steps are large."""
        self._since = 0


def replayed(case: Case) -> dict[str, Texts]:
    """The texts of a case, by the way to ask for its Jacobian."""
    before = os.environ.get("TORCHJAC_CACHE_DIR")
    texts = {}
    try:
        for way in case.ways:
            with tempfile.TemporaryDirectory(prefix="torchjac-replay-") as folder:
                os.environ["TORCHJAC_CACHE_DIR"] = folder
                texts[f"{case.name}: {way}"] = _asked(case.make, way, Path(folder))
    finally:
        if before is None:
            os.environ.pop("TORCHJAC_CACHE_DIR", None)
        else:
            os.environ["TORCHJAC_CACHE_DIR"] = before
    return texts


def warm_up() -> None:
    """Measures the machine by the replay's clock, and runs the imports of a first use."""
    case = Case("warm-up", lambda: Use(lambda x: x.sin() * x.sum(), (torch.ones(3),)), tuple(WAYS))
    replayed(case)


def _asked(make: Callable[[], Use], way: str, folder: Path) -> Texts:
    torch.manual_seed(0)
    use, record = make(), []
    reading = Clock(WAYS[way][2] if way in WAYS else True)
    with warnings.catch_warnings(), watched() as noted, clock(reading):
        warnings.simplefilter("ignore")
        try:
            if "export" in way:
                noted.c += _exported(use, way, folder)
            elif way.endswith("hessian"):
                record = _called(torchjac.hessian, _summed(use), {"compile": True}, 2, reading)
            elif "graph" in way.split()[:2] and way != "keeps graph":
                record = [_of_graph(use, way, reading)]
            else:
                options, calls, _ = WAYS[way]
                record = _called(torchjac.jacobian, use, options, calls, reading)
        except Exception as error:  # a refusal is a result too
            record.append(normal_words(f"{type(error).__name__}: {error}"))
    return {"c": noted.c, "program": noted.program, "record": record}


def _called(
    kind: Callable[..., Any], use: Use, options: dict[str, Any], calls: int, reading: Clock
) -> list[str]:
    """Records of several calls; equal ones in a row are one, with their number."""
    jacobian = kind(use.f, use.argnums, memory_budget=_BUDGET, **options)
    records = []
    for _ in range(calls):
        reading.call()
        result = jacobian(*use.args, **use.kwargs)
        records.append(_recorded(result))
    reading.call()
    records.append(f"explained\n{_shown(jacobian.explain(*use.args, **use.kwargs))}")
    return [f"{len(list(alike))} calls\n{text}" for text, alike in groupby(records)]


def _of_graph(use: Use, way: str, reading: Clock) -> str:
    """The record of a Jacobian of tensors that have a graph."""
    argnums = (use.argnums,) if isinstance(use.argnums, int) else use.argnums
    args = list(use.args)
    for i in argnums:
        args[i] = pytree.tree_map(lambda x: x.detach().clone().requires_grad_(), args[i])
    reading.call()
    result = torchjac.jac(
        use.f(*args, **use.kwargs),
        [args[i] for i in argnums],
        allow_unused=True,
        batched=way.startswith("batched"),
        memory_budget=_BUDGET,
        **(_CSR if way.endswith("csr") else {}),
    )
    return _recorded(result)


def _exported(use: Use, way: str, folder: Path) -> list[str]:
    """The files for C and C++."""
    options = {**(_CSR if way.endswith("csr") else {}), "batched": way.startswith("batched")}
    jacobian = torchjac.jacobian(use.f, use.argnums, memory_budget=_BUDGET, **options)
    files = jacobian.export(folder / "exported.c", *use.args, **use.kwargs)
    return [f"{f.name}\n{normal_c(f.read_text(encoding='utf-8'))}" for f in sorted(files)]


def _summed(use: Use) -> Use:
    """The sum of squares of the results, a scalar function that has a Hessian."""

    def f(*args: Any, **kwargs: Any) -> Tensor:
        return sum(
            (x.square().sum() for x in pytree.tree_leaves(use.f(*args, **kwargs))),
            torch.zeros(()),
        )

    return Use(f, use.args, use.argnums, use.kwargs)


def _recorded(result: Any) -> str:
    """The record of the last call, and the shapes of its result."""
    leaves, _ = pytree.tree_flatten(result)
    shapes = [f"result {_leaf(x)}" for x in leaves]
    return "\n".join([_shown(torchjac.last_run()), *shapes])


def _leaf(x: Any) -> str:
    if not isinstance(x, Tensor):
        return type(x).__name__
    count = "" if x.layout is torch.strided else f" {x._nnz()} entries"
    return f"{x.dtype} {tuple(x.shape)} {x.layout}{count}"


def _shown(record: Any) -> str:
    """A record without durations."""
    if record is None:
        return "no record"
    lines = []
    for about in fields(record):
        value = getattr(record, about.name)
        if about.name == "seconds":
            continue
        if about.name == "candidates":
            value = [c.name for c in value]
        lines.append(f"{about.name}: {value}")
    return normal_words("\n".join(lines))
