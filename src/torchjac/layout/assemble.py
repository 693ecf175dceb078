"""The assembler: from the parts of an output to the value that the user gets.

Passes and compiled code hand over the same parts: one tensor with the values of the pattern, or the
blocks row by row (a dense output, or a pattern that is not known). Indices and specs are prepared
once. Results share no memory with each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchjac._torch.pytree import LEAF, TreeSpec, unflatten
from torchjac._torch.storage import lazy_copy
from torchjac.capture.eager_graph import EagerGraph, Nest
from torchjac.layout import dense, sparse
from torchjac.passes.modes import Part
from torchjac.passes.structure import Structure
from torchjac.request import Output, Sparse

Parts = Sequence[Tensor]
Assembler = Callable[[Parts], Any]


def collect(
    output: Output, slabs: Iterator[Part], program: EagerGraph, structure: Structure
) -> Parts:
    """The parts of an output, from the slabs of its passes."""
    if not isinstance(output, Sparse):
        return _all_blocks(output, dense.blocks(slabs, program, structure), program)
    if structure.pattern is None:
        return _all_blocks(output, sparse.blocks(slabs, program, structure, output.layout), program)
    return [sparse.values(slabs, program, structure.pattern)]


def _all_blocks(output: Output, live: list[list[Tensor]], program: EagerGraph) -> Parts:
    """Blocks of the leaves that have a graph, and zero blocks of the other leaves, row by row."""
    nest = program.nest
    if len(live) == len(nest.outputs) and len(program.inputs) == len(nest.inputs):
        return [block for row in live for block in row]
    row_of = {position: i for i, position in enumerate(nest.live_outputs)}
    column_of = {position: j for j, position in enumerate(nest.live_inputs)}
    return [
        live[row_of[o]][column_of[i]]
        if o in row_of and i in column_of
        else _zero_block(output, leaf, source, program.batch)
        for o, leaf in enumerate(nest.outputs)
        for i, source in enumerate(nest.inputs)
    ]


def _zero_block(output: Output, leaf: Tensor, source: Tensor, batch: int | None) -> Tensor:
    """The block of an output leaf that does not depend on an input leaf (`source`)."""
    if isinstance(output, Sparse):
        return sparse.empty(leaf.numel(), source.numel(), source, output.layout)
    return dense.zeros(leaf, source, batch)


def assembler(output: Output, nest: Nest, device: torch.device) -> Assembler:
    """A function from the parts of an output to its nested value.

    Args:
        output: The output, with its pattern if the parts are the values of one.
        nest: How the user nested outputs and inputs.
        device: Where the parts lie.
    """
    nested = _nested(nest.output_spec, nest.input_spec)
    if not isinstance(output, Sparse):
        return nested
    if output.pattern is None:
        return nested if output.container is None else lambda p: nested(output.in_container(p))
    blocks = [
        _sparse_block(output, output.pattern.block(i, j), (rows, columns), source.dtype, device)
        for i, rows in enumerate(map(math.prod, output.pattern.row_shapes))
        for j, (columns, source) in enumerate(
            zip(map(math.prod, output.pattern.column_shapes), nest.inputs, strict=True)
        )
    ]
    if output.container is not None:
        return lambda parts: nested(output.in_container(block(parts[0]) for block in blocks))
    if len(blocks) == 1 and _is_leaf(nest.output_spec) and _is_leaf(nest.input_spec):
        (only,) = blocks
        return lambda parts: only(parts[0])
    return lambda parts: nested([block(parts[0]) for block in blocks])


def _is_leaf(spec: TreeSpec) -> bool:
    return spec is LEAF or bool(spec.is_leaf())


def _nested(output_spec: TreeSpec, input_spec: TreeSpec) -> Assembler:
    """A function from blocks, row by row, to containers of outputs x inputs."""
    if _is_leaf(output_spec) and _is_leaf(input_spec):
        return lambda blocks: blocks[0]
    outputs, inputs = output_spec.num_leaves, input_spec.num_leaves

    def nested(blocks: Parts) -> Any:
        rows = [
            unflatten(list(blocks[i * inputs : (i + 1) * inputs]), input_spec)
            for i in range(outputs)
        ]
        return unflatten(rows, output_spec)

    return nested


def _sparse_block(
    output: Sparse,
    entries: tuple[Any, Any, Any],
    size: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Callable[[Tensor], Tensor]:
    """A function from the values of a pattern to one sparse block.

    Args:
        output: The output, for its layout.
        entries: Row and column of each entry of the block, and its number in the pattern.
        size: Rows and columns of the block.
        dtype: Dtype of the block.
        device: Where the values lie.
    """
    row, column, numbers = entries
    # Indices are copies: memory that torch owns can be copied on write.
    rows = torch.from_numpy(np.array(row, dtype=np.int64)).to(device)
    columns = torch.from_numpy(np.asarray(column, dtype=np.int64)).clone().to(device)
    selection = None if numbers is None else torch.from_numpy(np.asarray(numbers)).to(device)

    def own(values: Tensor) -> Tensor:
        values = values if selection is None else values[selection]
        return values if values.dtype is dtype else values.to(dtype)

    if output.layout is torch.sparse_csr:
        starts = sparse.csr_starts(rows, size[0])

        def csr(values: Tensor) -> Tensor:
            index = lazy_copy(starts), lazy_copy(columns)
            return torch.sparse_csr_tensor(*index, own(values), size, check_invariants=False)

        return csr
    index = torch.stack([rows, columns])

    def coo(values: Tensor) -> Tensor:
        return torch.sparse_coo_tensor(
            lazy_copy(index), own(values), size, is_coalesced=True, check_invariants=False
        )

    return coo
