"""A second target, without C: NumPy interprets loop programs. It is an oracle of the first one.

A program for samples is run for a few at a time. Parallel loops of one level are run in reverse.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import scipy.special

from torchjac.compiler.codegen.granularity import ScalarProgram
from torchjac.compiler.codegen.scalar_ir import (
    SCALAR,
    ArrayRef,
    Indices,
    load_of,
    matmul_sizes_of,
    segments_of,
)
from torchjac.compiler.codegen.scalar_ops import DTYPES
from torchjac.compiler.codegen.schedule import Loop, LoopProgram, ScheduleKind
from torchjac.compiler.codegen.target import Launch, Limits, Signature, Source, SourceUnit
from torchjac.host.costs import ScalarWork

_Arrays = list[np.ndarray]
_BATCHES = (ScheduleKind.BATCH, ScheduleKind.BATCH_TENSORS)
# The name in NumPy, where it is another one.
_NAMES = (
    "sub:subtract mul:multiply div:divide neg:negative asin:arcsin acos:arccos atan:arctan"
    " asinh:arcsinh acosh:arccosh atanh:arctanh atan2:arctan2 pow:power round:rint lt:less"
    " le:less_equal gt:greater ge:greater_equal eq:equal ne:not_equal and:logical_and"
    " or:logical_or xor:logical_xor not:logical_not cast:asarray"
)
_SAME = (
    "add exp exp2 expm1 log log2 log10 log1p sin cos tan sinh cosh tanh sqrt square abs floor ceil"
    " trunc sign reciprocal hypot copysign fmod fmax fmin maximum minimum isnan isinf where"
)
_OPERATIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(np, name) for name in _SAME.split()},
    **{a: getattr(np, b) for a, b in (pair.split(":") for pair in _NAMES.split())},
    **{name: getattr(scipy.special, name) for name in ("erf", "erfc", "digamma")},
    "lgamma": scipy.special.gammaln,
    "trigamma": lambda x: scipy.special.polygamma(1, x),
    "truth": lambda x: x != 0,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "cube": lambda x: x * x * x,
    "frac": lambda x: x - np.trunc(x),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


@dataclass(frozen=True)
class NumpySource(Source):
    """A program to interpret."""

    scalars: ScalarProgram
    program: LoopProgram
    signature: Signature


class NumpyTarget:
    """Interprets loop programs of every kind."""

    limits = Limits("NumPy", "cpu", DTYPES, frozenset(_OPERATIONS), frozenset(ScheduleKind), 10**6)

    def render(self, scalars: ScalarProgram, program: LoopProgram, signature: Signature) -> Source:
        work = ScalarWork(sum(loop.size * len(loop.stores) for loop in program.loops), 0)
        return NumpySource((), 0, len(scalars.expressions.all), work, scalars, program, signature)

    def compile(self, unit: SourceUnit, limit: float) -> NumpySource:
        assert isinstance(unit.source, NumpySource)
        return unit.source

    def entry(self, library: NumpySource, unit: SourceUnit) -> Launch:
        count = max(len(unit.inputs), 1)

        def launch(*addresses: int) -> bool:
            inputs = [_memory(a, *about) for a, about in zip(addresses, unit.inputs, strict=False)]
            # Addresses of tables follow those of outputs.
            output_buffers = zip(addresses[count:], unit.outputs, strict=False)
            outputs = [_memory(a, *about) for a, about in output_buffers]
            with np.errstate(all="ignore"):
                for reads, writes in _parts(library, unit.samples, inputs, outputs):
                    _Run(library, reads, writes).run()
            return all(bool(np.isfinite(x).all()) for x in outputs)

        return launch


def _memory(address: int, shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Memory as an array of one axis."""
    of, size = np.dtype(str(dtype).removeprefix("torch.")), math.prod(shape)
    memory = (ctypes.c_char * (size * of.itemsize)).from_address(address) if size else b""
    return np.frombuffer(memory, of)


def _parts(
    source: NumpySource, samples: int | None, inputs: _Arrays, outputs: _Arrays
) -> Iterator[tuple[_Arrays, _Arrays]]:
    """The arrays of each run: of a few samples, the last ones being there again and again."""
    if source.program.kind not in _BATCHES or samples is None:
        yield inputs, outputs
        return
    few, sampled = source.program.loops[0].size, source.scalars.batched_inputs
    for first in range(0, samples, few):
        rows = np.minimum(np.arange(first, first + few), samples - 1)
        reads = [
            x.reshape(samples, -1)[rows].reshape(-1) if ArrayRef("in", i) in sampled else x
            for i, x in enumerate(inputs)
        ]
        rowed = [x.reshape(samples, -1) for x in outputs]
        writes = [np.full(few * x.shape[1], np.nan, x.dtype) for x in rowed]
        yield reads, writes
        for whole, part in zip(rowed, writes, strict=True):
            whole[rows] = part.reshape(few, -1)


class _Run:
    """One run of a program."""

    def __init__(self, source: NumpySource, inputs: _Arrays, outputs: _Arrays):
        self._program = source.program
        self._all = source.scalars.expressions.all
        self._buffers = {n: array for n, (array, _) in source.program.buffers.items()}
        self._arrays = {array: inputs[i] for i, array, _ in source.signature.inputs}
        self._arrays |= {a: t.reshape(-1).numpy() for a, t in source.scalars.tables.items()}
        self._arrays |= {ArrayRef("out", i): x for i, x in enumerate(outputs)}
        for number, (array, size) in source.program.buffers.items():  # what nobody wrote is seen
            self._arrays[array] = np.full(size, np.nan, self._all[number].dtype)

    def run(self) -> None:
        for i, (places, values) in enumerate(self._program.fixed):
            out = self._arrays[ArrayRef("out", i)]
            if self._program.kind in _BATCHES:
                out.reshape(-1, max(len(values), 1))[:] = values if len(values) else 0
            else:
                out[:] = 0
                out[places] = values
        for number, array, positions in self._program.scalar_stores:
            self._arrays[array][positions] = self._values(number, np.zeros(1, np.int64), {})
        for _, level in groupby(self._program.loops, lambda loop: loop.level):
            loops = list(level)
            for loop in loops[::-1] if self._program.kind is ScheduleKind.PARALLEL else loops:
                self._loop(loop)

    def _loop(self, loop: Loop) -> None:
        known: dict[tuple[int, bytes], np.ndarray] = {}
        for store in loop.stores:
            array = self._arrays[store.array]
            array[store.positions] = self._values(store.expression, store.points, known)

    def _values(self, number: int, points: Indices, known: dict[Any, np.ndarray]) -> np.ndarray:
        """The values of some lanes of an expression that is to be written."""
        wanted = (number, points.tobytes())
        stack = [(number, points)]
        while stack:  # no recursion: programs may be deep
            top, places = stack[-1]
            key = (top, places.tobytes())
            arguments = (
                [] if top in self._buffers and key != wanted else self._arguments(top, places)
            )
            missing = [(a, x) for a, x in arguments if (a, x.tobytes()) not in known]
            if missing and key not in known:
                stack += missing
                continue
            stack.pop()
            if key not in known:
                values = [known[a, x.tobytes()] for a, x in arguments]
                result = np.asarray(self._computed(top, places, values, key != wanted))
                known[key] = np.broadcast_to(result.astype(self._all[top].dtype), len(places))
        return known[wanted]

    def _arguments(self, number: int, points: Indices) -> list[tuple[int, Indices]]:
        """The arguments of an expression, and which lanes of them."""
        expression = self._all[number]
        if expression.kind in ("segments", "product"):
            return [(a, by.indices) for a, by in expression.arguments if by is not None]
        one = np.zeros(1, np.int64)
        return [
            (
                a,
                one
                if self._all[a].domain is SCALAR
                else points
                if by is None
                else by.indices[points],
            )
            for a, by in expression.arguments
        ]

    def _computed(self, number: int, points: Indices, values: Any, reads: bool) -> Any:
        """The values of some lanes of an expression, from those of its arguments."""
        expression = self._all[number]
        if number in self._buffers and reads:
            return self._arrays[self._buffers[number]][points]
        if expression.kind == "constant":
            return expression.attribute
        if expression.kind == "load":
            array, step, start = load_of(expression)
            return self._arrays[array][points * step + start]
        if expression.kind == "segments":
            _, _, starts = segments_of(expression)
            sums = np.zeros(len(starts) - 1, expression.dtype)
            np.add.at(sums, np.repeat(np.arange(len(sums)), np.diff(starts)), values[0])
            return sums[points]
        if expression.kind == "product":
            count, rows, inner, columns = matmul_sizes_of(expression)
            left, right = values[0].reshape(count, rows, inner), values[1].reshape(count, inner, -1)
            return (left @ right).reshape(count * rows * columns)[points]
        return _OPERATIONS[expression.kind](*values)
