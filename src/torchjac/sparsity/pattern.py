"""The sparsity pattern of a Jacobian: which entries may be nonzero, which are constant, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from torchjac.capture.linear_program import LinearProgram, Scope
from torchjac.errors import ArgumentError, PatternError
from torchjac.sparsity import lanes as lanes_
from torchjac.sparsity import pattern_io
from torchjac.sparsity import pattern_plot as picture
from torchjac.sparsity.dependence import Dependence, to_csr
from torchjac.sparsity.interpret import Interpretation, Spread
from torchjac.sparsity.lanes import Lane

# Entries of a pattern; a denser pattern is not materialized.
_MAX_ENTRIES = 2**27


@dataclass(frozen=True, eq=False, repr=False)
class Pattern:
    """Structural nonzeros of a Jacobian of m rows (output elements) and n columns (input elements).

    Every entry that is not in the pattern is zero: for every input of these shapes if the scope is
    `global`, at the values it was computed for if it is `local`. Leaves are numbered through, in
    the order in which they are nested.

    Attributes:
        starts: `(m + 1,)`: the entries of row i are those from `starts[i]` to `starts[i + 1]`.
        columns: `(nnz,)`: column of each entry, ascending within a row.
        values: `(nnz,)` float64: the entry, if it is the same for every input; NaN if it depends
            on the input.
        row_shapes: Shape of each output leaf.
        column_shapes: Shape of each input leaf.
        scope: `global` or `local`.
        reason: Why the scope is not global, where a function was given.
        lanes: Pairs of axes along which the program is independent, each proved.
        spreads: Operations after which elements depend on more rows than before.
        assumed: Operations with a denser pattern than their rule gives, each with the reason.
    """

    starts: NDArray[Any]
    columns: NDArray[Any]
    values: NDArray[np.float64]
    row_shapes: tuple[tuple[int, ...], ...]
    column_shapes: tuple[tuple[int, ...], ...]
    scope: Scope = "global"
    reason: str | None = None
    lanes: tuple[Lane, ...] = ()
    spreads: tuple[Spread, ...] = ()
    assumed: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns: `(m, n)`."""
        return _total(self.row_shapes), _total(self.column_shapes)

    @property
    def nnz(self) -> int:
        """Number of structural nonzeros."""
        return len(self.columns)

    @property
    def density(self) -> float:
        """`nnz / (m n)`; 0 for an empty Jacobian."""
        m, n = self.shape
        return self.nnz / (m * n) if m and n else 0.0

    @cached_property
    def digest(self) -> int:
        """Equal for patterns with the same entries."""
        return hash((self.shape, self.starts.tobytes(), self.columns.tobytes()))

    @cached_property
    def rows(self) -> NDArray[Any]:
        """Row of each entry."""
        return np.repeat(np.arange(self.shape[0], dtype=self.columns.dtype), self.row_counts)

    @property
    def row_counts(self) -> NDArray[Any]:
        """Structural nonzeros of each row."""
        return np.diff(self.starts)

    @cached_property
    def column_counts(self) -> NDArray[Any]:
        """Structural nonzeros of each column."""
        return np.bincount(self.columns, minlength=self.shape[1])

    @property
    def bandwidth(self) -> tuple[int, int]:
        """Lower and upper bandwidth; negative if all entries lie on one side of the diagonal."""
        if not self.nnz:
            return 0, 0
        offset = self.columns.astype(np.int64) - self.rows
        return int(-offset.min()), int(offset.max())

    @cached_property
    def constant(self) -> NDArray[np.bool_]:
        """Whether each entry is the same for every input."""
        return ~np.isnan(self.values)

    @cached_property
    def blocks(self) -> NDArray[Any]:
        """Structural nonzeros of each block, outputs x inputs by leaf."""
        row_leaf = _leaf_of(self.rows, self.row_shapes)
        column_leaf = _leaf_of(self.columns, self.column_shapes)
        width = len(self.column_shapes)
        counts = np.bincount(row_leaf * width + column_leaf, minlength=len(self.row_shapes) * width)
        return counts.reshape(len(self.row_shapes), width)

    def block(
        self, output: int, input_: int
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        """The block of an output and an input leaf.

        Returns:
            Row and column of each entry within the block, and the number of each entry in the
            pattern (None if the block holds all entries).
        """
        if len(self.row_shapes) == len(self.column_shapes) == 1:
            return self.rows, self.columns, None
        rows = _starts(self.row_shapes)[output : output + 2]
        columns = _starts(self.column_shapes)[input_ : input_ + 2]
        part = np.arange(self.starts[rows[0]], self.starts[rows[1]])
        where = self.columns[part]
        part = part[(where >= columns[0]) & (where < columns[1])]
        return self.rows[part] - rows[0], self.columns[part] - columns[0], part

    @property
    def blame(self) -> tuple[Spread, ...]:
        """Operations that destroyed sparsity, by growth descending, each line once."""
        worst: dict[tuple[str, str | None], Spread] = {}
        for spread in self.spreads:
            key = (spread.operation, spread.where)
            if key not in worst or worst[key].growth < spread.growth:
                worst[key] = spread
        return tuple(sorted(worst.values(), key=lambda s: -s.growth))

    @property
    def batched(self) -> bool:
        """Whether the leading axis of every leaf is a proved batch of independent samples."""
        pairs = {
            (lane.output, lane.input)
            for lane in self.lanes
            if lane.output_axis == 0 and lane.input_axis == 0
        }
        outs, ins = range(len(self.row_shapes)), range(len(self.column_shapes))
        return all((i, j) in pairs for i in outs for j in ins)

    def to_scipy(self) -> sparse.csr_array:
        """A SciPy CSR array with a one at each structural nonzero."""
        return sparse.csr_array(
            (np.ones(self.nnz), self.columns, self.starts), shape=self.shape, copy=True
        )

    def to_dense(self) -> Tensor:
        """A bool tensor `(m, n)`."""
        dense = torch.zeros(self.shape, dtype=torch.bool)
        dense[torch.from_numpy(self.rows).long(), torch.from_numpy(self.columns).long()] = True
        return dense

    def covers(self, other: Pattern) -> bool:
        """Whether every entry of another pattern of the same shape is in this one."""
        if self.shape != other.shape:
            return False
        n = self.shape[1]
        mine = self.rows.astype(np.int64) * n + self.columns
        return bool(np.isin(other.rows.astype(np.int64) * n + other.columns, mine).all())

    def spy(self, path: str | Path | None = None, ax: Any = None) -> Any:
        """Plots the pattern, constant entries apart, and saves the plot if a path is given.

        Args:
            path: A file to save the picture in, by its ending (.png, .svg, .pdf).
            ax: Matplotlib axes to draw into; new ones by default.

        Returns:
            The axes.

        Raises:
            ImportError: Matplotlib is not installed.
        """
        return picture.spy(self, path, ax)

    def save(self, path: str | Path) -> None:
        """Writes the pattern to a file (`.npz`: arrays only, nothing that is executed on load)."""
        pattern_io.save(self, path)

    @staticmethod
    def load(path: str | Path) -> Pattern:
        """Reads a pattern that `save` wrote.

        Raises:
            PatternError: The file holds no pattern, or has an unknown version.
        """
        return Pattern(**pattern_io.load(path))

    def __repr__(self) -> str:
        """Size, entries and scope."""
        m, n = self.shape
        return f"<torchjac.Pattern {m} x {n}, nnz={self.nnz}, scope={self.scope}>"

    def __str__(self) -> str:
        """A picture of dots and a summary."""
        return picture.summary(self)


def pattern_of(program: LinearProgram, interpretation: Interpretation) -> Pattern:
    """The pattern of a linear program, from the dependences of its gradients.

    Raises:
        PatternError: The pattern has too many entries.
    """
    m, n = program.m, program.n
    parts = []
    for gradient, shape in zip(interpretation.gradients, program.column_shapes, strict=True):
        if gradient is None:
            parts.append(sparse.csr_array((shape.numel(), m)))
        else:
            _refuse_huge(gradient, interpretation)
            parts.append(to_csr(gradient))
    stacked = parts[0] if len(parts) == 1 else sparse.vstack(parts, format="csr")
    transposed = stacked.T.tocsr()
    transposed.sort_indices()
    assert transposed.shape == (m, n)
    return Pattern(
        transposed.indptr,
        transposed.indices,
        transposed.data,
        tuple(tuple(s) for s in program.row_shapes),
        tuple(tuple(s) for s in program.column_shapes),
        program.scope,
        program.reason,
        lanes_.find_lanes(program, interpretation),
        interpretation.spreads,
        interpretation.assumed,
    )


def user_pattern(
    nonzeros: Any, row_shapes: Sequence[Sequence[int]], column_shapes: Sequence[Sequence[int]]
) -> Pattern:
    """A pattern that the user supplies, for outputs and inputs of these shapes.

    Args:
        nonzeros: A `Pattern`, a SciPy sparse matrix, or a dense or sparse tensor or array, whose
            nonzeros are the structural ones.
        row_shapes: Shape of each output leaf.
        column_shapes: Shape of each input leaf.

    Raises:
        PatternError: The pattern has the wrong shape, or belongs to another function.
        ArgumentError: The argument is no matrix.
    """
    rows = tuple(tuple(s) for s in row_shapes)
    columns = tuple(tuple(s) for s in column_shapes)
    if isinstance(nonzeros, Pattern):
        if (nonzeros.row_shapes, nonzeros.column_shapes) != (rows, columns):
            raise PatternError(
                f"torchjac: the pattern is of outputs {_format_shapes(nonzeros.row_shapes)} and "
                f"inputs {_format_shapes(nonzeros.column_shapes)}, but the function has outputs "
                f"{_format_shapes(rows)} and inputs {_format_shapes(columns)}. Was it made (or "
                f"saved) for another function, or for arguments of other shapes?"
            )
        return nonzeros
    table = _as_csr(nonzeros)
    expected = (_total(rows), _total(columns))
    if table.shape != expected:
        raise PatternError(
            f"torchjac: the pattern must have a row per output element and a column per input "
            f"element: expected shape {expected}, got {tuple(table.shape)}."
        )
    unknown = np.full(table.nnz, np.nan)
    return Pattern(table.indptr, table.indices, unknown, rows, columns, reason="given by the user")


def _as_csr(nonzeros: Any) -> sparse.csr_array:
    if isinstance(nonzeros, Tensor):
        dense = nonzeros.layout is torch.strided
        tensor = nonzeros if dense else nonzeros.to_sparse(layout=torch.sparse_coo).coalesce()
        if tensor.ndim != 2:
            raise PatternError(
                f"torchjac: the pattern must be a matrix, got a tensor with {tensor.ndim} axes."
            )
        if dense:
            nonzeros = tensor.detach().cpu().numpy() != 0
        else:
            index = tensor.indices().cpu().numpy()
            nonzeros = sparse.coo_array((np.ones(index.shape[1]), index), shape=tuple(tensor.shape))
    if not (sparse.issparse(nonzeros) or isinstance(nonzeros, np.ndarray)) or nonzeros.ndim != 2:
        raise ArgumentError(
            f"torchjac: pattern must be a torchjac Pattern, a SciPy sparse matrix, or a 2-D tensor "
            f"or array, got {type(nonzeros).__name__}."
        )
    table = sparse.csr_array(nonzeros)
    table.sum_duplicates()
    table.sort_indices()
    return table


def _refuse_huge(gradient: Dependence, interpretation: Interpretation) -> None:
    count = 0.0
    for term in gradient.terms:
        per_row = 1.0 if term.table is None else term.table.nnz / max(term.table.shape[0], 1)
        count += per_row * term.positions.numel()
    if count > _MAX_ENTRIES:
        worst = max(interpretation.spreads, key=lambda s: s.growth, default=None)
        raise PatternError(
            f"torchjac: the pattern has about {count:.2g} entries and is not written out."
            + (f" Most were brought in by {worst}." if worst else "")
        )


def _total(shapes: Sequence[Sequence[int]]) -> int:
    return sum(int(np.prod(s, dtype=np.int64)) for s in shapes)


def _starts(shapes: Sequence[Sequence[int]]) -> list[int]:
    """Number of the first element of each leaf, and the total number of elements."""
    return [0, *accumulate(int(np.prod(s, dtype=np.int64)) for s in shapes)]


def _leaf_of(numbers: NDArray[Any], shapes: Sequence[Sequence[int]]) -> NDArray[Any]:
    """Number of the leaf of each element."""
    return np.searchsorted(_starts(shapes)[1:], numbers, side="right")


def _format_shapes(shapes: Sequence[Sequence[int]]) -> str:
    return ", ".join(str(tuple(s)) for s in shapes)
