"""One problem: patterns of both sides and the numeric one, then the stages in turns with asdex."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.detection.problems import Problem, build
from benchmarks.detection.report import Entry, Laws
from benchmarks.detection.worker import ALL_ROWS, STAGES, asdex_worker, stages_worker
from benchmarks.workers import Job, Worker, WorkerDied, WorkerTimeout, export
from benchmarks.workloads import Workload

LIMIT = 300.0
"""Seconds that any one call may take."""

Array = np.ndarray[Any, Any]
Announce = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How hard to measure.

    Attributes:
        rounds: Most samples of each stage.
        least: Fewest, however slow.
        seconds: Time for the rounds of a problem.
        peers_python: The Python with asdex, None without.
        seed: Of the inputs.
    """

    rounds: int = 31
    least: int = 3
    seconds: float = 30.0
    peers_python: str | None = None
    seed: int = 0


@dataclass
class _Sides:
    """The processes of a group of problems, and the folder between them."""

    folder: Path
    ours: Worker
    asdex: Worker | None
    numbers: dict[str, str] = field(default_factory=dict)

    def number(self, problem: Problem) -> str:
        """Name of a problem's folder."""
        return self.numbers.setdefault(problem.spec, str(len(self.numbers)))


def measure(problems: Sequence[Problem], settings: Settings, announce: Announce) -> Iterator[Entry]:
    """The entries of problems that share their processes, one by one.

    A timed problem is best alone: what another one left in memory would blur its peak.
    """
    with TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        job = Job("detection", settings.seed, folder)
        asdex = None
        if settings.peers_python and any(p.peers for p in problems):
            asdex = stack.enter_context(asdex_worker(job, settings.peers_python))
        sides = _Sides(folder, stack.enter_context(stages_worker(job)), asdex)
        for problem in problems:
            announce(problem.spec)
            yield _entry(problem, sides, settings)


def _entry(problem: Problem, sides: _Sides, settings: Settings) -> Entry:
    w = build(problem.spec)
    entry = Entry(w.name, problem.spec, w.m, w.n, problem.timed, problem.faster, problem.within)
    ours, reply = _pattern(sides.ours, f"whole {problem.spec}", sides.folder)
    if ours is None:
        return replace(entry, failure=reply["failure"])
    entry = replace(entry, nnz=ours.shape[1], peak=reply["peak"], first=reply["first"])
    theirs = None
    peers = sides.asdex if problem.peers else None
    if peers is not None:
        here = sides.folder / sides.number(problem)
        here.mkdir(exist_ok=True)
        export(w, Job(problem.spec, settings.seed, here))
        theirs, reply = _pattern(peers, sides.number(problem), sides.folder)
        if theirs is None:
            entry = replace(entry, asdex_failure=reply["failure"])
            peers = None
        else:
            entry = replace(entry, asdex_nnz=theirs.shape[1], asdex_peak=reply["peak"])
    numeric, reply = _pattern(sides.ours, f"numeric {problem.spec}", sides.folder)
    if numeric is None:
        entry = replace(entry, failure=f"numeric Jacobian: {reply['failure']}")
    entry = replace(entry, laws=laws(w, ours, theirs, numeric))
    if problem.timed:
        entry = replace(entry, samples=_samples(problem, sides, peers, settings))
    return entry


def _pattern(worker: Worker, method: str, folder: Path) -> tuple[Array | None, dict[str, Any]]:
    """Rows and columns of what a method finds, and the rest of the answer."""
    path = folder / "pattern.npy"
    order = {"do": "probe", "method": method, "result": str(path), "repeat": False}
    try:
        reply = worker.ask(order, LIMIT)
    except (WorkerDied, WorkerTimeout) as exc:
        return None, {"failure": str(exc)}
    if "failure" in reply:
        return None, reply
    pattern = np.load(path)
    path.unlink()
    return pattern, reply


def laws(w: Workload, ours: Array, theirs: Array | None, numeric: Array | None) -> Laws:
    """Counts entries that one side has and the other lacks."""

    def keys(pattern: Array) -> Array:
        return np.unique(pattern[0] * w.n + pattern[1])

    def lacking(whole: Array, part: Array) -> int:
        return len(np.setdiff1d(keys(part), keys(whole), assume_unique=True))

    known = numeric is not None
    return Laws(
        numeric=numeric.shape[1] if known and w.m * w.n <= ALL_ROWS else None,
        missed=lacking(ours, numeric) if known else None,
        asdex_missed=lacking(theirs, numeric) if known and theirs is not None else None,
        beyond=lacking(theirs, ours) if theirs is not None else None,
    )


def _samples(
    problem: Problem, sides: _Sides, peers: Worker | None, settings: Settings
) -> dict[str, tuple[float, ...]]:
    """Seconds of each stage and of asdex, one sample a round; everybody starts a round once."""
    turns = [(stage, sides.ours, f"{stage} {problem.spec}") for stage in STAGES]
    if peers is not None:
        turns.append(("asdex", peers, sides.number(problem)))
    samples: dict[str, list[float]] = {key: [] for key, *_ in turns}
    start = time.monotonic()
    for turn in range(settings.rounds):
        if turn >= settings.least and time.monotonic() - start > settings.seconds:
            break
        first = turn % len(turns)
        for key, worker, method in turns[first:] + turns[:first]:
            samples[key].append(_fresh(worker, method))
    return {key: tuple(times) for key, times in samples.items()}


def _fresh(worker: Worker, method: str) -> float:
    """Seconds of one call that was prepared just now: no graph is read twice.

    Raises:
        WorkerDied: If it failed, though it did not at first.
    """
    worker.ask({"do": "warm", "method": method, "calls": 0}, LIMIT)
    reply = worker.ask({"do": "time", "method": method, "number": 1}, LIMIT)
    if "failure" in reply:
        raise WorkerDied(reply["failure"])
    return float(reply["seconds"])
