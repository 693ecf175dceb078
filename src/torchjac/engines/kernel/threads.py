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
# Runs by one thread of which the fastest says how long it takes.
_RUNS = 3


class Divided:
    """A loop whose turns may run in any order, in as many threads as torch would use.

    Args:
        count: How many turns there are.
    """

    def __init__(self, count: int):
        """Does not know yet how long it takes."""
        self._count = count
        self._seconds = float("inf")
        self._runs = 0

    def __call__(self, run: Callable[[int, int], int]) -> bool:
        """Runs all turns; whether every part said yes.

        Args:
            run: Takes the first turn, and the one after the last.
        """
        if self._runs < _RUNS:
            started = perf_counter()
            fine = run(0, self._count)
            self._seconds = min(self._seconds, perf_counter() - started)
            self._runs += 1
            return bool(fine)
        most = min(int(self._seconds / _SHARE), self._count)
        parts = min(torch.get_num_threads(), most) if most > 1 else 1
        if parts < 2:
            return bool(run(0, self._count))
        cuts = [self._count * k // parts for k in range(parts + 1)]
        try:
            others = [_pool().submit(run, a, b) for a, b in pairwise(cuts[1:])]
        except RuntimeError:  # the interpreter ends: no more threads; what was begun may run twice
            return bool(run(0, self._count))
        fine = run(0, cuts[1])
        return all([bool(fine), *[bool(other.result()) for other in others]])


_pools: list[ThreadPoolExecutor] = []


def _pool() -> ThreadPoolExecutor:
    """The threads of this process: they do not survive in one that is forked."""
    if not _pools:
        _pools.append(ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="torchjac"))
    return _pools[0]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)
