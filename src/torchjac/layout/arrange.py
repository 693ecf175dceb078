"""Arranges the slabs of passes: counts them, collects their parts, assembles the output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torchjac.capture.eager_graph import EagerGraph
from torchjac.layout.assemble import assembler, collect
from torchjac.passes.modes import Part
from torchjac.passes.slab import Entries, Slab
from torchjac.passes.structure import Structure
from torchjac.request import Output


@dataclass(frozen=True, slots=True)
class Arranged:
    """A finished Jacobian, with counts of the passes that evaluated it.

    Attributes:
        value: Blocks nested as outputs x inputs.
        unused: Positions of input leaves that no output depends on.
        passes: Number of passes through the graph.
        chunk: Largest number of seeds in one pass.
        work: Predicted seconds of the best passes; 0 without a prediction.
    """

    value: Any
    unused: tuple[int, ...]
    passes: int
    chunk: int
    work: float = 0.0


class _Counted:
    """Yields the parts of a Jacobian, and counts their passes, seeds and used inputs."""

    def __init__(self, slabs: Iterable[Part], structure: Structure):
        self._slabs = slabs
        self._structure = structure
        self.used = [False] * len(structure.columns)
        self.passes = 0
        self.chunk = 0

    def __iter__(self) -> Iterator[Part]:
        for slab in self._slabs:
            self.passes += slab.passes
            seeds = slab.seeds if isinstance(slab, Entries) else slab.stop - slab.start
            self.chunk = max(self.chunk, seeds // slab.passes)
            self._record_used(slab)
            yield slab
            del slab  # frees its memory before the mode evaluates the next one

    def _record_used(self, slab: Part) -> None:
        used = slab.used
        if used is None:
            assert isinstance(slab, Slab), "entries name the inputs that they use"
            used = tuple(value is not None for value in slab.values)
        for position, is_used in enumerate(used):
            if is_used:
                self.used[position] = True


def arrange(
    slabs: Iterable[Part], program: EagerGraph, structure: Structure, output: Output
) -> Arranged:
    """Arranges an output from the slabs of its passes.

    Args:
        slabs: Rows or columns in order, as a mode yields them.
        program: The eager graph that was differentiated.
        structure: Rows and columns of the Jacobian.
        output: What of the Jacobian is wanted.

    Raises:
        PlanRefused, CoupledBatchError: The mode raised it while it evaluated a slab.
    """
    counted = _Counted(slabs, structure)
    parts = collect(output, iter(counted), program, structure)
    nest = program.nest
    value = assembler(output, nest, program.device)(parts)
    unused = [p for p, used in zip(nest.live_inputs, counted.used, strict=True) if not used]
    unused += [p for p in range(len(nest.inputs)) if p not in nest.live_inputs]
    if counted.passes == 0 and program.outputs and (structure.m == 0 or structure.n == 0):
        # Empty leaves need no pass, so whether inputs with a graph are used is not known.
        unused = [p for p in unused if p not in nest.live_inputs]
    return Arranged(value, tuple(sorted(unused)), counted.passes, counted.chunk)
