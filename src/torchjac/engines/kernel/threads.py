"""Kernels in several threads: the text that starts them, and how many there are.

Threads are those of OpenMP, which torch has started already: it ships the same library, and its
threads wait for either.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from threading import get_ident

import torch

from torchjac.host.clock import now

# Seconds of work that are worth a thread: to wake one up takes about a fifth of that.
_SHARE = 25e-6
# Runs by one thread of which the fastest says how long it takes, and by several threads, of which
# the fastest must be faster.
_RUNS, _TRIED = 3, 5
# Or there are so many more by one thread before others are tried again, twice as many each time.
_REST, _LONGEST = 25, 400
# Samples that stay together: a strip of them is computed at once.
_STRIP = 16


def shared(name: str, samples: bool, scratch: int) -> str:
    """C text of a function that runs another one in threads, each of which has a part of the work.

    It takes what the other one takes up to the memory to work in, then how many turns there are,
    and how many threads.

    Args:
        name: Of the other function.
        samples: Whether that takes the first of its samples, and the one after the last, and needs
            memory of its own; else it takes the number of the part, and how many there are.
        scratch: Bytes of that memory.
    """
    sample = [f"torchjac_sample(turns, {p}, parts)" for p in ("part", "part + 1")]
    part = ", ".join(sample) if samples else "part, parts"
    memory = f"(char *)scratch + part * {scratch}" if samples else "scratch"
    return f"""
{cut("torchjac_sample", _STRIP) if samples else ""}
#ifdef _OPENMP
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);
#endif
int {name}_shared(const void *const *in, const void *const *table, void *const *out, void *scratch,
  long turns, long threads)
{{
  (void)turns; (void)threads;
#ifdef _OPENMP
  if (threads > 1)
  {{
    int fine = 1;
#pragma omp parallel num_threads(threads) reduction(&& : fine)
    {{
      const long part = omp_get_thread_num(), parts = omp_get_num_threads();
      fine = {name}(in, table, out, {memory}, {part}) && fine;
    }}
    return fine;
  }}
#endif
  return {name}(in, table, out, scratch, 0, {"turns" if samples else "1"});
}}
"""


def cut(name: str, together: int) -> str:
    """C text of a function that says where a part of a loop begins: the number of a turn.

    Args:
        name: Of the function: of how many turns there are, the part, and how many parts.
        together: Turns that stay together; a power of two.
    """
    return f"""static inline long {name}(long turns, long part, long parts)
{{
  return part < parts ? turns * part / parts & ~{together - 1}L : turns;
}}"""


class Threads:
    """How many threads run a kernel: as many as torch would use, where that turns out faster.

    Args:
        most: How many there may be.
    """

    def __init__(self, most: int):
        """Does not know yet how long it takes."""
        self._most = most
        self._seconds = float("inf")
        self._shared = float("inf")
        self._tried = 0
        self._rest, self._next = _RUNS, _REST

    def __call__(self, run: Callable[[int], bool]) -> bool:
        """Runs it; what it says.

        Args:
            run: Takes the number of threads.
        """
        started = now()
        if self._rest > 0:
            self._rest -= 1
            fine = run(1)
            self._seconds = min(self._seconds, now() - started)
            return fine
        worth = int(min(self._seconds / _SHARE, self._most))
        threads = min(torch.get_num_threads(), worth) if worth > 1 else 1
        if threads < 2 or get_ident() in _stale:
            return run(1)
        fine = run(threads)
        self._compare(now() - started)
        return fine

    def _compare(self, seconds: float) -> None:
        """Goes back to one thread for a while where others have something else to do."""
        self._shared = min(self._shared, seconds)
        self._tried += 1
        if self._tried < _TRIED:
            return
        if self._shared < self._seconds:
            self._next = _REST
        else:
            self._rest, self._seconds = self._next, float("inf")
            self._next = min(2 * self._next, _LONGEST)
        self._tried, self._shared = 0, float("inf")


# The thread that a forked process began with: OpenMP takes it to have the threads that it had
# before, and would wait for them forever. Others begin with none.
_stale: set[int] = set()


def _in_child() -> None:
    _stale.clear()
    _stale.add(get_ident())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
