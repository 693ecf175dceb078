"""The processes: torchjac's stages in one, asdex in another, both speaking `benchmarks.serve`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from benchmarks import serve
from benchmarks.detection.problems import build
from benchmarks.workers import ROOT, Job, Worker, _fork
from benchmarks.workloads.base import Workload, generator

STAGES = ("capture", "detect", "whole")
"""What is timed of torchjac."""

ALL_ROWS = 4_000_000
"""Jacobians of at most so many elements are computed in full, of others `ROWS` random rows."""
ROWS = 64
POINTS = 3

Array = np.ndarray[Any, Any]


class StagesBackend:
    """torchjac's stages on any problem; a method is ``"stage spec"``."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._workloads: dict[str, Workload] = {}

    def load(self, method: str) -> None:
        """Import what is timed."""
        import torchjac  # noqa: F401

    def prepare(self, method: str) -> Callable[[], Any]:
        """A stage, with the stages before it done afresh."""
        import torchjac
        from torchjac.call import Call
        from torchjac.capture.trace import trace_function
        from torchjac.linear.rules import RULES
        from torchjac.sparsity.interpret import interpret
        from torchjac.sparsity.pattern import pattern_of

        stage, _, spec = method.partition(" ")
        w = self._workloads.setdefault(spec, build(spec))
        if stage == "numeric":
            return lambda: nonzeros(w, self._seed)
        args = w.make(self._seed)
        if stage == "whole":
            return lambda: torchjac.jacobian(w.f, argnums=w.argnums).pattern(*args)
        call, rules = Call(w.f, w.argnums, False, args, {}), frozenset(RULES)
        if stage == "capture":
            return lambda: trace_function(call, rules)
        derivative = trace_function(call, rules)
        return lambda: pattern_of(derivative, interpret(derivative))

    def settled(self) -> bool:
        """Nothing changes from call to call."""
        return True

    def matrix(self, result: Any) -> Array:
        """Row and column of every entry."""
        if isinstance(result, np.ndarray):
            return result
        return np.stack([result.rows, result.columns]).astype(np.int64)


def nonzeros(w: Workload, seed: int) -> Array:
    """Rows and columns where the Jacobian is not zero at one of some random points.

    Of a large one, in some rows only.
    """
    rows = torch.arange(w.m)
    if w.m * w.n > ALL_ROWS:
        rows = torch.randperm(w.m, generator=generator(seed))[:ROWS]
    keys_of_rows = []
    for point in range(POINTS):
        args = [a.requires_grad_(i in w.positions) for i, a in enumerate(w.make(seed + point))]
        inputs = [args[i] for i in w.positions]
        out = w.f(*args).reshape(-1)
        for i in rows.tolist():
            grads = torch.autograd.grad(
                out[i], inputs, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            (columns,) = torch.cat([g.reshape(-1) for g in grads]).nonzero(as_tuple=True)
            keys_of_rows.append(i * w.n + columns)
    keys = np.unique(torch.cat(keys_of_rows).numpy())
    return np.stack([keys // w.n, keys % w.n])


def _main(channel: Connection, job: Job) -> None:
    os.setsid()  # a group of its own, so that its end is the end of its helpers
    backend = StagesBackend(job.seed)
    channel.send({"event": "ready"})
    serve.serve(channel, backend)


def stages_worker(job: Job) -> Worker:
    """A worker for torchjac."""
    return _fork(_main, job).wait_ready()


def asdex_worker(job: Job, python: str) -> Worker:
    """A worker for asdex in another Python; the job's folder holds a folder a problem."""

    def start(theirs: Connection) -> tuple[int, Callable[[], None]]:
        fd = theirs.fileno()
        process = subprocess.Popen(
            [python, "-m", "benchmarks.peers.detection", str(fd), str(job.folder)],
            cwd=ROOT,
            pass_fds=[fd],
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return process.pid, lambda: (process.wait(), None)[1]

    return Worker(start).wait_ready()
