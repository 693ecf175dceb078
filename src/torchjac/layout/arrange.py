"""Arranges the slabs of a Jacobian in its layout, nested as outputs x inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import scipy.sparse
import torch
from torch import Tensor

from torchjac._torch.pytree import LEAF, tree_map, unflatten
from torchjac.capture.eager_graph import EagerGraph
from torchjac.layout import dense, sparse
from torchjac.passes.modes import Part
from torchjac.passes.slab import Entries, Slab
from torchjac.passes.structure import Structure
from torchjac.request import Layout, _is_scipy

_LAYOUTS = {
    torch.strided: dense.blocks,
    torch.sparse_csr: sparse.blocks_csr,
    torch.sparse_coo: sparse.blocks_coo,
}


@dataclass(frozen=True, slots=True)
class Arranged:
    """A finished Jacobian, with counts of the passes that evaluated it.

    Attributes:
        value: Tensors nested as outputs x inputs.
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


def converted(value: Any, layout: Layout) -> Any:
    """Converts a Jacobian to a SciPy layout, if the layout is one."""
    if not _is_scipy(layout):
        return value

    def convert(block: Any) -> Any:
        parts = (block.values(), block.col_indices(), block.crow_indices())
        arrays = tuple(p.cpu().numpy() for p in parts)
        return layout(scipy.sparse.csr_array(arrays, shape=tuple(block.shape)))

    return tree_map(convert, value)


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
    slabs: Iterable[Part], program: EagerGraph, structure: Structure, layout: torch.layout
) -> Arranged:
    """Arranges a Jacobian from its slabs.

    Args:
        slabs: Rows or columns in order, as a mode yields them.
        program: The eager graph that was differentiated.
        structure: Rows and columns of the Jacobian.
        layout: `torch.strided`, `torch.sparse_csr` or `torch.sparse_coo`.

    Raises:
        PlanRefused, CoupledBatchError: The mode raised it while it evaluated a slab.
    """
    counted = _Counted(slabs, structure)
    live = _LAYOUTS[layout](iter(counted), program, structure)
    nest = program.nest
    if nest.output_spec is LEAF and nest.input_spec is LEAF and live and live[0]:
        value: Any = live[0][0]
    else:
        value = _nested(live, program, layout)
    unused = [p for p, used in zip(nest.live_inputs, counted.used, strict=True) if not used]
    unused += [p for p in range(len(nest.inputs)) if p not in nest.live_inputs]
    if counted.passes == 0 and program.outputs and (structure.m == 0 or structure.n == 0):
        # Empty leaves need no pass, so whether inputs with a graph are used is not known.
        unused = [p for p in unused if p not in nest.live_inputs]
    return Arranged(value, tuple(sorted(unused)), counted.passes, counted.chunk)


def _nested(live: list[list[Tensor]], program: EagerGraph, layout: torch.layout) -> Any:
    """Blocks of live leaves, and zero blocks of the other leaves, nested by the user's specs."""
    nest = program.nest
    row_of = {position: i for i, position in enumerate(nest.live_outputs)}
    column_of = {position: j for j, position in enumerate(nest.live_inputs)}
    rows = []
    for o, output in enumerate(nest.outputs):
        blocks = [
            live[row_of[o]][column_of[i]]
            if o in row_of and i in column_of
            else zero_block(output, source, program.batch, layout)
            for i, source in enumerate(nest.inputs)
        ]
        rows.append(unflatten(blocks, nest.input_spec))
    return unflatten(rows, nest.output_spec)


def zero_block(output: Tensor, source: Tensor, batch: int | None, layout: torch.layout) -> Tensor:
    """The block of an output leaf that does not depend on an input leaf (`source`)."""
    if layout is torch.strided:
        shape = (*output.shape, *(source.shape if batch is None else source.shape[1:]))
        return torch.zeros(shape, dtype=source.dtype, device=source.device)
    return sparse.empty(output.numel(), source.numel(), source, layout)
