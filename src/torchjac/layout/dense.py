"""Dense blocks: one write into the final tensor."""

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

    A Jacobian that comes in one slab is not copied. Blocks may be views of a common buffer, and
    one that came in columns, or with a batch, is a transposed view of it: strides are not promised.
    """
    slabs = cast(Iterator[Slab], parts)  # entries are made for sparse layouts only
    first = next(slabs, None)
    if first is None:
        return [
            [_zeros(output, given, structure.batch) for given in program.inputs]
            for output in program.outputs
        ]
    by_rows = first.axis == "rows"
    leaves = program.inputs if by_rows else program.outputs
    seeds = structure.m if by_rows else structure.n
    if first.stop - first.start == seeds:
        buffers = list(first.values)
        for _ in slabs:  # lets the engine finish its checks
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
    buffers: list[Tensor | None] = [None] * len(leaves)
    slab: Slab | None = first
    del first
    while slab is not None:
        for position, value in enumerate(slab.values):
            if value is None:
                continue
            buffer = buffers[position]
            if buffer is None:  # rows before this slab had no gradient: they are zeros
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
    """As `_written`, through operations that autograd can follow."""
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
    starts = structure.row_starts
    found = []
    for i, output in enumerate(program.outputs):
        row = []
        for given, buffer in zip(program.inputs, buffers, strict=True):
            part = buffer if len(program.outputs) == 1 else buffer[starts[i] : starts[i + 1]]
            if structure.batch is None:
                shape = (*output.shape, *given.shape)
                row.append(part if part.shape == shape else part.reshape(shape))
            else:
                part = part.movedim(0, 1)
                row.append(part.reshape((*output.shape, *given.shape[1:])))
        found.append(row)
    return found


def _split_columns(
    buffers: Sequence[Tensor], program: EagerGraph, structure: Structure
) -> list[list[Tensor]]:
    starts = structure.column_starts
    found = []
    for buffer in buffers:
        row = []
        for j, given in enumerate(program.inputs):
            part = buffer if len(program.inputs) == 1 else buffer[starts[j] : starts[j + 1]]
            inner = given.shape if structure.batch is None else given.shape[1:]
            block = part.movedim(0, -1)
            if len(inner) != 1:
                block = block.view((*block.shape[:-1], *inner))
            row.append(block if block.dtype == given.dtype else block.to(given.dtype))
        found.append(row)
    return found


def _unshared(buffers: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gives every buffer memory of its own.

    A backward pass may return one tensor for two inputs (the gradient of a sum), or an expanded
    one; writing into one block of a Jacobian must not change another.
    """
    seen: set[int] = set()
    found: list[Tensor | None] = []
    for buffer in buffers:
        if buffer is None:
            found.append(None)
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
        found.append(own)
    return found


def _zeros(output: Tensor, given: Tensor, batch: int | None) -> Tensor:
    inner = given.shape if batch is None else given.shape[1:]
    return torch.zeros((*output.shape, *inner), dtype=given.dtype, device=given.device)
