"""C as a target: rendered as text, compiled by the system's compiler, called through CPython."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torchjac.compiler.codegen.c.batch_loop import SampleWriter
from torchjac.compiler.codegen.c.batch_tensor_loops import LayerWriter, StripWriter
from torchjac.compiler.codegen.c.cpython_entry import entered, entry
from torchjac.compiler.codegen.c.openmp import shared
from torchjac.compiler.codegen.c.parallel_loops import PartedWriter
from torchjac.compiler.codegen.c.scalar_ops import CTYPES, C
from torchjac.compiler.codegen.c.toolchain import compiled
from torchjac.compiler.codegen.c.writer import CSource, Writer, source_of
from torchjac.compiler.codegen.granularity import ScalarProgram
from torchjac.compiler.codegen.schedule import LoopProgram, ScheduleKind
from torchjac.compiler.codegen.target import Launch, Limits, Signature, SourceUnit

# How each kind of schedule is written.
_WRITERS: Mapping[ScheduleKind, type[Writer]] = MappingProxyType(
    {
        ScheduleKind.SERIAL: Writer,
        ScheduleKind.PARALLEL: PartedWriter,
        ScheduleKind.TENSORS: LayerWriter,
        ScheduleKind.BATCH: SampleWriter,
        ScheduleKind.BATCH_TENSORS: StripWriter,
    }
)
# Statements that a compiler is given.
_MOST = 20_000
# Numbers that a function takes after its arrays where threads share it: turns and threads.
_NUMBERS = 2


class CTarget:
    """The C target."""

    @property
    def limits(self) -> Limits:
        """What it can do."""
        return _LIMITS

    def render(self, scalars: ScalarProgram, plan: LoopProgram, signature: Signature) -> CSource:
        """Writes a program as C.

        Raises:
            PlanRefused: Its schedule cannot be written.
        """
        return source_of(scalars, plan, signature, _WRITERS[plan.kind])

    def compile(self, unit: SourceUnit, limit: float) -> Any:
        """Compiles a unit and loads it, or loads what was compiled before.

        Raises:
            NoCompiler: There is none.
            PlanRefused: It fails, or takes too long, or there are no kernels on this system.
        """
        source = unit.source
        assert isinstance(source, CSource)
        text = source.text
        if unit.is_shared:
            text += shared(unit.name, unit.kind, source.scratch_of_thread)
        inputs, outputs = max(len(unit.inputs), 1), len(unit.outputs)
        name, numbers = _called(unit)
        text += entry(name, inputs, outputs, numbers)
        return compiled(text, source.level, limit)

    def entry(self, library: Any, unit: SourceUnit) -> Launch:
        """The function of a unit that was compiled."""
        name, numbers = _called(unit)
        return entered(library, name, max(len(unit.inputs), 1) + len(unit.outputs), numbers)


def _called(unit: SourceUnit) -> tuple[str, int]:
    """The name of the function that is called, and how many numbers it takes."""
    return (f"{unit.name}_shared", _NUMBERS) if unit.is_shared else (unit.name, 0)


_LIMITS = Limits("C", "cpu", frozenset(CTYPES), frozenset(C), frozenset(_WRITERS), _MOST)
