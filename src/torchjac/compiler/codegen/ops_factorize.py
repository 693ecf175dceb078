"""Factorizations of small matrices as scalar statements, where torch calls LAPACK.

Rows are exchanged for the largest pivot, as in LAPACK (Golub and Van Loan, Matrix Computations,
4th edition, algorithm 3.4.1). The index of a pivot is a value of the program, by which rows are
selected. A matrix that is singular, or not positive definite, gives values that are not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from torchjac._torch.operators import aten, known
from torchjac._torch.trace.ir import Value
from torchjac.compiler.codegen.element_ids import LoweringContext, dtype_of
from torchjac.errors import PlanRefused

_LARGEST = 8  # rows or columns of a matrix: larger ones are refused
# Rows of a matrix; each element holds the ids of a batch of matrices.
_Rows = list[list[Tensor]]


class _Triangle(Enum):
    """The triangle of a matrix that substitution reads."""

    LOWER = "lower"
    UPPER = "upper"


class _Diagonal(Enum):
    """The diagonal of a triangle: stored elements, or ones."""

    STORED = "stored"
    ONES = "ones"


class _Scalars:
    """Arithmetic on element ids of one dtype."""

    def __init__(self, do: LoweringContext, dtype: str):
        self._do = do
        self.dtype = dtype

    def __call__(self, kind: str, *operands: Tensor) -> Tensor:
        return self._do.apply(kind, self.dtype, operands)

    def number(self, value: float) -> Tensor:
        return torch.tensor(self._do.constant_id(value, self.dtype))

    def place(self, value: int) -> Tensor:
        return torch.tensor(self._do.constant_id(value, "int64"))

    def test(self, kind: str, *operands: Tensor) -> Tensor:
        return self._do.apply(kind, "bool", operands)

    def place_where(self, condition: Tensor, one: Tensor, other: Tensor) -> Tensor:
        return self._do.apply("where", "int64", [condition, one, other])

    def less(self, x: Tensor, *factors: Tensor) -> Tensor:
        """The first operand minus a product."""
        return self("sub", x, self("mul", *factors))


def _rows(ids: Tensor) -> _Rows:
    """The elements of matrices.

    Raises:
        PlanRefused: The matrices are large.
    """
    if max(ids.shape[-2:]) > _LARGEST:
        raise PlanRefused(f"factors of a matrix larger than {_LARGEST} x {_LARGEST}")
    return [list(row.unbind(-1)) for row in ids.unbind(-2)]


def _matrix(rows: _Rows) -> Tensor:
    stacked = [torch.stack(torch.broadcast_tensors(*row), -1) for row in rows]  # type: ignore[no-untyped-call]
    return torch.stack(torch.broadcast_tensors(*stacked), -2)  # type: ignore[no-untyped-call]


def _exchange(s: _Scalars, rows: _Rows, k: int, place: Tensor) -> None:
    """Exchanges row k with the later row whose index a value of the program gives."""
    first = list(rows[k])
    for i in range(k + 1, len(rows)):
        this = s.test("eq", place, s.place(i))
        for j, (old, other) in enumerate(zip(first, list(rows[i]), strict=True)):
            rows[i][j] = s("where", this, old, other)
            rows[k][j] = s("where", this, other, rows[k][j])


def _lu(s: _Scalars, ids: Tensor) -> tuple[_Rows, list[Tensor]]:
    """L and U in one matrix, and the pivot of each row."""
    rows = _rows(ids)
    size, pivots = len(rows), []
    for k in range(size):
        best, place = s("abs", rows[k][k]), s.place(k).expand(rows[k][k].shape)
        for i in range(k + 1, size):
            other = s("abs", rows[i][k])
            more = s.test("gt", other, best)
            best = s("where", more, other, best)
            place = s.place_where(more, s.place(i), place)
        pivots.append(place)
        _exchange(s, rows, k, place)
        for i in range(k + 1, size):
            rows[i][k] = s("div", rows[i][k], rows[k][k])
            for j in range(k + 1, size):
                rows[i][j] = s.less(rows[i][j], rows[i][k], rows[k][j])
    return rows, pivots


def _substitute(
    s: _Scalars, rows: _Rows, right: list[Tensor], triangle: _Triangle, diagonal: _Diagonal
) -> list[Tensor]:
    """Solves with one triangle of a matrix, from the left; the right sides are rows."""
    order = list(range(len(rows)))
    order = order if triangle is _Triangle.LOWER else order[::-1]
    solution = list(right)
    for n, i in enumerate(order):
        for j in order[:n]:
            solution[i] = s.less(solution[i], rows[i][j][..., None], solution[j])
        if diagonal is _Diagonal.STORED:
            solution[i] = s("div", solution[i], rows[i][i][..., None])
    return solution


def _transposed(rows: _Rows) -> _Rows:
    return [list(row) for row in zip(*rows, strict=True)]


def _solve(s: _Scalars, rows: _Rows, pivots: Sequence[Tensor], right: Tensor) -> Tensor:
    """Solves A X = B with the factors of A."""
    sides = [[x] for x in right.unbind(-2)]
    for k, pivot in enumerate(pivots):
        _exchange(s, sides, k, pivot[..., None])
    solution = _substitute(s, rows, [x for (x,) in sides], _Triangle.LOWER, _Diagonal.ONES)
    solution = _substitute(s, rows, solution, _Triangle.UPPER, _Diagonal.STORED)
    return torch.stack(torch.broadcast_tensors(*solution), -2)  # type: ignore[no-untyped-call]


def _solve_transposed(s: _Scalars, rows: _Rows, pivots: Sequence[Tensor], right: Tensor) -> Tensor:
    """Solves transpose(A) X = B with the factors of A."""
    across = _transposed(rows)
    solution = _substitute(s, across, list(right.unbind(-2)), _Triangle.LOWER, _Diagonal.STORED)
    solution = _substitute(s, across, solution, _Triangle.UPPER, _Diagonal.ONES)
    sides = [[x] for x in solution]
    for k, pivot in reversed(list(enumerate(pivots))):
        _exchange(s, sides, k, pivot[..., None])
    solution = [x for (x,) in sides]
    return torch.stack(torch.broadcast_tensors(*solution), -2)  # type: ignore[no-untyped-call]


def _solve_right(s: _Scalars, rows: _Rows, pivots: Sequence[Tensor], right: Tensor) -> Tensor:
    """Solves X A = B with the factors of A."""
    return _solve_transposed(s, rows, pivots, right.transpose(-1, -2)).transpose(-1, -2)


def _all(pivots: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(pivots), -1)


def _fine(s: _Scalars, ids: Tensor) -> Tensor:
    """The status of LAPACK, always zero: errors show as values that are not finite."""
    return s.place(0).expand(ids.shape[:-2])


def _solve_ex(
    do: LoweringContext, a: Value, b: Value, *, left: bool = True, check_errors: bool = False
) -> tuple[Tensor, ...]:
    s, matrix, right = _Scalars(do, dtype_of(a)), do.ids(a), do.ids(b)
    rows, pivots = _lu(s, matrix)
    vector = right.dim() == 1 or right.shape == matrix.shape[:-1]
    solve = _solve if left or vector else _solve_right
    solution = solve(s, rows, pivots, right[..., None] if vector else right)
    solution = solution[..., 0] if vector else solution
    return solution, _matrix(rows), _all(pivots), _fine(s, matrix)


def _lu_factor_ex(
    do: LoweringContext, a: Value, *, pivot: bool = True, check_errors: bool = False
) -> tuple[Tensor, ...]:
    if not pivot or a.shape[-1] != a.shape[-2]:
        raise PlanRefused("factors without pivots, or of a matrix that is not square")
    s, matrix = _Scalars(do, dtype_of(a)), do.ids(a)
    rows, pivots = _lu(s, matrix)
    return _matrix(rows), _all(pivots), _fine(s, matrix)


def _lu_unpack(
    do: LoweringContext,
    lu: Value,
    pivots: Value,
    unpack_data: bool = True,
    unpack_pivots: bool = True,
) -> tuple[Tensor, ...]:
    s, ids = _Scalars(do, dtype_of(lu)), do.ids(lu)
    size = len(_rows(ids))
    if ids.shape[-1] != size:
        raise PlanRefused("factors of a matrix that is not square")
    one, zero = s.number(1.0), s.number(0.0)
    unit = torch.where(torch.eye(size, dtype=torch.bool), one, zero).expand(ids.shape)
    below = torch.ones(size, size, dtype=torch.bool).tril(-1)
    lower = torch.where(below, ids, unit)
    upper = torch.where(below, zero, ids)
    rows = _rows(unit)
    exchanges = list(do.ids(pivots).unbind(-1))
    for k, place in reversed(list(enumerate(exchanges))):
        _exchange(s, rows, k, place)
    nothing = torch.empty(0, dtype=torch.int64)
    data = (lower, upper) if unpack_data else (nothing, nothing)
    return (_matrix(rows) if unpack_pivots else nothing, *data)


def _lu_solve(
    do: LoweringContext,
    lu: Value,
    pivots: Value,
    b: Value,
    *,
    left: bool = True,
    adjoint: bool = False,
) -> Tensor:
    s, rows = _Scalars(do, dtype_of(lu)), _rows(do.ids(lu))
    exchanges, right = list(do.ids(pivots).unbind(-1)), do.ids(b)
    if not left:
        right = right.transpose(-1, -2)
    solve = _solve if left is not adjoint else _solve_transposed
    solution = solve(s, rows, exchanges, right)
    return solution if left else solution.transpose(-1, -2)


def _inv_ex(do: LoweringContext, a: Value, *, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    s, matrix = _Scalars(do, dtype_of(a)), do.ids(a)
    rows, pivots = _lu(s, matrix)
    size = len(rows)
    one = torch.where(torch.eye(size, dtype=torch.bool), s.number(1.0), s.number(0.0))
    right = one.expand(*matrix.shape[:-2], size, size)
    return _solve(s, rows, pivots, right), _fine(s, matrix)


def _sign(s: _Scalars, pivots: Sequence[Tensor]) -> Tensor:
    """The sign of the row exchanges."""
    sign = s.number(1.0)
    for k, place in enumerate(pivots):
        sign = s("where", s.test("eq", place, s.place(k)), sign, s("neg", sign))
    return sign


def _across(do: LoweringContext, a: Value) -> Tensor:
    """The matrix that torch factors for a determinant: transposed where that saves a copy."""
    dense = torch.empty_strided(a.shape, a.stride, device="meta").is_contiguous()
    return do.ids(a).transpose(-1, -2) if dense else do.ids(a)


def _det(do: LoweringContext, a: Value) -> tuple[Tensor, ...]:
    s, matrix = _Scalars(do, dtype_of(a)), _across(do, a)
    rows, pivots = _lu(s, matrix)
    solution = _sign(s, pivots)
    for k, row in enumerate(rows):
        solution = s("mul", solution, row[k])
    return solution, _matrix(rows), _all(pivots)


def _slogdet(do: LoweringContext, a: Value) -> tuple[Tensor, ...]:
    s, matrix = _Scalars(do, dtype_of(a)), _across(do, a)
    rows, pivots = _lu(s, matrix)
    sign, size = _sign(s, pivots), s.number(0.0)
    for k, row in enumerate(rows):
        sign = s("mul", sign, s("sign", row[k]))
        size = s("add", size, s("log", s("abs", row[k])))
    return sign, size.expand(sign.shape), _matrix(rows), _all(pivots)


def _cholesky_ex(
    do: LoweringContext, a: Value, *, upper: bool = False, check_errors: bool = False
) -> tuple[Tensor, Tensor]:
    s, matrix = _Scalars(do, dtype_of(a)), do.ids(a)
    elements = _rows(matrix.transpose(-1, -2) if upper else matrix)
    size = len(elements)
    nothing = s.number(0.0).expand(matrix.shape[:-2])
    rows = [[nothing] * size for _ in range(size)]
    for j in range(size):
        for i in range(j, size):
            value = elements[i][j]
            for k in range(j):
                value = s.less(value, rows[i][k], rows[j][k])
            rows[i][j] = s("sqrt", value) if i == j else s("div", value, rows[j][j])
    # Without a factor the last element is NaN; then all elements become NaN.
    nothing = s("sub", rows[-1][-1], rows[-1][-1])
    for i in range(size):
        for j in range(i + 1):
            rows[i][j] = s("add", rows[i][j], nothing)
    return _matrix(_transposed(rows) if upper else rows), _fine(s, matrix)


def _cholesky(do: LoweringContext, a: Value, upper: bool = False) -> Tensor:
    return _cholesky_ex(do, a, upper=upper)[0]


def _triangular(
    do: LoweringContext,
    a: Value,
    b: Value,
    *,
    upper: bool,
    left: bool = True,
    unitriangular: bool = False,
) -> Tensor:
    s, rows, right = _Scalars(do, dtype_of(a)), _rows(do.ids(a)), do.ids(b)
    if not left:
        rows, right, upper = _transposed(rows), right.transpose(-1, -2), not upper
    triangle = _Triangle.UPPER if upper else _Triangle.LOWER
    diagonal = _Diagonal.ONES if unitriangular else _Diagonal.STORED
    sides = _substitute(s, rows, list(right.unbind(-2)), triangle, diagonal)
    stacked = torch.stack(torch.broadcast_tensors(*sides), -2)  # type: ignore[no-untyped-call]
    return stacked if left else stacked.transpose(-1, -2)


def _cholesky_solve(do: LoweringContext, b: Value, factor: Value, upper: bool = False) -> Tensor:
    s, rows = _Scalars(do, dtype_of(b)), _rows(do.ids(factor))
    rows = _transposed(rows) if upper else rows
    sides = list(do.ids(b).unbind(-2))
    sides = _substitute(s, rows, sides, _Triangle.LOWER, _Diagonal.STORED)
    sides = _substitute(s, _transposed(rows), sides, _Triangle.UPPER, _Diagonal.STORED)
    return torch.stack(torch.broadcast_tensors(*sides), -2)  # type: ignore[no-untyped-call]


FACTORS: Mapping[Any, Callable[..., Any]] = known(
    {
        aten._linalg_solve_ex.default: _solve_ex,
        aten.linalg_lu_factor_ex.default: _lu_factor_ex,
        aten.linalg_lu_solve.default: _lu_solve,
        aten.lu_unpack.default: _lu_unpack,
        aten.linalg_inv_ex.default: _inv_ex,
        aten._linalg_det.default: _det,
        aten._linalg_slogdet.default: _slogdet,
        aten.linalg_cholesky_ex.default: _cholesky_ex,
        aten.cholesky.default: _cholesky,
        aten.linalg_solve_triangular.default: _triangular,
        aten.cholesky_solve.default: _cholesky_solve,
    }
)
