"""Samples divided among threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from time import perf_counter

import torch

# Seconds of work that are worth a thread: to wake one up takes about a tenth of that.
_SHARE = 200e-6
# Runs by one thread of which the fastest says how long it takes; and by several threads, of which
# the fastest must be faster, or there are that many more by one thread before they are tried again.
_RUNS, _TRIED, _REST = 3, 5, 200


class Divided:
    """A loop whose turns may run in any order, in as many threads as torch would use.

    Args:
        count: How many turns there are.
    """

    def __init__(self, count: int):
        """Does not know yet how long it takes."""
        self._count = count
        self._seconds = float("inf")
        self._divided = float("inf")
        self._tried = 0
        self._rest = _RUNS

    def __call__(self, run: Callable[[int, int], bool]) -> bool:
        """Runs all turns; whether every part said yes.

        Args:
            run: Takes the first turn, and the one after the last.
        """
        started = perf_counter()
        if self._rest > 0:
            self._rest -= 1
            fine = run(0, self._count)
            self._seconds = min(self._seconds, perf_counter() - started)
            return fine
        most = int(min(self._seconds / _SHARE, self._count))
        parts = min(torch.get_num_threads(), most) if most > 1 else 1
        if parts < 2:
            return run(0, self._count)
        fine = self._in_parts(run, [self._count * k // parts for k in range(parts + 1)])
        self._compare(perf_counter() - started)
        return fine

    def _in_parts(self, run: Callable[[int, int], bool], cuts: list[int]) -> bool:
        try:
            others = [_pool().submit(run, a, b) for a, b in pairwise(cuts[1:])]
        except RuntimeError:  # the interpreter ends: no more threads; what was begun may run twice
            return run(0, self._count)
        fine = run(0, cuts[1])
        return all([fine, *[other.result() for other in others]])

    def _compare(self, seconds: float) -> None:
        """Goes back to one thread for a while where others have something else to do."""
        self._divided = min(self._divided, seconds)
        self._tried += 1
        if self._tried < _TRIED:
            return
        if self._divided >= self._seconds:
            self._rest, self._seconds = _REST, float("inf")
        self._tried, self._divided = 0, float("inf")


_pools: list[ThreadPoolExecutor] = []


def _pool() -> ThreadPoolExecutor:
    """The threads of this process: they do not survive in one that is forked."""
    if not _pools:
        _pools.append(ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="torchjac"))
    return _pools[0]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)
