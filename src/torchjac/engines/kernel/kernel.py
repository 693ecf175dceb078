"""A Jacobian as compiled C, called from Python."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchjac._torch.empty import empty
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
from torchjac.engines.kernel.loops import Schedule, each_alone, schedule
from torchjac.engines.kernel.sampled import SampleWriter, over_samples, schedule_of_samples
from torchjac.engines.kernel.source import Source, Writer, source_of
from torchjac.engines.kernel.strip_source import LayerWriter, StripWriter
from torchjac.engines.kernel.threads import Divided
from torchjac.errors import PlanRefused

# What the function is called where nobody asks for another name.
NAME = "torchjac_kernel"
# Statements that a compiler is given.
_MOST = 20_000
# Bytes of memory to work in that are kept from call to call, but for that of one call.
_SPARE = 1 << 26


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
    """

    name: str
    source: Source
    inputs: tuple[tuple[torch.Size, torch.dtype], ...]
    live: tuple[Tensor, ...]
    outputs: tuple[tuple[torch.Size, torch.dtype], ...]
    samples: int | None = None


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
        frozen: Whether parameters stay as they are now.

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
        return _written(recordings, scalars, schedule(scalars), name)
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
        frozen: Whether parameters stay as they are now.

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
    inputs: list[tuple[str, Any]] = [(f"in{i}", v) for i, v in enumerate(recordings[0][0].inputs)]
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
    )


def _numbered(
    inputs: Sequence[tuple[str, Any]], floating: Sequence[tuple[str, str]]
) -> list[tuple[int, str, str]]:
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
        numbers = 0 if program.samples is None else 2
        inputs, outputs = max(len(program.inputs), 1), len(program.outputs)
        text = source.text + entry(program.name, inputs, outputs, numbers)
        library = compiled(text, source.level, limit)
        self._run = entered(library, program.name, inputs + outputs, numbers)
        self._live = program.live
        self._inputs = program.inputs[: len(program.inputs) - len(program.live)]
        self._outputs = tuple((tuple(s), _strides(s), d) for s, d in program.outputs)
        self._scratch = source.scratch
        self._spare: list[Tensor] = []  # memory of earlier calls: new pages cost more than sums
        # Kept: their addresses are in `_table`, whose address is given at every call.
        self._tables = [np.ascontiguousarray(t) for t in source.tables]
        self._table = (ctypes.c_void_p * max(len(self._tables), 1))(
            *[t.ctypes.data for t in self._tables]
        )
        self._where = ctypes.addressof(self._table)
        self._divided = None if program.samples is None else Divided(program.samples)

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
        bare = self._inputs and not (self._live or self._scratch or self._divided)
        if not bare or len(self._outputs) != 1:
            return self._on
        run, where, (about,), address = self._run, self._where, self._outputs, Tensor.data_ptr

        def launched(given: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], bool]:
            made = empty(*about)
            fine = run(*map(address, given), address(made), where, 0)
            return (made,), fine or _finite((made,))

        return launched

    def _on(self, given: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], bool]:
        if self._live:
            given = [*given, *[_dense(x.detach()) for x in self._live]]
        made = [empty(*about) for about in self._outputs]
        arrays = (
            *([x.data_ptr() for x in given] or (0,)),
            *[x.data_ptr() for x in made],
            self._where,
        )
        if self._divided is None:
            fine = self._part(arrays)
        else:
            kept = (given, made)  # alive as long as a thread may run

            def part(first: int, last: int, _kept: Any = kept) -> bool:
                return self._part(arrays, first, last)

            fine = self._divided(part)
        return tuple(made), fine or _finite(made)

    def _part(self, arrays: tuple[int, ...], *turns: int) -> bool:
        """Runs all turns of the loop, or some, in memory of its own."""
        if not self._scratch:
            return self._run(*arrays, 0, *turns)
        scratch = self._workspace()
        fine = self._run(*arrays, scratch.data_ptr(), *turns)
        if len(self._spare) * self._scratch < _SPARE:
            self._spare.append(scratch)
        return fine

    def _workspace(self) -> Tensor:
        """Memory to work in, for one call at a time."""
        try:
            return self._spare.pop()
        except IndexError:
            return torch.empty(self._scratch, dtype=torch.uint8)


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
