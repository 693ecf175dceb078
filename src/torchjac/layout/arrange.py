"""From slabs to the nested result, in whichever layout."""

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
    """A finished Jacobian and what was learned while it was written.

    Attributes:
        value: Tensors nested as outputs x inputs.
        unused: Positions of input leaves that no output depends on.
        passes: Passes that were made.
        chunk: Most seeds that one pass carried.
        work: Predicted seconds of the best passes; 0 where nothing was predicted.
    """

    value: Any
    unused: tuple[int, ...]
    passes: int
    chunk: int
    work: float = 0.0


def converted(value: Any, layout: Layout) -> Any:
    """The result in a layout of SciPy, if that was asked for."""
    if not _is_scipy(layout):
        return value

    def convert(block: Any) -> Any:
        parts = (block.values(), block.col_indices(), block.crow_indices())
        arrays = tuple(p.cpu().numpy() for p in parts)
        return layout(scipy.sparse.csr_array(arrays, shape=tuple(block.shape)))

    return tree_map(convert, value)


class _Watch:
    """Passes parts through and remembers what they say about passes and unused inputs."""

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
            self._look(slab)
            yield slab
            del slab  # an engine about to make the next one must not find this one alive

    def _look(self, slab: Part) -> None:
        used = slab.used
        if used is None:
            assert isinstance(slab, Slab), "entries say what is used"
            used = tuple(value is not None for value in slab.values)
        for position, yes in enumerate(used):
            if yes:
                self.used[position] = True


def arrange(
    slabs: Iterable[Part], program: EagerGraph, structure: Structure, layout: torch.layout
) -> Arranged:
    """Writes a Jacobian from its slabs.

    Args:
        slabs: Rows or columns in order, as an engine yields them.
        program: What was differentiated.
        structure: Its rows and columns.
        layout: `torch.strided`, `torch.sparse_csr` or `torch.sparse_coo`.

    Raises:
        PlanRefused, CoupledBatchError: The engine raised it on the way.
    """
    watch = _Watch(slabs, structure)
    live = _LAYOUTS[layout](iter(watch), program, structure)
    nest = program.nest
    if nest.output_spec is LEAF and nest.input_spec is LEAF and live and live[0]:
        value: Any = live[0][0]
    else:
        value = _nested(live, program, layout)
    unused = [p for p, used in zip(nest.live_inputs, watch.used, strict=True) if not used]
    unused += [p for p in range(len(nest.inputs)) if p not in nest.live_inputs]
    if watch.passes == 0 and program.outputs and (structure.m == 0 or structure.n == 0):
        # Empty leaves: nothing was differentiated, so nothing can be said of those with a graph.
        unused = [p for p in unused if p not in nest.live_inputs]
    return Arranged(value, tuple(sorted(unused)), watch.passes, watch.chunk)


def _nested(live: list[list[Tensor]], program: EagerGraph, layout: torch.layout) -> Any:
    """Blocks of live leaves and zero blocks of the others, nested as the user nests them."""
    nest = program.nest
    row_of = {position: i for i, position in enumerate(nest.live_outputs)}
    column_of = {position: j for j, position in enumerate(nest.live_inputs)}
    rows = []
    for o, output in enumerate(nest.outputs):
        blocks = [
            live[row_of[o]][column_of[i]]
            if o in row_of and i in column_of
            else zero_block(output, given, program.batch, layout)
            for i, given in enumerate(nest.inputs)
        ]
        rows.append(unflatten(blocks, nest.input_spec))
    return unflatten(rows, nest.output_spec)


def zero_block(output: Tensor, given: Tensor, batch: int | None, layout: torch.layout) -> Tensor:
    """The block between an output and an input that do not depend on each other."""
    if layout is torch.strided:
        shape = (*output.shape, *(given.shape if batch is None else given.shape[1:]))
        return torch.zeros(shape, dtype=given.dtype, device=given.device)
    return sparse.empty(output.numel(), given.numel(), given, layout)
