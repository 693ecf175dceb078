"""A Jacobian as compiled code, called from Python."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from operator import attrgetter
from threading import get_ident

import numpy as np
import torch
from torch import Tensor

from torchjac._torch.storage import allocator
from torchjac.compiler.codegen.target import LIMIT, SourceUnit
from torchjac.host.clock import now
from torchjac.host.contest import Contest, Rules

# Bytes of memory to work in that are kept from call to call, but for that of one call.
_SPARE = 1 << 26
# Threads that may share a loop.
_THREADS = 256


class Executable:
    """A compiled program: takes tensors and gives tensors.

    Calls may run at the same time; the interpreter's lock is released while they run.

    Args:
        program: What to compile.
        limit: Seconds that the compiler may take.

    Raises:
        PlanRefused: It cannot be compiled.
    """

    def __init__(self, program: SourceUnit, limit: float = LIMIT):
        """Compiles it."""
        source, target, samples = program.source, program.target, program.samples
        self.source = source
        # Bytes of scratch memory: for each thread of a batch, else for all threads together.
        scratch = source.scratch_of_thread
        self._thread_scratch = scratch if samples is not None else 0
        self._shared_scratch = scratch if samples is None else 0
        self._run = target.entry(target.compile(program, limit), program)
        # `x.is_cpu` takes 45 ns, `x.device.type` 250 ns.
        self._is_here: Callable[[Tensor], bool] = attrgetter(f"is_{target.limits.device}")
        self._live = program.live
        self._inputs = program.inputs[: len(program.inputs) - len(program.live)]
        self._outputs = tuple((tuple(s), _strides(s), d) for s, d in program.outputs)
        self._spare: list[Tensor] = []  # memory of earlier calls: new pages cost more than sums
        # Kept: their addresses are in `_table`, whose address is given at every call.
        self._tables = [np.ascontiguousarray(t) for t in source.tables]
        self._table = (ctypes.c_void_p * max(len(self._tables), 1))(
            *[t.ctypes.data for t in self._tables]
        )
        self._where = ctypes.addressof(self._table)
        self._threads = Threads(samples or _THREADS) if program.is_shared else None
        self._turns = samples or 0
        self._device = target.limits.device
        self._allocate = allocator(self._device)

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """The outputs at these inputs; None where they are not all finite.

        Raises:
            ValueError: An input has another shape, dtype or device than the program is for.
        """
        made, fine = self.run(inputs)
        return made if fine else None

    def run(self, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], bool]:
        """The outputs at these inputs, and whether all that vary are finite.

        Raises:
            ValueError: An input has another shape, dtype or device than the program is for.
        """
        given = [
            _suited(x, shape, dtype, self._is_here)
            for x, (shape, dtype) in zip(inputs, self._inputs, strict=True)
        ]
        return self._on(given)

    def launcher(self) -> Callable[[Sequence[Tensor]], tuple[tuple[Tensor, ...], bool]]:
        """What `run` does for inputs that are known to be as the program reads them."""
        bare = self._inputs and not (self._live or self.source.scratch or self._threads)
        if not bare or len(self._outputs) != 1:
            return self._on
        run, where, (about,), address = self._run, self._where, self._outputs, Tensor.data_ptr

        def launched(given: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], bool]:
            made = self._allocate(*about)
            fine = run(*map(address, given), address(made), where, 0)
            return (made,), fine or _finite((made,))

        return launched

    def _on(self, given: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], bool]:
        if self._live:
            given = [*given, *[_dense(x.detach()) for x in self._live]]
        made = [self._allocate(*about) for about in self._outputs]
        arrays = (
            *([x.data_ptr() for x in given] or (0,)),
            *[x.data_ptr() for x in made],
            self._where,
        )
        if self._threads is None:
            fine = self._with_memory(arrays, 1)
        else:
            fine = self._threads(lambda n: self._with_memory(arrays, n, self._turns, n))
        return tuple(made), fine or _finite(made)

    def _with_memory(self, arrays: tuple[int, ...], threads: int, *numbers: int) -> bool:
        """Runs it in memory to work in, which it has for itself."""
        size = self._shared_scratch + self._thread_scratch * threads
        if not size:
            return self._run(*arrays, 0, *numbers)
        scratch = self._workspace(size)
        fine = self._run(*arrays, scratch.data_ptr(), *numbers)
        if (len(self._spare) + 1) * size <= max(_SPARE, size):
            self._spare.append(scratch)
        return fine

    def _workspace(self, size: int) -> Tensor:
        """Memory to work in, for one call at a time."""
        with suppress(IndexError):
            found = self._spare.pop()
            if found.numel() >= size:
                return found
        return torch.empty(size, dtype=torch.uint8, device=self._device)


def _strides(shape: torch.Size) -> tuple[int, ...]:
    """Of a dense tensor."""
    return tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))


def _finite(made: Sequence[Tensor]) -> bool:
    """Whether all is finite; its sum need not be."""
    return all(bool(x.isfinite().all()) for x in made)


def _dense(x: Tensor) -> Tensor:
    """The same numbers in memory, in order: not negated, nor zeros that are nowhere."""
    x = x.resolve_neg().contiguous()
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device) if x._is_zerotensor() else x


def _suited(
    x: Tensor, shape: torch.Size, dtype: torch.dtype, is_here: Callable[[Tensor], bool]
) -> Tensor:
    """The same numbers as the program reads them: dense, in order."""
    if x.shape != shape or x.dtype is not dtype or not is_here(x):
        raise ValueError(
            f"torchjac: a kernel for {tuple(shape)}, {dtype} was given {tuple(x.shape)}, "
            f"{x.dtype} on {x.device}."
        )
    return _dense(x)


# Seconds of work that are worth a thread: to wake one up takes about a fifth of that.
_SHARE = 25e-6
# Timed runs by one thread; the best one counts.
_SERIAL = 3
# Timed runs by several threads; the best one must be faster than that of one thread.
_SHARED = 5
# Runs by one thread after several threads lost; twice as many each time.
_REST = 25
# Such runs, at most.
_LONGEST = 400


class Threads:
    """How many threads run a kernel: as many as torch would use, where that turns out faster.

    Args:
        most: How many there may be.
    """

    def __init__(self, most: int):
        """Times one thread first."""
        self._most = most
        self._rest = _REST
        self._serial = 0.0  # seconds of the best run by one thread
        self._contest: Contest[int] = Contest({1: 0.0}, Rules(_SERIAL))
        self._threads, self._left = 1, _SERIAL

    def __call__(self, run: Callable[[int], bool]) -> bool:
        """Runs a kernel; returns what it returns.

        Args:
            run: Takes the number of threads.
        """
        if _stale and get_ident() in _stale:
            return run(1)
        if self._left <= 0:  # several Python threads may count at once
            threads = self._worth()
            if threads < 2:  # little work: nothing is to be timed
                return run(1)
            self._begin(threads, _SHARED)
        threads = self._threads
        started = now()
        fine = run(threads)
        self._contest = self._contest.timed(threads, now() - started)
        self._left -= 1
        if self._left <= 0:  # several Python threads may count at once
            self._decide()
        return fine

    def _begin(self, threads: int, runs: int) -> None:
        """Times some runs: of one thread, or of several against the best run of one."""
        self._threads, self._left = threads, runs
        candidates, timings = {1: 0.0, threads: 0.0}, {1: (self._serial,)}
        self._contest = Contest(candidates, Rules(runs), timings=timings if threads > 1 else {})

    def _worth(self) -> int:
        """The number of threads that the work is worth, of those that torch would use."""
        worth = int(min(self._serial / _SHARE, self._most))
        return min(torch.get_num_threads(), worth) if worth > 1 else 1

    def _decide(self) -> None:
        """Goes back to one thread for a while where others have something else to do."""
        if self._threads == 1:
            self._serial = self._contest.fastest()
        elif self._contest.winner() != 1:
            self._rest = _REST
        else:
            self._begin(1, self._rest)
            self._rest = min(2 * self._rest, _LONGEST)


# The thread that a forked process began with: OpenMP takes it to have the threads that it had
# before, and would wait for them forever. Others begin with none.
_stale: set[int] = set()


def _in_child() -> None:
    _stale.clear()
    _stale.add(get_ident())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
