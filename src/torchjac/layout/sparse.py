"""Sparse blocks: the entries of one part at a time, so that m x n is never allocated.

With a known pattern every structural nonzero is stored, also if it is zero, so that the sparsity is
the same at every call. Without a pattern the stored entries are those that are nonzero (or NaN) at
this primal. With a batch the matrix is block diagonal: `(B out, B in)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from torchjac.capture.eager_graph import EagerGraph
from torchjac.passes.modes import Part
from torchjac.passes.slab import Entries, Slab
from torchjac.passes.structure import Structure
from torchjac.sparsity.pattern import Pattern


def blocks(
    parts: Iterator[Part], program: EagerGraph, structure: Structure, layout: torch.layout
) -> list[list[Tensor]]:
    """One matrix `(out.numel(), in.numel())` per output and input leaf, of its nonzero entries."""
    make = _csr if layout is torch.sparse_csr else _coo
    table = _entries(cast(Iterator[Slab], parts), program, structure)
    return [
        [
            make(row, column, values, output.numel(), source.numel())
            for source, (row, column, values) in zip(program.inputs, line, strict=True)
        ]
        for output, line in zip(program.outputs, table, strict=True)
    ]


def values(parts: Iterator[Part], program: EagerGraph, pattern: Pattern) -> Tensor:
    """The value of each structural nonzero, in the dtype that holds those of all inputs."""
    values = torch.zeros(pattern.nnz, dtype=_dtype(program), device=program.device)
    for part in cast(Iterator[Entries], parts):
        for numbers, entries in part.parts:
            values[numbers] = entries.to(values)
    return values


def _dtype(program: EagerGraph) -> torch.dtype:
    dtype = program.inputs[0].dtype
    for source in program.inputs[1:]:
        dtype = torch.promote_types(dtype, source.dtype)
    return dtype


def _coo(row: Tensor, column: Tensor, values: Tensor, m: int, n: int) -> Tensor:
    return torch.sparse_coo_tensor(
        torch.stack([row, column]), values, (m, n), is_coalesced=True, check_invariants=False
    )


def empty(rows: int, columns: int, like: Tensor, layout: torch.layout) -> Tensor:
    """A matrix without entries."""
    index = torch.zeros(0, dtype=torch.int64, device=like.device)
    values = torch.zeros(0, dtype=like.dtype, device=like.device)
    make = _csr if layout is torch.sparse_csr else _coo
    return make(index, index, values, rows, columns)


Triplet = tuple[Tensor, Tensor, Tensor]


class _Growing:
    """Row, column and value of the entries so far, in buffers that double when they are full.

    Small tensors that outlive a slab would pin the heap above the memory of the slab, and the
    allocator would never release it (20 000 rows: 1.7 GB for 60 000 entries).
    """

    def __init__(self, like: Tensor):
        self._size = 0
        integers = torch.empty(_FIRST, dtype=torch.int64, device=like.device)
        values = torch.empty(_FIRST, dtype=like.dtype, device=like.device)
        self._buffers: Triplet = (integers, integers.clone(), values)

    def add(self, entries: Triplet) -> None:
        """Appends entries."""
        size = self._size + len(entries[0])
        if size > len(self._buffers[0]):
            row, column, values = (self._grown(b, size) for b in self._buffers)
            self._buffers = (row, column, values)
        for buffer, part in zip(self._buffers, entries, strict=True):
            buffer[self._size : size] = part
        self._size = size

    def sorted(self) -> Triplet:
        """All entries, sorted by row and then by column."""
        row, column, values = (b[: self._size] for b in self._buffers)
        if self._size == 0:
            return row, column, values
        order = torch.argsort(row * (int(column.max()) + 1) + column)
        return row[order], column[order], values[order]

    def _grown(self, buffer: Tensor, size: int) -> Tensor:
        larger = torch.empty(max(size, 2 * len(buffer)), dtype=buffer.dtype, device=buffer.device)
        larger[: self._size] = buffer[: self._size]
        return larger


_FIRST = 2**17  # entries of a new buffer: 1 MiB, which most allocators map separately


def csr_starts(row: Tensor, m: int) -> Tensor:
    """Number of the first entry of each row of a CSR matrix, from the row of each entry."""
    starts = torch.zeros(m + 1, dtype=torch.int64, device=row.device)
    torch.cumsum(torch.bincount(row, minlength=m), 0, out=starts[1:])
    return starts


def _csr(row: Tensor, column: Tensor, values: Tensor, m: int, n: int) -> Tensor:
    starts = csr_starts(row, m)
    return torch.sparse_csr_tensor(starts, column, values, (m, n), check_invariants=False)


def _entries(
    slabs: Iterator[Slab], program: EagerGraph, structure: Structure
) -> list[list[Triplet]]:
    """Row, column and value of every entry, sorted by row, per output and input leaf."""
    outputs, inputs = range(len(program.outputs)), range(len(program.inputs))
    blocks = {(i, j): _Growing(program.inputs[j]) for i in outputs for j in inputs}
    for slab in slabs:
        for position, value in enumerate(slab.values):
            if value is None:
                continue
            for i, j, entries in _of_slab(slab, position, value, structure):
                blocks[i, j].add(entries)
    return [[blocks[i, j].sorted() for j in inputs] for i in outputs]


def _of_slab(
    slab: Slab, position: int, value: Tensor, structure: Structure
) -> Iterator[tuple[int, int, Triplet]]:
    """Splits the entries of a slab by the leaves that its seeds belong to.

    Args:
        slab: Rows or columns.
        position: Position of an input leaf if the slab holds rows, else of an output leaf.
        value: The value of the slab for this leaf.
        structure: Rows and columns of the Jacobian.

    Yields:
        Positions of output and input leaf, and the entries of their block.
    """
    by_rows = slab.axis == "rows"
    starts = structure.row_starts if by_rows else structure.column_starts
    samples = 1 if structure.batch is None else structure.batch
    cube = value.detach().reshape(slab.stop - slab.start, samples, -1)  # (seeds, B, elements)
    seed, sample, element = torch.nonzero(cube, as_tuple=True)
    values = cube[seed, sample, element]
    seed = seed + slab.start
    size = cube.shape[2]
    for leaf in range(len(starts) - 1):
        first, stop = starts[leaf], starts[leaf + 1]
        if stop <= slab.start or first >= slab.stop:
            continue
        of_leaf = (seed >= first) & (seed < stop)
        seeded = sample[of_leaf] * (stop - first) + seed[of_leaf] - first
        pulled = sample[of_leaf] * size + element[of_leaf]
        if by_rows:
            yield leaf, position, (seeded, pulled, values[of_leaf])
        else:
            yield position, leaf, (pulled, seeded, values[of_leaf])
