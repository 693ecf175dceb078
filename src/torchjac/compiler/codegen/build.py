"""Build the source unit of a program."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchjac._torch.trace.ir import Value
from torchjac._torch.trace.recording import Recording
from torchjac.compiler.codegen.c.batch_loop import SampleWriter
from torchjac.compiler.codegen.c.batch_tensor_loops import LayerWriter, StripWriter
from torchjac.compiler.codegen.c.parallel_loops import PartedWriter, is_for_threads
from torchjac.compiler.codegen.c.writer import Source, Writer, source_of
from torchjac.compiler.codegen.granularity import (
    ScalarProgram,
    expand,
    expand_samples,
    expand_strips,
    multiplies,
    shares_matrices,
)
from torchjac.compiler.codegen.scalar_ir import ArrayRef
from torchjac.compiler.codegen.schedule import (
    LoopProgram,
    each_alone,
    over_samples,
    schedule,
    schedule_of_samples,
)
from torchjac.errors import PlanRefused

# What the function is called where nobody asks for another name.
NAME = "torchjac_kernel"


# Statements that a compiler is given.
_MOST = 20_000


@dataclass(frozen=True, slots=True)
class SourceUnit:
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
) -> SourceUnit:
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
) -> SourceUnit:
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

    def alone() -> SourceUnit:
        scalars = expand_samples(recordings, few, frozen)
        plan = schedule_of_samples(scalars, few)
        return _written(recordings, scalars, plan, name, SampleWriter)

    def in_strips() -> SourceUnit:
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
    scalars: ScalarProgram,
    plan: LoopProgram,
    name: str,
    writing: type[Writer] = Writer,
) -> SourceUnit:
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
    return SourceUnit(
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
