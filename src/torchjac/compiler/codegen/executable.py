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
from torchjac.compiler.codegen.target import COMPILE_SECONDS, SourceUnit
from torchjac.host.clock import now
from torchjac.host.contest import Contest, Rules
from torchjac.host.costs import threads_worth

_SPARE = 1 << 26  # bytes of scratch memory left for later calls, or that of one call
_THREADS = 256  # threads of one loop, at most


class Executable:
    """A compiled program: takes tensors and returns tensors.

    Calls may run at the same time; a running call releases the interpreter's lock.

    Args:
        program: The source unit.
        limit: Seconds that compiling may take.

    Raises:
        PlanRefused: The unit cannot be compiled.
    """

    def __init__(self, program: SourceUnit, limit: float = COMPILE_SECONDS):
        """Compiles the unit."""
        source, target, samples = program.source, program.target, program.samples
        self.source = source
        # Bytes of scratch memory: for each thread of a batch, else for all threads together.
        scratch = source.thread_scratch
        self._thread_scratch = scratch if samples is not None else 0
        self._shared_scratch = scratch if samples is None else 0
        self._run = target.entry(target.compile(program, limit), program)
        # `x.is_cpu` takes 45 ns, `x.device.type` 250 ns.
        self._is_here: Callable[[Tensor], bool] = attrgetter(f"is_{target.limits.device}")
        self._live = program.live
        self._inputs = program.inputs[: len(program.inputs) - len(program.live)]
        self._outputs = tuple((tuple(s), _strides(s), d) for s, d in program.outputs)
        self._spare: list[Tensor] = []  # scratch of earlier calls: fresh pages cost more than sums
        # Owned here: `_table` holds their addresses, and each call passes the address of `_table`.
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
        """The outputs at some inputs; None where they are not all finite.

        Raises:
            ValueError: An input has another shape, dtype or device than the program.
        """
        results, fine = self.run(inputs)
        return results if fine else None

    def run(self, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], bool]:
        """The outputs at some inputs, and whether all values that vary are finite.

        Raises:
            ValueError: An input has another shape, dtype or device than the program.
        """
        tensors = [
            _suited(x, shape, dtype, self._is_here)
            for x, (shape, dtype) in zip(inputs, self._inputs, strict=True)
        ]
        return self._on(tensors)

    def launcher(self) -> Callable[[Sequence[Tensor]], tuple[tuple[Tensor, ...], bool]]:
        """A function that does the same as `run`, for inputs that need no check and no copy."""
        bare = self._inputs and not (self._live or self.source.scratch or self._threads)
        if not bare or len(self._outputs) != 1:
            return self._on
        run, where, (spec,), address = self._run, self._where, self._outputs, Tensor.data_ptr

        def launched(tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], bool]:
            results = self._allocate(*spec)
            fine = run(*map(address, tensors), address(results), where, 0)
            return (results,), fine or _finite((results,))

        return launched

    def _on(self, tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], bool]:
        if self._live:
            tensors = [*tensors, *[_dense(x.detach()) for x in self._live]]
        results = [self._allocate(*spec) for spec in self._outputs]
        arrays = (
            *([x.data_ptr() for x in tensors] or (0,)),
            *[x.data_ptr() for x in results],
            self._where,
        )
        if self._threads is None:
            fine = self._with_memory(arrays, 1)
        else:
            fine = self._threads(lambda n: self._with_memory(arrays, n, self._turns, n))
        return tuple(results), fine or _finite(results)

    def _with_memory(self, arrays: tuple[int, ...], threads: int, *numbers: int) -> bool:
        """Runs the program with scratch memory of its own."""
        size = self._shared_scratch + self._thread_scratch * threads
        if not size:
            return self._run(*arrays, 0, *numbers)
        scratch = self._workspace(size)
        fine = self._run(*arrays, scratch.data_ptr(), *numbers)
        if (len(self._spare) + 1) * size <= max(_SPARE, size):
            self._spare.append(scratch)
        return fine

    def _workspace(self, size: int) -> Tensor:
        """Scratch memory for one call at a time."""
        with suppress(IndexError):
            spare = self._spare.pop()
            if spare.numel() >= size:
                return spare
        return torch.empty(size, dtype=torch.uint8, device=self._device)


def _strides(shape: torch.Size) -> tuple[int, ...]:
    """The strides of a dense tensor."""
    return tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))


def _finite(results: Sequence[Tensor]) -> bool:
    """Whether all elements are finite; a sum of finite elements may overflow."""
    return all(bool(x.isfinite().all()) for x in results)


def _dense(x: Tensor) -> Tensor:
    """The numbers of a tensor in row-major memory, without lazy negation or lazy zeros."""
    x = x.resolve_neg().contiguous()
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device) if x._is_zerotensor() else x


def _suited(
    x: Tensor, shape: torch.Size, dtype: torch.dtype, is_here: Callable[[Tensor], bool]
) -> Tensor:
    """The numbers of an input in row-major memory.

    Raises:
        ValueError: The input has another shape, dtype or device.
    """
    if x.shape != shape or x.dtype is not dtype or not is_here(x):
        raise ValueError(
            f"torchjac: a kernel for {tuple(shape)}, {dtype} was given {tuple(x.shape)}, "
            f"{x.dtype} on {x.device}."
        )
    return _dense(x)


_SERIAL = 3  # timed runs of one thread; the best run counts
_SHARED = 5  # timed runs of several threads; the best run must beat one thread
_REST = 25  # runs of one thread after several threads lost; doubled after each loss
_LONGEST = 400  # runs of one thread between two trials, at most


class Threads:
    """The number of threads of a kernel: as many as torch would use, where that is faster.

    Args:
        most: The number of threads that is allowed.
    """

    def __init__(self, most: int):
        """Times one thread first."""
        self._most = most
        self._rest = _REST
        self._serial = 0.0  # best time of one thread, in seconds
        self._contest: Contest[int] = Contest({1: 0.0}, Rules(_SERIAL))
        self._threads, self._left = 1, _SERIAL

    def __call__(self, run: Callable[[int], bool]) -> bool:
        """Runs a kernel; returns the kernel's result.

        Args:
            run: Takes the number of threads.
        """
        if _stale and get_ident() in _stale:
            return run(1)
        if self._left <= 0:  # several Python threads may count at once
            threads = self._worth()
            if threads < 2:  # little work: no trial
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
        """Begins a trial: of one thread, or of several threads against the best time of one."""
        self._threads, self._left = threads, runs
        candidates, timings = {1: 0.0, threads: 0.0}, {1: (self._serial,)}
        self._contest = Contest(candidates, Rules(runs), timings=timings if threads > 1 else {})

    def _worth(self) -> int:
        """The number of threads that the work is worth, at most torch's own."""
        worth = threads_worth(self._serial, self._most)
        return min(torch.get_num_threads(), worth) if worth > 1 else 1

    def _decide(self) -> None:
        """Returns to one thread for a while where other processes use the cores."""
        if self._threads == 1:
            self._serial = self._contest.fastest()
        elif self._contest.winner() != 1:
            self._rest = _REST
        else:
            self._begin(1, self._rest)
            self._rest = min(2 * self._rest, _LONGEST)


# The first thread of a forked process: OpenMP counts on threads that exist in the parent only, and
# would wait for them forever. Later threads begin with none.
_stale: set[int] = set()


def _in_child() -> None:
    _stale.clear()
    _stale.add(get_ident())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
