"""What a map looks like as a matrix, and what it costs to multiply two of them.

Rows are elements of the result, columns elements of the argument, both in their order in memory.
Counts come as integer tensors of the shape of result or argument, with strides of 0 where they do
not change along an axis: lanes are counted once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from map_lanes import lanes
from torchjac.linear.maps.algebra import transpose
from torchjac.linear.maps.factors import UNKNOWN, Factors, Shape, known, on_support, stored
from torchjac.linear.maps.kinds import (
    AxisSum,
    Dense,
    Diagonal,
    IndexMap,
    LinearMap,
    Product,
    Scaled,
    Scatter,
    Zero,
)
from torchjac.sparsity.dependence import Dependence, Term, apply, distinct, matrix, seed

Choice = Callable[[Tensor], Tensor]


def pattern(map_: LinearMap) -> sparse.csr_array:
    """The matrix of a map: what is stored are its structural nonzeros, NaN where not known."""
    return matrix(apply(map_, seed(map_.shape_in, 0, math.prod(map_.shape_in))))


def row_counts(map_: LinearMap) -> Tensor:
    """Number of structural nonzeros in the row of each element of the result."""
    return _counts(map_, _is_entry)


def column_counts(map_: LinearMap) -> Tensor:
    """Number of structural nonzeros in the column of each element of the argument."""
    return _counts(transpose(map_), _is_entry)


def row_sums(map_: LinearMap) -> Tensor:
    """What the map makes of ones; NaN where that is not known."""
    ones = Term(torch.zeros((), dtype=torch.int32).expand(map_.shape_in), 1.0, None)
    table, positions = distinct(apply(map_, Dependence(map_.shape_in, 1, (ones,))))
    sums = torch.from_numpy(table.toarray().reshape(-1))
    return on_support(lambda p: sums[p], positions)


def column_sums(map_: LinearMap) -> Tensor:
    """What the transposed map makes of ones; NaN where that is not known."""
    return row_sums(transpose(map_))


def multiplications(left: LinearMap, right: LinearMap) -> int:
    """Scalar multiplications that the matrix of `left x right` takes, entry by entry.

    Element k between the two pairs each entry of column k of `left` with each entry of row k of
    `right`; a pair is a multiplication unless one of the two is known to be 1 or -1. So the number
    is the sum over k of (entries of column k of `left` that are not 1 or -1) x (entries of row k
    of `right` that are not); a product with an `IndexMap`, a `Scatter` or an `AxisSum` costs
    nothing. Sums and products that are kept unmultiplied count by the entries of their matrix
    (see `pattern`): what it costs to form those is not included.
    """
    assert left.shape_in == right.shape_out, f"{left.shape_in} meets {right.shape_out}"
    a = _counts(transpose(left), _is_work)
    b = _counts(right, _is_work)
    each = on_support(torch.mul, a, b)
    small = stored(each)
    return int(small.sum()) * (each.numel() // max(small.numel(), 1))


def _is_entry(factors: Tensor) -> Tensor:
    return factors != 0


def _is_work(factors: Tensor) -> Tensor:
    return (factors != 0) & (factors.abs() != 1)


def _counts(map_: LinearMap, choice: Choice) -> Tensor:
    """Entries of each row for whose factors the choice is true."""
    shape = map_.shape_out
    if isinstance(map_, (Scaled, Diagonal)):
        return on_support(lambda f: choice(f).to(torch.int64), _factors(map_))
    if isinstance(map_, Product):
        return _counts_of_product(map_, choice)
    one = int(choice(torch.ones((), dtype=torch.float64)))
    if isinstance(map_, Zero):
        return _constant(0, shape)
    if isinstance(map_, IndexMap):
        ones = _constant(one, map_.shape_in)
        return map_.run(ones) if map_.fills else _constant(one, shape)
    if isinstance(map_, AxisSum):
        return _constant(one * math.prod(map_.shape_in[a] for a in map_.axes), shape)
    if isinstance(map_, Scatter):
        along = torch.bincount(map_.index, minlength=shape[map_.axis]) * one
        sizes = [-1 if i == map_.axis else 1 for i in range(len(shape))]
        return along.reshape(sizes).expand(shape)
    if isinstance(map_, Dense):
        unknown = int(choice(_number(UNKNOWN)))
        return _constant(unknown * math.prod(map_.shape_in[a] for a in map_.axes_in), shape)
    return _counted(map_, choice)


def _counts_of_product(map_: Product, choice: Choice) -> Tensor:
    """Counts of a product; what only moves or scales its rows need not be multiplied out."""
    head, last = map_.factors[0], map_.factors[-1]
    if isinstance(head, IndexMap):
        return head.run(_counts(_rest(map_.factors[1:]), choice))
    if isinstance(head, (Scaled, Diagonal)) and _preserves_choice(head, choice):
        rest = _counts(_rest(map_.factors[1:]), choice)
        return on_support(lambda f, n: torch.where(f == 0, 0, n), _factors(head), rest)
    if isinstance(last, (Scaled, Diagonal)):
        every = bool((stored(_factors(last)) != 0).all())
        if every and _preserves_choice(last, choice):
            return _counts(_rest(map_.factors[:-1]), choice)
    return _counted(map_, choice)


def _preserves_choice(map_: Scaled | Diagonal, choice: Choice) -> bool:
    """Whether an entry is chosen after scaling if and only if it was before, or is zero."""
    if choice is _is_entry:
        return True
    factors = stored(_factors(map_))
    return bool(((factors == 0) | (factors.abs() == 1)).all())


def _rest(factors: tuple[LinearMap, ...]) -> LinearMap:
    if len(factors) == 1:
        return factors[0]
    return Product(factors[0].shape_out, factors[-1].shape_in, factors)


def _counted(map_: LinearMap, choice: Choice) -> Tensor:
    """Counts by applying the map, to one lane for all where lanes show.

    Elements of the argument in different lanes share a column: no row has entries of two lanes.
    """
    along = {a.axis_in for a in lanes(map_)}
    sizes = tuple(1 if i in along else s for i, s in enumerate(map_.shape_in))
    count = math.prod(sizes)
    positions = torch.arange(count, dtype=torch.int32 if count < 2**31 else torch.int64)
    term = Term(positions.reshape(sizes).expand(map_.shape_in), 1.0, None)
    value = Dependence(map_.shape_in, count, (term,))
    table, rows = distinct(apply(map_, value))
    counts = _per_row(table, choice)
    return on_support(lambda p: counts[p], rows)


def _per_row(table: sparse.csr_array, choice: Choice) -> Tensor:
    chosen = choice(torch.from_numpy(table.data)).numpy()
    ends = np.concatenate([[0], np.cumsum(chosen)])
    return torch.from_numpy(ends[table.indptr[1:]] - ends[table.indptr[:-1]])


def _factors(map_: Scaled | Diagonal) -> Tensor:
    if isinstance(map_, Diagonal):
        return known(map_.factors)
    return _number(map_.factor).expand(map_.shape_out)


def _number(factors: Factors) -> Tensor:
    return torch.as_tensor(factors, dtype=torch.float64)


def _constant(value: int, shape: Shape) -> Tensor:
    return torch.tensor(value, dtype=torch.int64).expand(shape)
