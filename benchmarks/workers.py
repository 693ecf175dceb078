"""Processes that do the measured work, so that a method may hang, crash or run out of memory.

A worker holds one workload. The PyTorch ones are forked from a server that has imported torch
already; the peers' ones are started with their own Python. Both speak the orders of `serve`.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import serve
from benchmarks.workloads import Workload, build

ROOT = Path(__file__).resolve().parent.parent
START_LIMIT = 60.0
"""Seconds a process may take to start and load its workload."""


class WorkerDied(RuntimeError):
    """The process ended without an answer."""


class WorkerTimeout(RuntimeError):
    """No answer within the limit."""


@dataclass(frozen=True)
class Job:
    """What a worker loads.

    Attributes:
        spec: The workload, as `build` takes it.
        seed: Of its inputs.
        folder: Where results and the peers' input files go.
        memory: Bytes a worker may allocate, 0 for no limit.
    """

    spec: str
    seed: int
    folder: Path
    memory: int = 0


class TorchBackend:
    """A workload and its arguments for the methods of this Python."""

    def __init__(self, job: Job) -> None:
        self.workload = build(job.spec)
        self.args = self.workload.make(job.seed)

    def load(self, method: str) -> None:
        """Import torchjac; the compiler's modules are part of its first call."""
        if method.startswith("torchjac"):
            import torchjac  # noqa: F401

    def prepare(self, method: str) -> Callable[[], Any]:
        """See `benchmarks.methods`."""
        from benchmarks.methods import METHODS

        prepare = next(m.prepare for m in METHODS if m.key == method)
        assert prepare is not None
        return prepare(self.workload, self.args)

    def settled(self) -> bool:
        """Whether torchjac has made a kernel; other methods are not waited for."""
        import torchjac

        record = torchjac.last_run()
        return record is not None and record.mode.endswith("kernel")

    def matrix(self, result: Any) -> Any:
        """See `benchmarks.methods.matrix`."""
        from benchmarks.methods import matrix

        return matrix(self.workload, result)


def _torch_main(channel: Connection, job: Job) -> None:
    # A process group of its own: killing it also ends the compiler's helpers.
    os.setsid()
    import warnings

    warnings.simplefilter("ignore")
    backend = TorchBackend(job)
    if job.memory:
        serve.limit_memory(job.memory)
    channel.send({"event": "ready"})
    # In a thread of its own: the one that a forked process begins with is not like others, because
    # OpenMP takes it for the one that was forked. A user's program is not forked.
    thread = threading.Thread(target=serve.serve, args=(channel, backend))
    thread.start()
    thread.join()


def _reference_main(channel: Connection, job: Job) -> None:
    os.setsid()
    from benchmarks.reference import reference

    backend = TorchBackend(job)
    channel.send({"event": "ready"})
    channel.send({"reference": reference(backend.workload, backend.args)})


class Worker:
    """One process and the pipe to it. Use as a context manager."""

    def __init__(self, start: Callable[[Connection], tuple[int, Callable[[], None]]]) -> None:
        self._channel, theirs = multiprocessing.Pipe()
        self._pid, self._reap = start(theirs)
        theirs.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):
            self._channel.send({"do": "stop"})
        self._channel.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)
        self._reap()

    def ask(self, order: dict[str, Any], limit: float) -> dict[str, Any]:
        """Send an order, return its answer. Every event on the way restarts the clock."""
        try:
            self._channel.send(order)
        except OSError as exc:
            raise WorkerDied(str(exc)) from exc
        return self.answer(limit)

    def answer(self, limit: float) -> dict[str, Any]:
        """The next message that is no event."""
        deadline = time.monotonic() + limit
        while True:
            try:
                if not self._channel.poll(max(0.0, deadline - time.monotonic())):
                    raise WorkerTimeout(f"no answer in {limit:.0f} s")
                message: dict[str, Any] = self._channel.recv()
            except (EOFError, OSError) as exc:
                raise WorkerDied("the process ended without an answer") from exc
            if "event" not in message:
                return message
            deadline = time.monotonic() + limit

    def wait_ready(self) -> Worker:
        """Block until the workload is loaded."""
        if not self._channel.poll(START_LIMIT):
            raise WorkerTimeout(f"not ready in {START_LIMIT:.0f} s")
        try:
            self._channel.recv()
        except (EOFError, OSError) as exc:
            raise WorkerDied("the process ended while loading") from exc
        return self


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.preload"])
    return context


def _fork(target: Callable[[Connection, Job], None], job: Job) -> Worker:
    def start(theirs: Connection) -> tuple[int, Callable[[], None]]:
        process = _context().Process(target=target, args=(theirs, job))
        process.start()
        return process.pid, process.join

    return Worker(start)


def torch_worker(job: Job) -> Worker:
    """A worker for the methods of this Python."""
    return _fork(_torch_main, job).wait_ready()


def peer_worker(job: Job, python: str) -> Worker:
    """A worker in another Python; `export` must have filled the folder."""

    def start(theirs: Connection) -> tuple[int, Callable[[], None]]:
        fd = theirs.fileno()
        command = [python, "-m", "benchmarks.peers", str(fd), str(job.folder), str(job.memory)]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            pass_fds=[fd],
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return process.pid, lambda: (process.wait(), None)[1]

    return Worker(start).wait_ready()


def ask_reference(job: Job, limit: float = 300.0) -> Any:
    """The `Reference` of a job, computed in a process of its own."""
    with _fork(_reference_main, job).wait_ready() as worker:
        return worker.answer(limit)["reference"]


def export(workload: Workload, job: Job) -> None:
    """Write the arguments and constants of a workload for the peers."""
    args = workload.make(job.seed)
    arrays = {f"arg{i}": a.numpy() for i, a in enumerate(args)}
    arrays.update({f"const_{k}": v.numpy() for k, v in workload.constants.items()})
    np.savez(job.folder / "arrays.npz", **arrays)
    meta = {
        "port": workload.port,
        "args": len(args),
        "argnums": workload.argnums,
        "batch": workload.batch,
        "sparse": workload.sparse,
        "m": workload.m,
        "n": workload.n,
    }
    (job.folder / "workload.json").write_text(json.dumps(meta))
