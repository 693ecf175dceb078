"""Rows and columns of a Jacobian, from the shapes of outputs and inputs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from torchjac._torch.autograd import ENGINE, NODES
from torchjac._torch.private import check_contracts
from torchjac._torch.vmap import BATCHING, TRANSFORMS
from torchjac.capture.eager_graph import EagerGraph
from torchjac.passes.autograd_graph import Graph, traverse
from torchjac.sparsity.pattern import Pattern


@dataclass(frozen=True, slots=True)
class Structure:
    """Rows and columns of a Jacobian (of one sample, with a batch).

    Only leaves that have a graph count: blocks of the remaining leaves are zero without a pass.

    Attributes:
        rows: Rows of each output leaf.
        columns: Columns of each input leaf.
        row_starts: First row of each output leaf, and m at the end.
        column_starts: First column of each input leaf, and n at the end.
        batch: Number of independent samples, or None.
        graph: The autograd graph; None if a single plain pass gives the whole Jacobian, or torch
            does not expose the nodes.
        pattern: Structural nonzeros of all leaves together; None if unknown.
        independent: Whether the samples of the batch are proved to be independent.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    row_starts: tuple[int, ...]
    column_starts: tuple[int, ...]
    batch: int | None
    graph: Graph | None
    pattern: Pattern | None = None
    independent: bool = False

    def without_graph(self) -> Structure:
        """The structure without graph and pattern, so that no node and no tensor stays alive."""
        return Structure(
            self.rows,
            self.columns,
            self.row_starts,
            self.column_starts,
            self.batch,
            None,
            None,
            self.independent,
        )

    @property
    def unproved_batch(self) -> bool:
        """Whether samples share a pass without a proof that they are independent."""
        return self.batch is not None and self.batch > 1 and not self.independent

    @property
    def custom(self) -> bool:
        """Whether a user's own backward may run in a pass."""
        return self.graph is None or self.graph.custom

    @property
    def operations(self) -> frozenset[object]:
        """Node types of the graph."""
        return frozenset() if self.graph is None else self.graph.operations

    @property
    def m(self) -> int:
        """Number of rows."""
        return self.row_starts[-1]

    @property
    def n(self) -> int:
        """Number of columns."""
        return self.column_starts[-1]


def analyze(
    program: EagerGraph, pattern: Pattern | None = None, independent: bool = False
) -> Structure:
    """The structure of a program: rows and columns from shapes, nodes from the graph."""
    samples = program.batch
    divisor = 1 if samples is None else max(samples, 1)
    rows, row_starts = _sizes_and_starts(program.outputs, divisor)
    columns, column_starts = _sizes_and_starts(program.inputs, divisor)
    single_pass = row_starts[-1] <= 1 or column_starts[-1] == 0
    simple = single_pass and samples is None and not program.create_graph and pattern is None
    graph = traverse(program) if not simple and (NODES.known or _nodes_are_readable()) else None
    return Structure(rows, columns, row_starts, column_starts, samples, graph, pattern, independent)


def _nodes_are_readable() -> bool:
    """Whether nodes of the graph can be read; checks all contracts of passes as well."""
    check_contracts(ENGINE, NODES, BATCHING, TRANSFORMS)
    return NODES.holds()


def _sizes_and_starts(
    leaves: tuple[Tensor, ...], divisor: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Elements of each leaf, and the number of each leaf's first element (at the end the total)."""
    if len(leaves) == 1:
        size = leaves[0].numel() // divisor
        return (size,), (0, size)
    sizes = tuple([t.numel() // divisor for t in leaves])
    return sizes, tuple(accumulate(sizes, initial=0))
