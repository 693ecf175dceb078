"""Dense blocks: each slab is written once, into the final tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from torchjac.capture.eager_graph import EagerGraph
from torchjac.passes.modes import Part
from torchjac.passes.slab import Slab
from torchjac.passes.structure import Structure


def blocks(parts: Iterator[Part], program: EagerGraph, structure: Structure) -> list[list[Tensor]]:
    """One tensor `([B,] *out, *in)` per output and input leaf.

    A Jacobian of one slab is not copied. Blocks may be views of a common buffer; with columns or a
    batch they are transposed views. Strides are not promised.
    """
    slabs = cast(Iterator[Slab], parts)  # only sparse layouts have entries
    first = next(slabs, None)
    if first is None:
        return [
            [zeros(output, source, structure.batch) for source in program.inputs]
            for output in program.outputs
        ]
    by_rows = first.axis == "rows"
    leaves = program.inputs if by_rows else program.outputs
    seeds = structure.m if by_rows else structure.n
    if first.stop - first.start == seeds:
        buffers = list(first.values)
        for _ in slabs:  # the mode runs its checks after the last slab
            raise AssertionError("a slab after the last one")
        buffers = _unshared(buffers)
    elif program.create_graph:
        buffers = _concatenated(first, slabs, leaves)
    else:
        buffers = list(_written(first, slabs, leaves, seeds))
    full = [
        torch.zeros((seeds, *leaf.shape), dtype=leaf.dtype, device=leaf.device) if b is None else b
        for b, leaf in zip(buffers, leaves, strict=True)
    ]
    split = _split_rows if by_rows else _split_columns
    return split(full, program, structure)


def _written(
    first: Slab, rest: Iterator[Slab], leaves: Sequence[Tensor], seeds: int
) -> list[Tensor | None]:
    """One buffer per leaf with the values of all slabs; None if a leaf has no gradient."""
    buffers: list[Tensor | None] = [None] * len(leaves)
    slab: Slab | None = first
    del first
    while slab is not None:
        for position, value in enumerate(slab.values):
            if value is None:
                continue
            buffer = buffers[position]
            if buffer is None:  # seeds of earlier slabs had no gradient: zeros
                make = torch.empty if slab.start == 0 else torch.zeros
                buffer = make((seeds, *value.shape[1:]), dtype=value.dtype, device=value.device)
                buffers[position] = buffer
            buffer[slab.start : slab.stop] = value
        missing = [p for p, v in enumerate(slab.values) if v is None]
        for position in missing:
            buffer = buffers[position]
            if buffer is not None:
                buffer[slab.start : slab.stop] = 0
        value = None
        slab = None
        slab = next(rest, None)
    return buffers


def _concatenated(
    first: Slab, rest: Iterator[Slab], leaves: Sequence[Tensor]
) -> list[Tensor | None]:
    """As `_written`, by operations that autograd can differentiate."""
    slabs = [first, *rest]
    buffers: list[Tensor | None] = []
    for position, leaf in enumerate(leaves):
        parts = [
            leaf.new_zeros((s.stop - s.start, *leaf.shape)) if value is None else value
            for s in slabs
            for value in (s.values[position],)
        ]
        used = any(s.values[position] is not None for s in slabs)
        buffers.append(torch.cat(parts) if used else None)
    return buffers


def _split_rows(
    buffers: Sequence[Tensor], program: EagerGraph, structure: Structure
) -> list[list[Tensor]]:
    """Blocks of an evaluation by rows: one buffer per input leaf."""
    starts = structure.row_starts
    blocks = []
    for i, output in enumerate(program.outputs):
        row = []
        for source, buffer in zip(program.inputs, buffers, strict=True):
            part = buffer if len(program.outputs) == 1 else buffer[starts[i] : starts[i + 1]]
            if structure.batch is None:
                shape = (*output.shape, *source.shape)
                row.append(part if part.shape == shape else part.reshape(shape))
            else:
                part = part.movedim(0, 1)
                row.append(part.reshape((*output.shape, *source.shape[1:])))
        blocks.append(row)
    return blocks


def _split_columns(
    buffers: Sequence[Tensor], program: EagerGraph, structure: Structure
) -> list[list[Tensor]]:
    """Blocks of an evaluation by columns: one buffer per output leaf."""
    starts = structure.column_starts
    blocks = []
    for buffer in buffers:
        row = []
        for j, source in enumerate(program.inputs):
            part = buffer if len(program.inputs) == 1 else buffer[starts[j] : starts[j + 1]]
            inner = source.shape if structure.batch is None else source.shape[1:]
            block = part.movedim(0, -1)
            if len(inner) != 1:
                block = block.view((*block.shape[:-1], *inner))
            row.append(block if block.dtype == source.dtype else block.to(source.dtype))
        blocks.append(row)
    return blocks


def _unshared(buffers: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Copies buffers that overlap themselves or share memory with another buffer.

    A backward pass may return one tensor for two inputs (the gradient of a sum), or an expanded
    tensor; writing into one block of a Jacobian must not change another block.
    """
    seen: set[int] = set()
    unshared: list[Tensor | None] = []
    for buffer in buffers:
        if buffer is None:
            unshared.append(None)
            continue
        overlapping = not buffer.is_contiguous() and any(
            stride == 0 and size > 1
            for stride, size in zip(buffer.stride(), buffer.shape, strict=True)
        )
        shared = len(buffers) > 1 and buffer.data_ptr() in seen
        own = (
            buffer.clone(memory_format=torch.contiguous_format) if overlapping or shared else buffer
        )
        if len(buffers) > 1:
            seen.add(own.data_ptr())
        unshared.append(own)
    return unshared


def zeros(output: Tensor, source: Tensor, batch: int | None) -> Tensor:
    """The block of an output leaf that does not depend on an input leaf (`source`)."""
    inner = source.shape if batch is None else source.shape[1:]
    return torch.zeros((*output.shape, *inner), dtype=source.dtype, device=source.device)
