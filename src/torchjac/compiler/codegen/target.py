"""What a backend provides: it renders loop programs, and compiles, loads and launches them.

Everything before this border is the same for every target: scalar expressions and loops over them,
which name arrays, lanes and operations, and no text. Everything behind it belongs to one target.
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

# Seconds that compiling may take.
LIMIT = 60.0
# Bytes of a line of a cache: memory to work in begins at one.
_LINE = 64
# Schedules of which several threads can run a part each.
_SHARED = frozenset((ScheduleKind.PARALLEL, ScheduleKind.BATCH, ScheduleKind.BATCH_TENSORS))


@dataclass(frozen=True, slots=True)
class Limits:
    """What a target can do. A program beyond it is refused, with the reason.

    Attributes:
        name: What it is called in refusals.
        device: Where tensors must lie: the type of a `torch.device`.
        dtypes: Dtypes that it computes in.
        operations: Scalar operations that it has.
        schedules: Kinds of loop programs that it renders.
        statements: Scalar operations in a source, at most.
    """

    name: str
    device: str
    dtypes: frozenset[str]
    operations: frozenset[str]
    schedules: frozenset[ScheduleKind]
    statements: int


@dataclass(frozen=True, slots=True)
class Signature:
    """What the function of a program takes.

    Attributes:
        name: Of the function.
        inputs: Position, array and dtype of every input that is read.
        outputs: dtype and size of every output.
    """

    name: str
    inputs: tuple[tuple[int, ArrayRef, str], ...]
    outputs: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Source:
    """A rendered program; each target adds what it compiles.

    Attributes:
        tables: Arrays that it reads beside the inputs, in order.
        scratch: Bytes of memory that it needs to work in.
        statements: Scalar operations in it.
        work: Its work, in counts.
    """

    tables: tuple[np.ndarray, ...]
    scratch: int
    statements: int
    work: ScalarWork

    @property
    def scratch_of_thread(self) -> int:
        """Bytes of memory to work in for each thread, as whole lines of a cache."""
        return -(-self.scratch // _LINE) * _LINE


@dataclass(frozen=True, slots=True)
class SourceUnit:
    """A program rendered for a target, with what its function takes and gives.

    Attributes:
        name: Of the function.
        target: The target that rendered it.
        kind: The schedule of its loops.
        source: What the target compiles.
        inputs: Shape and dtype of every input; of live tensors too.
        live: Tensors from elsewhere that are read anew at every call.
        outputs: Shape and dtype of every output.
        samples: How many samples there are, where each turn of its loop is one.
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
        """Whether several threads can run a part each."""
        return self.kind in _SHARED


# A loaded function. It takes addresses: of each input (of one at least), of each output, of the
# array of the addresses of tables, and of memory to work in; where threads share it, then the
# number of turns and the number of threads. It says whether the sum of all results is finite.
Launch = Callable[..., bool]


class Target(Protocol):
    """A backend."""

    @property
    def limits(self) -> Limits:
        """What it can do."""

    def render(self, scalars: ScalarProgram, plan: LoopProgram, signature: Signature) -> Source:
        """Renders a program, by the kind of its schedule.

        Args:
            scalars: Its expressions.
            plan: Its loops.
            signature: What its function takes.

        Raises:
            PlanRefused: It is beyond what the target can do.
        """

    def compile(self, unit: SourceUnit, limit: float) -> Any:
        """Compiles a unit and loads it, or loads what was compiled before.

        Args:
            unit: A unit that this target rendered.
            limit: Seconds that this may take.

        Raises:
            PlanRefused: It cannot be compiled here.
        """

    def entry(self, library: Any, unit: SourceUnit) -> Launch:
        """The function of a unit.

        Args:
            library: What `compile` gave for the unit.
            unit: The unit.
        """
