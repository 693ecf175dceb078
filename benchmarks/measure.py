"""Measure one workload: probe every method alone, then time the survivors side by side."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.methods import CALL_LIMIT, COMPILE_LIMIT, METHODS, Method
from benchmarks.peers import PEER_METHODS
from benchmarks.reference import Reference, tolerance
from benchmarks.results import Measurement, Row
from benchmarks.workers import (
    Job,
    Worker,
    WorkerDied,
    WorkerTimeout,
    ask_reference,
    export,
    peer_worker,
    torch_worker,
)
from benchmarks.workloads import Workload, build

SLOW = 2.0
"""Seconds a call: slower methods keep the single sample of their probe."""
METHOD_SECONDS = 1.2
"""Time a method gets for its rounds."""
LEAST_ROUNDS = 3
WARM_CALLS = 30
WARM_SECONDS = 0.2
"""Calls before the first sample, or time that they take (at most 1000 calls): compilers, caches and
torchjac's choice of a plan settle."""
SETTLE_SECONDS = 12.0
"""Calls of torchjac go on so long, or until there is a kernel: it makes one when calls have taken
as long as that takes."""
SAMPLE_SECONDS = 0.004
"""A sample repeats the call until it takes about this long."""


@dataclass(frozen=True)
class Settings:
    """How hard to measure.

    Attributes:
        rounds: Most samples a method.
        method_seconds: Time a method gets for its rounds.
        memory: Bytes a probe may allocate.
        peers_python: The Python with JAX, asdex and CasADi, None without peers.
        seed: Of the inputs.
    """

    rounds: int = 31
    method_seconds: float = METHOD_SECONDS
    memory: int = 8 << 30
    peers_python: str | None = None
    seed: int = 0


Announce = Callable[[str], None]


def peer_applies(port_set: frozenset[str], key: str) -> Callable[[Workload], bool]:
    """Whether a peer's method makes sense for a workload."""

    def applies(w: Workload) -> bool:
        sparse_only = key == "asdex"
        return w.port in port_set and not w.graph and (not sparse_only or w.sparse)

    return applies


def all_methods() -> dict[str, Method]:
    """Every method by key: PyTorch's, then the peers'."""
    peers = {
        key: Method(key, title, None, peer_applies(ports, key), compiles=True)
        for key, (title, ports) in PEER_METHODS.items()
    }
    return {m.key: m for m in METHODS} | peers


def measure(spec: str, methods: Sequence[Method], settings: Settings, announce: Announce) -> Row:
    """The row of one workload."""
    w = build(spec)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(spec, settings.seed, Path(folder), settings.memory)
        export(w, job)
        announce("reference")
        expected: Reference = ask_reference(job)
        measured: dict[str, Measurement] = {}
        for method in methods:
            announce(f"{method.key}: alone")
            if method.applies(w) and (method.prepare or settings.peers_python):
                measured[method.key] = probe(method, job, settings, expected)
            else:
                measured[method.key] = Measurement("absent")
        fast = [
            m for m in methods if measured[m.key].status == "ok" and measured[m.key].seconds < SLOW
        ]
        announce("side by side")
        measured |= side_by_side(fast, measured, replace(job, memory=0), settings)
    return Row(w.name, spec, w.shape, w.stands_for, measured)


def start(method: Method, job: Job, settings: Settings) -> Worker:
    """A worker that can run `method`."""
    if method.prepare is not None:
        return torch_worker(job)
    assert settings.peers_python is not None
    return peer_worker(job, settings.peers_python)


def probe(method: Method, job: Job, settings: Settings, expected: Reference) -> Measurement:
    """Run a method in a process of its own: is it right, how long, how much memory?"""
    path = job.folder / f"{method.key}.npy"
    limit = COMPILE_LIMIT if method.compiles else CALL_LIMIT
    order = {"do": "probe", "method": method.key, "result": str(path), "repeat": method.compiles}
    try:
        with start(method, job, settings) as worker:
            # Converting and saving a large result is not the method's fault.
            reply = worker.ask(order, limit + 2.0)
    except WorkerTimeout:
        return Measurement("timeout", detail=f"> {limit:.0f} s")
    except WorkerDied as exc:
        return Measurement("error", detail=str(exc))
    if "failure" in reply:
        failure = reply["failure"]
        return Measurement("memory" if failure == "memory" else "error", detail=failure)
    got = np.load(path)
    if not isinstance(got, np.ndarray):
        got = dict(got)
    path.unlink()
    error = expected.error(got)
    known = {
        "setup": reply["setup"],
        "first": reply["first"],
        "peak": reply["peak"],
        "error": error,
    }
    if not error <= tolerance(expected.values.dtype):
        return Measurement("wrong", detail=f"off by {error:.1e}", **known)
    if reply["seconds"] > CALL_LIMIT:
        return Measurement("timeout", detail=f"> {CALL_LIMIT:.0f} s", **known)
    return Measurement("ok", samples=(reply["seconds"],), **known)


def side_by_side(
    methods: Sequence[Method],
    probed: dict[str, Measurement],
    job: Job,
    settings: Settings,
) -> dict[str, Measurement]:
    """Time `methods` in turns, so that the machine's moods hit all of them alike.

    All PyTorch methods share one process, all peers another; only one call runs at a time. A
    method that fails here keeps what its probe found.
    """
    samples: dict[str, list[float]] = {m.key: [] for m in methods}
    with ExitStack() as stack:
        workers: dict[bool, Worker] = {}
        for m in methods:
            side = m.prepare is not None
            if side not in workers:
                workers[side] = stack.enter_context(start(m, job, settings))
        plans = {
            m.key: plan
            for m in methods
            if (plan := _warm(m, workers[m.prepare is not None], probed[m.key], settings))
        }
        alive = [m for m in methods if m.key in plans]
        for turn in range(settings.rounds):
            # Everybody is first once: nobody always follows the same neighbor.
            order = alive[turn % len(alive) :] + alive[: turn % len(alive)] if alive else []
            for m in order:
                number, turns = plans[m.key]
                if turn < turns:
                    with contextlib.suppress(WorkerDied, WorkerTimeout):
                        worker = workers[m.prepare is not None]
                        order_ = {"do": "time", "method": m.key, "number": number}
                        reply = worker.ask(order_, 4 * CALL_LIMIT)
                        if "seconds" in reply:
                            samples[m.key].append(reply["seconds"])
    return {
        key: replace(probed[key], samples=tuple(times), rounds=True)
        for key, times in samples.items()
        if times
    }


def _warm(
    method: Method, worker: Worker, probed: Measurement, settings: Settings
) -> tuple[int, int] | None:
    """Warm a method up; calls per sample and number of samples, None if it does not run."""
    limit = COMPILE_LIMIT if method.compiles else 4 * CALL_LIMIT
    enough = min(1000, max(WARM_CALLS, int(WARM_SECONDS / max(probed.seconds, 1e-6))))
    calls = 4 if probed.seconds > 0.5 else max(5, min(enough, int(2 / probed.seconds)))
    try:
        # torchjac makes a plan, then compiles it, when calls have taken long enough.
        least = SETTLE_SECONDS if method.key.startswith("torchjac") else 0.0
        order = {"do": "warm", "method": method.key, "calls": calls, "seconds": least}
        reply = worker.ask(order, limit + 4 * least)
        if "failure" in reply:
            return None
        number = 1
        for _ in range(3):  # the first call after others is slow: one alone says little
            reply = worker.ask({"do": "time", "method": method.key, "number": number}, limit)
            once = reply["seconds"]
            number = max(number, min(1000, math.ceil(SAMPLE_SECONDS / max(once, 1e-7))))
    except (WorkerDied, WorkerTimeout, KeyError):
        return None
    turns = int(settings.method_seconds / (number * max(once, 1e-7)))
    return number, min(settings.rounds, max(LEAST_ROUNDS, turns))
