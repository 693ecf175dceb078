"""The C target: rendered as text, compiled by the system's compiler, called through CPython."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torchjac.compiler.codegen.c.batch_loop import BatchWriter
from torchjac.compiler.codegen.c.batch_tensor_loops import BatchTensorWriter, TensorLoopWriter
from torchjac.compiler.codegen.c.cpython_entry import entry_source, load_entry
from torchjac.compiler.codegen.c.openmp import parallel_entry
from torchjac.compiler.codegen.c.parallel_loops import ParallelWriter
from torchjac.compiler.codegen.c.scalar_ops import CTYPES, C
from torchjac.compiler.codegen.c.toolchain import compile_library
from torchjac.compiler.codegen.c.writer import CSource, Writer, render_source
from torchjac.compiler.codegen.granularity import ScalarProgram
from torchjac.compiler.codegen.schedule import LoopProgram, ScheduleKind
from torchjac.compiler.codegen.target import Launch, Limits, Signature, SourceUnit

# The writer of each kind of schedule.
_WRITERS: Mapping[ScheduleKind, type[Writer]] = MappingProxyType(
    {
        ScheduleKind.SERIAL: Writer,
        ScheduleKind.PARALLEL: ParallelWriter,
        ScheduleKind.TENSORS: TensorLoopWriter,
        ScheduleKind.BATCH: BatchWriter,
        ScheduleKind.BATCH_TENSORS: BatchTensorWriter,
    }
)
_MAX_STATEMENTS = 20_000  # scalar statements of a source: more are refused
_SHARED_INTEGERS = 2  # parameters after the arrays of a shared loop: iterations, threads


class CTarget:
    """The C target."""

    @property
    def limits(self) -> Limits:
        """The capabilities."""
        return _LIMITS

    def render(self, scalars: ScalarProgram, program: LoopProgram, signature: Signature) -> CSource:
        """Renders a program as C.

        Raises:
            PlanRefused: The target cannot write the schedule.
        """
        return render_source(scalars, program, signature, _WRITERS[program.kind])

    def compile(self, unit: SourceUnit, limit: float) -> Any:
        """Compiles and loads a unit, or loads it from the cache.

        Raises:
            NoCompiler: There is no compiler.
            PlanRefused: Compiling fails or takes too long, or this system has no kernels.
        """
        source = unit.source
        assert isinstance(source, CSource)
        text = source.text
        if unit.is_shared:
            text += parallel_entry(unit.name, unit.kind, source.thread_scratch)
        inputs, outputs = max(len(unit.inputs), 1), len(unit.outputs)
        name, numbers = _called(unit)
        text += entry_source(name, inputs, outputs, numbers)
        return compile_library(text, source.level, limit)

    def entry(self, library: Any, unit: SourceUnit) -> Launch:
        """The function of a compiled unit."""
        name, numbers = _called(unit)
        return load_entry(library, name, max(len(unit.inputs), 1) + len(unit.outputs), numbers)


def _called(unit: SourceUnit) -> tuple[str, int]:
    """The name of the function to call, and the number of its integers."""
    return (f"{unit.name}_shared", _SHARED_INTEGERS) if unit.is_shared else (unit.name, 0)


_LIMITS = Limits("C", "cpu", frozenset(CTYPES), frozenset(C), frozenset(_WRITERS), _MAX_STATEMENTS)
