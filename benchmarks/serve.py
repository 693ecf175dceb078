"""The measuring side of a worker process: takes orders over a connection, times calls.

Runs in this Python for the PyTorch methods and in the peers' Python for the others, so it imports
neither framework.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

SECOND_CALL_BELOW = 5.0
"""Seconds: a first call that took longer is not repeated, unless it compiled."""
MORE_CALLS, BRIEF = 5, 1.0
"""Calls after the second one, and seconds that they may take."""
REST = 0.01
"""Seconds before a sample in which threads go to sleep."""


class Backend(Protocol):
    """One workload, ready to be differentiated by several methods."""

    def load(self, method: str) -> None:
        """Import what the method needs, so that nobody is timed importing."""

    def prepare(self, method: str) -> Callable[[], Any]:
        """The call to be timed."""

    def settled(self) -> bool:
        """Whether more calls would not change how the last one was answered."""

    def matrix(self, result: Any) -> Any:
        """A result as one dense NumPy array."""


class Channel(Protocol):
    """The part of `multiprocessing.connection.Connection` that is used."""

    def send(self, message: Any) -> None:
        """Hand a message over."""

    def recv(self) -> Any:
        """Wait for one."""


def limit_memory(extra: int) -> None:
    """Refuse address space beyond what this process has now plus `extra` bytes."""
    with contextlib.suppress(OSError, ValueError):
        size = _status("VmSize") + extra
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def serve(channel: Channel, backend: Backend) -> None:
    """Answer orders until told to stop or the other side is gone."""
    calls: dict[str, Callable[[], Any]] = {}
    # A framework's million objects would make every collection take a good part of a second.
    gc.freeze()
    while True:
        try:
            order = channel.recv()
        except (EOFError, OSError):
            return
        if order["do"] == "stop":
            return
        try:
            if order["do"] == "probe":
                reply = _probe(channel, backend, order)
            elif order["do"] == "warm":
                call = calls[order["method"]] = backend.prepare(order["method"])
                _warm(call, order["calls"], order.get("seconds", 0.0), backend.settled)
                gc.collect()
                gc.freeze()
                reply = {}
            else:
                reply = {"seconds": _time(calls[order["method"]], order["number"])}
        except Exception as exc:
            reply = {"failure": _failure(exc)}
        channel.send(reply)


def _warm(call: Callable[[], Any], calls: int, seconds: float, settled: Callable[[], bool]) -> None:
    """Calls at least so often, and so long; or until it is settled, if that comes before."""
    started, done = time.perf_counter(), 0
    while done < calls or (time.perf_counter() - started < seconds and not settled()):
        call()
        done += 1


def _probe(channel: Channel, backend: Backend, order: dict[str, Any]) -> dict[str, Any]:
    """First call, its result, then (unless slow) a second call with its peak memory."""
    backend.load(order["method"])
    start = time.perf_counter()
    call = backend.prepare(order["method"])
    setup = time.perf_counter() - start
    channel.send({"event": "prepared"})
    first, peak, result = _watched(call)
    _save(Path(order["result"]), backend.matrix(result))
    channel.send({"event": "first", "seconds": first})
    seconds = first
    if first < SECOND_CALL_BELOW or order["repeat"]:
        # The first call also pays for lazy imports and caches; the second is the honest one.
        del result
        seconds, peak, result = _watched(call)
        spent = 0.0
        for _ in range(MORE_CALLS):  # one of them may make a plan: the one after it is honest
            if spent > BRIEF and seconds <= max(first, 0.5):
                break
            del result
            spent += seconds
            seconds, peak, result = _watched(call)
    return {"setup": setup, "first": first, "seconds": seconds, "peak": peak}


def _save(path: Path, matrix: Any) -> None:
    """A dense array as it is; the entries of a large sparse matrix by their places."""
    with path.open("wb") as file:
        if isinstance(matrix, dict):
            np.savez(file, **matrix)
        else:
            np.save(file, matrix)


def _watched(call: Callable[[], Any]) -> tuple[float, int, Any]:
    """Seconds, bytes above the resident memory before the call (at its peak), result."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    before = _status("VmRSS")
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    peak = _status("VmHWM")
    return seconds, max(0, peak - before), result


def _time(call: Callable[[], Any], number: int) -> float:
    """Mean seconds of `number` calls in a row, without the garbage collector's pauses.

    Threads of the method before may spin for a while, and its data is in the caches: short calls
    are timed when these sleep, after some that are not.
    """
    gc.disable()
    try:
        time.sleep(REST)
        for _ in range(number // 4):
            call()
        start = time.perf_counter()
        for _ in range(number):
            call()
        return (time.perf_counter() - start) / number
    finally:
        gc.enable()


def _status(field: str) -> int:
    """A memory figure of this process in bytes; the peak from `getrusage` where /proc is not."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _failure(exc: Exception) -> str:
    """``memory`` for a refused allocation, else what went wrong in a line."""
    text = f"{type(exc).__name__}: {exc}".strip()
    signs = ("can't allocate memory", "out of memory", "Out of memory", "RESOURCE_EXHAUSTED")
    if isinstance(exc, MemoryError) or any(sign in text for sign in signs):
        return "memory"
    return text.splitlines()[0][:200]
