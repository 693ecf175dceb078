"""A Jacobian as compiled C, called from Python."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchjac._torch.empty import allocator
from torchjac._torch.notes import Value
from torchjac._torch.recording import Recording
from torchjac.engines.kernel.compiler import LIMIT, compiled
from torchjac.engines.kernel.entry import entered, entry
from torchjac.engines.kernel.expand import (
    Scalars,
    expand,
    expand_samples,
    expand_strips,
    multiplies,
    shares_matrices,
)
from torchjac.engines.kernel.expressions import ArrayRef
from torchjac.engines.kernel.loops import Schedule, each_alone, schedule
from torchjac.engines.kernel.parted import PartedWriter, is_for_threads
from torchjac.engines.kernel.sampled import SampleWriter, over_samples, schedule_of_samples
from torchjac.engines.kernel.source import Source, Writer, source_of
from torchjac.engines.kernel.strip_source import LayerWriter, StripWriter
from torchjac.engines.kernel.threads import Threads, shared
from torchjac.errors import PlanRefused

# What the function is called where nobody asks for another name.
NAME = "torchjac_kernel"
# Statements that a compiler is given.
_MOST = 20_000
# Bytes of memory to work in that are kept from call to call, but for that of one call.
_SPARE = 1 << 26
# Threads that may share a loop.
_THREADS = 256


@dataclass(frozen=True, slots=True)
class Written:
    """A program written down in C.

    Attributes:
        name: Of the function.
        source: The text, and what it reads.
        inputs: Shape and dtype of every input; of live tensors too.
        live: Tensors from elsewhere that are read anew at every call.
        outputs: Shape and dtype of every output.
        samples: How many samples there are, where each turn of its loop is one.
        parted: Whether several calls can run a part each.
    """

    name: str
    source: Source
    inputs: tuple[tuple[torch.Size, torch.dtype], ...]
    live: tuple[Tensor, ...]
    outputs: tuple[tuple[torch.Size, torch.dtype], ...]
    samples: int | None = None
    parted: bool = False


def written(
    recordings: Sequence[tuple[Recording, int]],
    samples: int | None,
    name: str = NAME,
    frozen: bool = False,
) -> Written:
    """The first outputs of recordings as a function in C.

    Args:
        recordings: Operations on the same inputs, and how many of their outputs are wanted.
        samples: The leading size of tensors that hold independent samples, if there are such.
        name: Of the function.
        frozen: Whether it is to stand alone: parameters stay as they are now, one thread runs it.

    Raises:
        PlanRefused: It runs operations that have no scalar form, or gets too long.
    """
    recordings = _of_floats(recordings)
    reasons = []
    if multiplies(recordings):
        try:
            scalars = expand_strips(recordings, 0, frozen)
            return _written(recordings, scalars, each_alone(scalars), name, LayerWriter)
        except PlanRefused as refusal:
            reasons.append(str(refusal))
    try:
        scalars = expand(recordings, samples, frozen)
        plan = schedule(scalars)
        writing = PartedWriter if is_for_threads(plan) and not frozen else Writer
        return _written(recordings, scalars, plan, name, writing)
    except PlanRefused as refusal:
        raise PlanRefused("; ".join([*reasons, str(refusal)])) from None


def written_for_samples(
    recordings: Sequence[tuple[Recording, int]],
    few: int,
    many: int,
    name: str = NAME,
    frozen: bool = False,
) -> Written:
    """The same for any number of samples, from what is recorded with a few.

    Args:
        recordings: As for `written`; a leading axis of size `few` is that of samples.
        few: How many samples they have.
        many: How many the function is called with.
        name: Of the function.
        frozen: Whether it is to stand alone: parameters stay as they are now, one thread runs it.

    Raises:
        PlanRefused: As for `written`, or samples are not computed one by one.
    """
    recordings = _of_floats(recordings)

    def alone() -> Written:
        scalars = expand_samples(recordings, few, frozen)
        plan = schedule_of_samples(scalars, few)
        return _written(recordings, scalars, plan, name, SampleWriter)

    def in_strips() -> Written:
        scalars = expand_strips(recordings, few, frozen)
        return _written(recordings, scalars, over_samples(scalars, few), name, StripWriter)

    if shares_matrices(recordings, few):
        made = in_strips()
    else:
        try:
            made = alone()
        except PlanRefused as refusal:  # it is too long
            try:
                made = in_strips()
            except PlanRefused as other:
                raise PlanRefused(f"{refusal}; in strips: {other}") from None

    def whole(shape: torch.Size) -> torch.Size:
        return torch.Size((many, *shape[1:])) if shape and shape[0] == few else shape

    given = len(made.inputs) - len(made.live)
    inputs = [(whole(s), d) for s, d in made.inputs[:given]]
    work, seconds = made.source.work // few, made.source.seconds * many / few
    source = replace(made.source, work=work, seconds=seconds)
    return replace(
        made,
        source=source,
        inputs=(*inputs, *made.inputs[given:]),
        outputs=tuple((whole(s), d) for s, d in made.outputs),
        samples=many,
    )


def _of_floats(recordings: Sequence[tuple[Recording, int]]) -> Sequence[tuple[Recording, int]]:
    """The recordings.

    Raises:
        PlanRefused: They give something that is neither float64 nor float32.
    """
    if not all(v.dtype in (torch.float64, torch.float32) for v in _results(recordings)):
        raise PlanRefused("it is neither float64 nor float32")
    return recordings


def _results(recordings: Sequence[tuple[Recording, int]]) -> list[Value]:
    return [v for r, count in recordings for v in r.outputs[:count] if v is not None]


def _written(
    recordings: Sequence[tuple[Recording, int]],
    scalars: Scalars,
    plan: Schedule,
    name: str,
    writing: type[Writer] = Writer,
) -> Written:
    results = _results(recordings)
    inputs: list[tuple[ArrayRef, Any]] = [
        (ArrayRef("in", i), v) for i, v in enumerate(recordings[0][0].inputs)
    ]
    inputs += scalars.live.items()
    floating = [(n, _name(v.dtype)) for n, v in inputs if v.dtype.is_floating_point]
    sizes = [(_name(v.dtype), math.prod(v.shape)) for v in results]
    numbered = _numbered(inputs, floating)
    source = source_of(scalars, plan, numbered, sizes, name, writing)
    if source.statements > _MOST:
        raise PlanRefused(f"{source.statements} statements in C")
    return Written(
        name,
        source,
        tuple((v.shape, v.dtype) for _, v in inputs),
        tuple(scalars.live.values()),
        tuple((v.shape, v.dtype) for v in results),
        parted=issubclass(writing, PartedWriter),
    )


def _numbered(
    inputs: Sequence[tuple[ArrayRef, Any]], floating: Sequence[tuple[ArrayRef, str]]
) -> list[tuple[int, ArrayRef, str]]:
    known = dict(floating)
    return [(i, n, known[n]) for i, (n, _) in enumerate(inputs) if n in known]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Kernel:
    """A compiled program: takes tensors and gives tensors.

    Calls may run at the same time; the interpreter's lock is released while they run.

    Args:
        program: What to compile.
        limit: Seconds that the compiler may take.

    Raises:
        PlanRefused: It cannot be compiled.
    """

    def __init__(self, program: Written, limit: float = LIMIT):
        """Compiles it."""
        source = program.source
        self.source = source
        self._scratch = -(-source.scratch // 64) * 64  # of each thread; aligned
        samples, name, text, numbers = program.samples, program.name, source.text, 0
        if samples is not None or program.parted:
            text += shared(name, samples is not None, self._scratch)
            name, numbers = f"{name}_shared", 2
        inputs, outputs = max(len(program.inputs), 1), len(program.outputs)
        text += entry(name, inputs, outputs, numbers)
        library = compiled(text, source.level, limit)
        self._run = entered(library, name, inputs + outputs, numbers)
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
        self._threads = Threads(samples or _THREADS) if numbers else None
        self._turns = samples or 0
        self._allocate = allocator()
        self._apart = samples is not None  # threads have memory of their own to work in

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
            _suited(x, shape, dtype) for x, (shape, dtype) in zip(inputs, self._inputs, strict=True)
        ]
        return self._on(given)

    def launcher(self) -> Callable[[Sequence[Tensor]], tuple[tuple[Tensor, ...], bool]]:
        """What `run` does for inputs that are known to be as the program reads them."""
        bare = self._inputs and not (self._live or self._scratch or self._threads)
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
        if not self._scratch:
            return self._run(*arrays, 0, *numbers)
        size = self._scratch * (threads if self._apart else 1)
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
        return torch.empty(size, dtype=torch.uint8)


def _strides(shape: torch.Size) -> tuple[int, ...]:
    """Of a dense tensor."""
    return tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))


def _finite(made: Sequence[Tensor]) -> bool:
    """Whether all is finite; its sum need not be."""
    return all(bool(x.isfinite().all()) for x in made)


def _dense(x: Tensor) -> Tensor:
    """The same numbers in memory, in order: not negated, nor zeros that are nowhere."""
    x = x.resolve_neg().contiguous()
    return torch.zeros(x.shape, dtype=x.dtype) if x._is_zerotensor() else x


def _suited(x: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The same numbers as the program reads them: dense, in order."""
    if x.shape != shape or x.dtype is not dtype or not x.is_cpu:
        raise ValueError(
            f"torchjac: a kernel for {tuple(shape)}, {dtype} was given {tuple(x.shape)}, "
            f"{x.dtype} on {x.device}."
        )
    return _dense(x)
