"""The interface of a backend: it renders loop programs, and compiles, loads and launches them.

Stages before this border are the same for every target: scalar expressions and loops, which name
arrays, domains and operations, and no text. Code behind the border belongs to one target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from torchjac.compiler.codegen.granularity import ScalarProgram
from torchjac.compiler.codegen.scalar_ir import ArrayRef
from torchjac.compiler.codegen.schedule import LoopProgram, ScheduleKind
from torchjac.host.costs import ScalarWork

COMPILE_SECONDS = 60.0  # seconds that compiling may take
_LINE = 64  # bytes of a cache line: scratch memory is aligned to it
# Schedules whose loops threads can share.
_SHARED = frozenset((ScheduleKind.PARALLEL, ScheduleKind.BATCH, ScheduleKind.BATCH_TENSORS))


@dataclass(frozen=True, slots=True)
class Limits:
    """The capabilities of a target. A program beyond them is refused, with the reason.

    Attributes:
        name: The name of the target, in refusals.
        device: The device of all tensors: the type of a `torch.device`.
        dtypes: The dtypes of arithmetic.
        operations: The scalar operations.
        schedules: The kinds of loop programs.
        statements: The scalar statements of a source, at most.
    """

    name: str
    device: str
    dtypes: frozenset[str]
    operations: frozenset[str]
    schedules: frozenset[ScheduleKind]
    statements: int


@dataclass(frozen=True, slots=True)
class Signature:
    """The arguments of the function of a program.

    Attributes:
        name: The name of the function.
        inputs: Position, array and dtype of each input that is read.
        outputs: dtype and size of each output.
    """

    name: str
    inputs: tuple[tuple[int, ArrayRef, str], ...]
    outputs: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Source:
    """A rendered program; each target adds its text or code.

    Attributes:
        tables: The constant arrays, in order.
        scratch: The size of scratch memory, in bytes.
        statements: The number of scalar statements.
        work: The work of a call, in counts.
    """

    tables: tuple[np.ndarray, ...]
    scratch: int
    statements: int
    work: ScalarWork

    @property
    def thread_scratch(self) -> int:
        """Bytes of scratch memory for each thread, as whole cache lines."""
        return -(-self.scratch // _LINE) * _LINE


@dataclass(frozen=True, slots=True)
class SourceUnit:
    """A rendered program, with the types of its arguments.

    Attributes:
        name: The name of the function.
        target: The target that rendered the program.
        kind: The schedule of the loops.
        source: The source that the target compiles.
        inputs: Shape and dtype of each input, then of each live tensor.
        live: The tensors outside of the arguments, read anew at every call.
        outputs: Shape and dtype of each output.
        samples: The number of samples; None where the loops have no sample axis.
    """

    name: str
    target: Target
    kind: ScheduleKind
    source: Source
    inputs: tuple[tuple[torch.Size, torch.dtype], ...]
    live: tuple[Tensor, ...]
    outputs: tuple[tuple[torch.Size, torch.dtype], ...]
    samples: int | None = None

    @property
    def is_shared(self) -> bool:
        """Whether several threads can share the loops."""
        return self.kind in _SHARED


# A loaded function. Its arguments are addresses: of each input (of at least one), of each output,
# of the array of table addresses, and of scratch memory; where threads share the loops, also the
# number of iterations and the number of threads. It returns whether the sum of all results is
# finite.
Launch = Callable[..., bool]


class Target(Protocol):
    """A backend."""

    @property
    def limits(self) -> Limits:
        """The capabilities."""

    def render(self, scalars: ScalarProgram, program: LoopProgram, signature: Signature) -> Source:
        """Renders a program, by the kind of its schedule.

        Args:
            scalars: The expressions.
            program: The loops.
            signature: The arguments of the function.

        Raises:
            PlanRefused: The program is beyond the capabilities of the target.
        """

    def compile(self, unit: SourceUnit, limit: float) -> Any:
        """Compiles and loads a unit, or loads it from the cache.

        Args:
            unit: A unit that this target rendered.
            limit: Seconds that compiling may take.

        Raises:
            PlanRefused: The unit cannot be compiled here.
        """

    def entry(self, library: Any, unit: SourceUnit) -> Launch:
        """The function of a unit.

        Args:
            library: The result of `compile` for the unit.
            unit: The unit.
        """
