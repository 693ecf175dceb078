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
from torchjac.sparsity.dependence import Dependence, matrix
from torchjac.sparsity.interpret import Interpretation, Spread
from torchjac.sparsity.lanes import Lane

# More entries than this are not written out: the pattern is dense for all practical purposes.
_MOST = 2**27


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
        assumed: Operations of which more was assumed than a rule says, and what.
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
        """Diagonals below and above the main one that hold an entry; negative if they are gone."""
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
        self, output: int, given: int
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        """Entries between an output and an input leaf: rows, columns, numbers (None for all)."""
        if len(self.row_shapes) == len(self.column_shapes) == 1:
            return self.rows, self.columns, None
        rows = _starts(self.row_shapes)[output : output + 2]
        columns = _starts(self.column_shapes)[given : given + 2]
        part = np.arange(self.starts[rows[0]], self.starts[rows[1]])
        where = self.columns[part]
        part = part[(where >= columns[0]) & (where < columns[1])]
        return self.rows[part] - rows[0], self.columns[part] - columns[0], part

    @property
    def blame(self) -> tuple[Spread, ...]:
        """Operations whose local map destroyed sparsity, the worst first, each line once."""
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
            PatternError: The file holds something else, or a version this one cannot read.
        """
        return Pattern(**pattern_io.load(path))

    def __repr__(self) -> str:
        """Size, entries and scope."""
        m, n = self.shape
        return f"<torchjac.Pattern {m} x {n}, nnz={self.nnz}, scope={self.scope}>"

    def __str__(self) -> str:
        """A picture of dots and a summary."""
        return picture.summary(self)


def pattern_of(derivative: LinearProgram, found: Interpretation) -> Pattern:
    """Writes out what the interpretation of a derivative found.

    Raises:
        PatternError: There are so many entries that the pattern does not fit.
    """
    m, n = derivative.m, derivative.n
    parts = []
    for gradient, shape in zip(found.gradients, derivative.column_shapes, strict=True):
        if gradient is None:
            parts.append(sparse.csr_array((shape.numel(), m)))
        else:
            _refuse_huge(gradient, found)
            parts.append(matrix(gradient))
    stacked = parts[0] if len(parts) == 1 else sparse.vstack(parts, format="csr")
    turned = stacked.T.tocsr()
    turned.sort_indices()
    assert turned.shape == (m, n)
    return Pattern(
        turned.indptr,
        turned.indices,
        turned.data,
        tuple(tuple(s) for s in derivative.row_shapes),
        tuple(tuple(s) for s in derivative.column_shapes),
        derivative.scope,
        derivative.reason,
        lanes_.lanes(derivative, found),
        found.spreads,
        found.assumed,
    )


def given_pattern(
    given: Any, row_shapes: Sequence[Sequence[int]], column_shapes: Sequence[Sequence[int]]
) -> Pattern:
    """A pattern that the user supplies, for outputs and inputs of these shapes.

    Args:
        given: A `Pattern`, a SciPy sparse matrix, or a dense or sparse tensor or array, whose
            nonzeros are the structural ones.
        row_shapes: Shape of each output leaf.
        column_shapes: Shape of each input leaf.

    Raises:
        PatternError: It is of the wrong shape, or a saved one of another function.
        ArgumentError: It is nothing that has nonzeros.
    """
    rows = tuple(tuple(s) for s in row_shapes)
    columns = tuple(tuple(s) for s in column_shapes)
    if isinstance(given, Pattern):
        if (given.row_shapes, given.column_shapes) != (rows, columns):
            raise PatternError(
                f"torchjac: the pattern is of outputs {_shown(given.row_shapes)} and inputs "
                f"{_shown(given.column_shapes)}, but the function has outputs {_shown(rows)} and "
                f"inputs {_shown(columns)}. Was it made (or saved) for another function, or for "
                f"arguments of other shapes?"
            )
        return given
    table = _as_csr(given)
    expected = (_total(rows), _total(columns))
    if table.shape != expected:
        raise PatternError(
            f"torchjac: the pattern must have a row per output element and a column per input "
            f"element: expected shape {expected}, got {tuple(table.shape)}."
        )
    unknown = np.full(table.nnz, np.nan)
    return Pattern(table.indptr, table.indices, unknown, rows, columns, reason="given by the user")


def _as_csr(given: Any) -> sparse.csr_array:
    if isinstance(given, Tensor):
        dense = given.layout is torch.strided
        found = given if dense else given.to_sparse(layout=torch.sparse_coo).coalesce()
        if found.ndim != 2:
            raise PatternError(
                f"torchjac: the pattern must be a matrix, got a tensor with {found.ndim} axes."
            )
        if dense:
            given = found.detach().cpu().numpy() != 0
        else:
            index = found.indices().cpu().numpy()
            given = sparse.coo_array((np.ones(index.shape[1]), index), shape=tuple(found.shape))
    if not (sparse.issparse(given) or isinstance(given, np.ndarray)) or given.ndim != 2:
        raise ArgumentError(
            f"torchjac: pattern must be a torchjac Pattern, a SciPy sparse matrix, or a 2-D tensor "
            f"or array, got {type(given).__name__}."
        )
    table = sparse.csr_array(given)
    table.sum_duplicates()
    table.sort_indices()
    return table


def _refuse_huge(gradient: Dependence, found: Interpretation) -> None:
    count = 0.0
    for term in gradient.terms:
        per_row = 1.0 if term.table is None else term.table.nnz / max(term.table.shape[0], 1)
        count += per_row * term.positions.numel()
    if count > _MOST:
        worst = max(found.spreads, key=lambda s: s.growth, default=None)
        raise PatternError(
            f"torchjac: the pattern has about {count:.2g} entries and is not written out."
            + (f" Most were brought in by {worst}." if worst else "")
        )


def _total(shapes: Sequence[Sequence[int]]) -> int:
    return sum(int(np.prod(s, dtype=np.int64)) for s in shapes)


def _starts(shapes: Sequence[Sequence[int]]) -> list[int]:
    """Number of the first element of each leaf, and the total."""
    return [0, *accumulate(int(np.prod(s, dtype=np.int64)) for s in shapes)]


def _leaf_of(numbers: NDArray[Any], shapes: Sequence[Sequence[int]]) -> NDArray[Any]:
    """The leaf that each element belongs to."""
    return np.searchsorted(_starts(shapes)[1:], numbers, side="right")


def _shown(shapes: Sequence[Sequence[int]]) -> str:
    return ", ".join(str(tuple(s)) for s in shapes)
