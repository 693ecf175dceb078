"""Rows and columns of a Jacobian: the part of its structure that shapes alone tell."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from torchjac.capture import Program


@dataclass(frozen=True, slots=True)
class Structure:
    """Rows and columns of one Jacobian (of one sample's, with a batch).

    Only leaves that have a graph count: the others have zero blocks, which need no pass.

    Attributes:
        rows: Rows of each output leaf.
        columns: Columns of each input leaf.
        row_starts: First row of each output leaf, and m at the end.
        column_starts: First column of each input leaf, and n at the end.
        batch: Number of independent samples, or None.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    row_starts: tuple[int, ...]
    column_starts: tuple[int, ...]
    batch: int | None

    @property
    def m(self) -> int:
        """Number of rows."""
        return self.row_starts[-1]

    @property
    def n(self) -> int:
        """Number of columns."""
        return self.column_starts[-1]


def analyze(program: Program) -> Structure:
    """Reads rows and columns off the shapes of a program."""
    samples = program.batch
    divisor = 1 if samples is None else max(samples, 1)
    if len(program.outputs) == 1 and len(program.inputs) == 1:  # the common case, in a microsecond
        m = program.outputs[0].numel() // divisor
        n = program.inputs[0].numel() // divisor
        return Structure((m,), (n,), (0, m), (0, n), samples)
    rows = tuple(t.numel() // divisor for t in program.outputs)
    columns = tuple(t.numel() // divisor for t in program.inputs)
    return Structure(
        rows,
        columns,
        tuple(accumulate(rows, initial=0)),
        tuple(accumulate(columns, initial=0)),
        samples,
    )
