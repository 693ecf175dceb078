"""Dependences: what maps make of them against dense matrices, and sums that need not be exact."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from torch import Tensor

from mapcases import (
    KNOWN,
    MIXED,
    POSITIVE,
    Case,
    Family,
    cases,
    chains,
    contains,
    dense_of,
    is_structure_of,
    parallel,
)
from torchjac.linear.maps import (
    UNKNOWN,
    add,
    axis_sum,
    broadcast,
    dense,
    diagonal,
    gather,
    identity,
    index_map,
    product,
    scatter,
)
from torchjac.sparsity import csr as tables
from torchjac.sparsity import dependence
from torchjac.sparsity.dependence import (
    Dependence,
    Term,
    apply,
    distinct_rows,
    full_dependence,
    merge_terms,
    no_dependence,
    seed,
    sum_dependences,
    to_csr,
)

FAMILIES = pytest.mark.parametrize("family", [KNOWN, POSITIVE], ids=["known", "positive"])
LANES = 10**6


def seeded(map_: Case | None, shape: tuple[int, ...]) -> Dependence:
    value = seed(shape, 0, math.prod(shape))
    return value if map_ is None else apply(map_.map, value)


# Maps act on dependences as matrices do.


@FAMILIES
@given(st.data())
def test_a_map_acts_as_its_matrix(family: Family, data: st.DataObject) -> None:
    """On values that other maps made: terms with tables, factors, and strides of 0."""
    outer, inner = data.draw(chains(family, 2, depth=2))
    value = seeded(inner, inner.map.shape_in)
    image = apply(outer.map, value)
    assert image.shape == outer.map.shape_out
    assert is_structure_of(dense_of(to_csr(image)), outer.matrix @ inner.matrix)


@given(chains(MIXED, 2, depth=2))
def test_a_map_loses_nothing(pair: list[Case]) -> None:
    outer, inner = pair
    image = apply(outer.map, seeded(inner, inner.map.shape_in))
    assert contains(dense_of(to_csr(image)), outer.matrix @ inner.matrix)


@pytest.mark.parametrize(
    ("name", "value"),
    [("_MAX_KNOWN", 0), ("_MAX_ZEROS", 0), ("_MAX_ENTRIES", 0), ("_MAX_TERMS", 1)],
)
@given(st.data())
def test_limits_cost_precision_only(name: str, value: int, data: st.DataObject) -> None:
    """Whatever is forgotten to save time, no nonzero is."""
    outer, inner = data.draw(chains(MIXED, 2, depth=2))
    before = {n: getattr(dependence, n) for n in (name, "_MAX_KNOWN")}
    try:
        setattr(dependence, name, value)
        if name == "_MAX_ZEROS":
            dependence._MAX_KNOWN = 0
        image = apply(outer.map, seeded(inner, inner.map.shape_in))
    finally:
        for n, old in before.items():
            setattr(dependence, n, old)
    assert contains(dense_of(to_csr(image)), outer.matrix @ inner.matrix)


@FAMILIES
@given(st.data())
def test_sums_of_dependences(family: Family, data: st.DataObject) -> None:
    """One term or several, merged or not, the matrix is the same."""
    a, b = data.draw(parallel(family, depth=2))
    values = [seeded(c, c.map.shape_in) for c in (a, b, a)]
    both = sum_dependences(values)
    assert is_structure_of(dense_of(to_csr(both)), 2 * a.matrix + b.matrix)
    single = merge_terms(both)
    assert len(single.terms) <= 1
    assert np.array_equal(dense_of(to_csr(single)), dense_of(to_csr(both)), equal_nan=True)
    table, rows = distinct_rows(both)
    again = dense_of(table)[rows.reshape(-1).numpy()]
    assert np.array_equal(again, dense_of(to_csr(both)), equal_nan=True)


@given(st.lists(st.integers(-9, 9), min_size=25, max_size=40))
def test_many_terms_are_merged(shifts: list[int]) -> None:
    """A wide stencil: shifts that cancel are gone, the rest is added up."""
    n = 7
    parts, expected = [], np.zeros((n, n))
    for k, shift in enumerate(shifts):
        sign = 1.0 if k % 2 else -1.0
        roll = index_map(lambda t, s=shift: t.roll(s, 0), (n,), (n,), False)
        parts.append(apply(product(diagonal((n,), sign), roll), seed((n,), 0, n)))
        expected += sign * np.roll(np.eye(n), shift, 0)
    total = sum_dependences(parts)
    assert len(total.terms) == 1
    assert np.array_equal(dense_of(to_csr(total)), expected)


# Corners.


def test_shapes_without_elements() -> None:
    """Sums over nothing, results without elements, no rows at all."""
    value = seed((0, 3), 0, 0)
    assert to_csr(value).shape == (0, 0)
    total = apply(axis_sum((0, 3), [0]), value)
    assert total.shape == (3,)
    assert to_csr(total).shape == (3, 0)
    one = seed((3,), 0, 3)
    assert to_csr(apply(broadcast((0, 3), (3,)), one)).shape == (0, 3)
    padded = index_map(lambda t: torch.constant_pad_nd(t, [1, 1]), (2,), (0,), True)
    assert to_csr(apply(padded, seed((0,), 0, 5))).nnz == 0
    assert to_csr(apply(dense((2,), (0,)), seed((0,), 0, 5))).nnz == 0
    assert to_csr(full_dependence((2, 0), 3)).shape == (0, 3)
    assert to_csr(full_dependence((2,), 0)).shape == (2, 0)
    assert to_csr(full_dependence((), 3)).nnz == 3
    assert to_csr(no_dependence((2,), 3)).nnz == 0


def test_one_leaf_of_several() -> None:
    """Rows of a leaf begin where those of the leaves before it end."""
    matrix = to_csr(seed((2, 2), 3, 9)).toarray()
    assert np.array_equal(matrix, np.eye(9)[3:7])


def test_lanes_are_never_written_out() -> None:
    """A million lanes that depend on the same: positions, factors and tables stay those of one."""
    value = apply(broadcast((LANES, 4), (4,)), seed((4,), 0, 4))
    weights = torch.arange(1.0, 13.0, dtype=torch.float64).reshape(3, 4)
    full = (LANES, 3, 4)
    map_ = product(
        scatter((LANES, 2), (LANES, 3), 1, torch.tensor([1, 0, 1])),
        axis_sum(full, [2]),
        diagonal(full, weights.expand(full)),
        broadcast(full, (LANES, 1, 4)),
        index_map(lambda t: t.unsqueeze(1), (LANES, 1, 4), (LANES, 4), False),
    )
    minus = diagonal((LANES, 2), torch.tensor([1.0, -2.0], dtype=torch.float64).expand(LANES, 2))
    image = apply(add(product(minus, map_), map_), value)
    for term in image.terms:
        for tensor in (term.positions, term.factors):
            if isinstance(tensor, Tensor):
                assert tensor.untyped_storage().nbytes() <= 12 * 8
        assert term.table is None or term.table.nnz <= 24
    table, rows = distinct_rows(image)
    assert table.nnz <= 8
    assert rows.stride(0) == 0
    expected = np.zeros((2, 4))
    np.add.at(expected, [1, 0, 1], weights.numpy())
    assert np.array_equal(table.toarray(), expected * [[2], [-1]])


def test_positions_are_small() -> None:
    assert seed((5,), 0, 5).terms[0].positions.dtype == torch.int32
    assert seed((5,), 2**31, 2**31 + 5).terms[0].positions.dtype == torch.int64
    far = to_csr(seed((5,), 2**31, 2**31 + 5))
    assert far.indices.tolist() == list(range(2**31, 2**31 + 5))


def test_what_was_read_is_not_changed() -> None:
    """Tables and positions are shared by values, so making a matrix may not touch them."""
    value = apply(axis_sum((3, 2), [1]), seed((3, 2), 0, 6))
    both = sum_dependences([value, apply(gather((3,), 0, torch.tensor([2, 1, 0])), value)])
    first = dense_of(to_csr(both))
    for map_ in (axis_sum((3,), [0]), diagonal((3,), 0.1), dense((3,), (3,))):
        to_csr(apply(map_, both))
    assert np.array_equal(dense_of(to_csr(both)), first)


# Rounding.


def test_rounded_sums_are_no_zeros() -> None:
    """`mean(x) * 41 - sum(x)` is zero in float64 and not in float32; with 64 elements it is."""
    for n, zero in ((41, False), (64, True)):
        total = axis_sum((n,), [0])
        mean = product(diagonal((), float(n)), diagonal((), 1 / n), total)
        map_ = add(mean, product(diagonal((), -1.0), total))
        assert (to_csr(apply(map_, seed((n,), 0, n))).nnz == 0) is zero


def test_exact_entries_cancel_next_to_rounded_ones() -> None:
    """One rounded number in a table does not make everything in it inexact."""
    factors = torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64)
    scaled = diagonal((3,), factors)
    value = apply(axis_sum((2, 3), [0]), apply(broadcast((2, 3), (3,)), seed((3,), 0, 3)))
    minus = apply(product(diagonal((3,), -2.0), scaled), seed((3,), 0, 3))
    entries = dense_of(to_csr(sum_dependences([apply(scaled, value), minus])))
    assert np.isnan(entries[0, 0])
    assert not entries[1:].any()


ENTRIES = st.sampled_from([1.0, -1.0, 2.0, 0.5, 0.1, -0.1, 1 / 3, UNKNOWN, 41.0, 1 / 41, -3.0])


@st.composite
def grids(draw: st.DrawFn, rows: int, columns: int) -> np.ndarray:
    cells = draw(st.lists(ENTRIES | st.just(0.0), min_size=rows * columns, max_size=rows * columns))
    return np.array(cells).reshape(rows, columns)


def exactly(paths: list[tuple[float, ...]]) -> tuple[bool, Fraction, bool]:
    """Whether a sum of products is known; its value; whether any number in it was rounded."""
    known = not any(math.isnan(x) for path in paths for x in path)
    total = sum((math.prod(map(Fraction, p)) for p in paths), Fraction(0)) if known else Fraction(1)
    rounded = any(Fraction(x).denominator > 64 for path in paths for x in path if known)
    return known, total, rounded


def agrees(entry: float, paths: list[tuple[float, ...]]) -> bool:
    """An entry of a sum: zero only where that is proved, known only where it is right."""
    known, total, rounded = exactly(paths)
    if not paths:
        return entry == 0
    if not known:
        return math.isnan(entry)
    if not rounded:
        return entry == total
    single = np.float32(sum(np.prod([np.float32(x) for x in p]) for p in paths))
    close = math.isnan(entry) or math.isclose(entry, total, rel_tol=1e-12, abs_tol=1e-12)
    if len(paths) == 1 and len(paths[0]) == 1:
        return entry == total
    return close and entry != 0 and not (single != 1 and entry == 1)


@given(grids(3, 3), grids(3, 3))
def test_products_and_sums_of_tables(a: np.ndarray, b: np.ndarray) -> None:
    left, right = sparse.csr_array(a), sparse.csr_array(b)
    times, plus = dense_of(tables.multiply(left, right)), dense_of(tables.add(left, right))
    for i in range(3):
        for j in range(3):
            paths = [(a[i, k], b[k, j]) for k in range(3) if a[i, k] and b[k, j]]
            assert agrees(times[i, j], paths)
            assert agrees(plus[i, j], [(x,) for x in (a[i, j], b[i, j]) if x])
    assert np.array_equal(left.toarray(), a, equal_nan=True)
    assert np.array_equal(right.toarray(), b, equal_nan=True)


POINTS = st.tuples(st.integers(0, 3), st.integers(0, 2), ENTRIES | st.just(0.0))


@given(st.lists(POINTS, max_size=14))
def test_tables_from_entries_in_any_order(points: list[tuple[int, int, float]]) -> None:
    rows, columns, data = (np.array([p[i] for p in points]) for i in range(3))
    kinds = rows.astype(np.int64), columns.astype(np.int64), data.astype(np.float64)
    entries = dense_of(tables.from_entries(*kinds, (4, 3)))
    for i in range(4):
        for j in range(3):
            assert agrees(entries[i, j], [(x,) for r, c, x in points if (r, c) == (i, j) and x])


@pytest.mark.parametrize("large", [1, 2**14])
@given(st.data())
def test_tables_side_by_side(large: int, data: st.DataObject) -> None:
    """Terms on the identity in any order, with repeated columns, zeros, and strides of 0."""
    size, width, count = 6, 5, data.draw(st.integers(1, 4))
    number = st.sampled_from([1.0, -1.0, 0.0, UNKNOWN, 0.1])
    columns, factors = [], []
    for _ in range(count):
        start = data.draw(st.lists(st.integers(0, width - 1), min_size=size, max_size=size))
        columns.append(np.array(start, dtype=np.int32).reshape(2, 3))
        row = np.array(data.draw(st.lists(number, min_size=3, max_size=3)))
        one = data.draw(number.filter(bool))
        factors.append(one if data.draw(st.booleans()) else np.broadcast_to(row, (2, 3)))
    before = tables._LARGE
    try:
        tables._LARGE = large
        entries = dense_of(tables.from_columns(columns, factors, width))
    finally:
        tables._LARGE = before
    for i, at in enumerate(np.ndindex(2, 3)):
        for j in range(width):
            summands = [
                float(np.broadcast_to(f, (2, 3))[at])
                for c, f in zip(columns, factors, strict=True)
                if c[at] == j
            ]
            assert agrees(entries[i, j], [(x,) for x in summands if x])


def test_a_long_sum_is_not_exact_for_its_length_alone() -> None:
    """Many terms of which an entry gets few: that those cancel is still seen."""
    n = 1200
    running = torch.ones(n, n, dtype=torch.float64).tril()
    full = product(
        axis_sum((n, n), [1]),
        diagonal((n, n), running),
        broadcast((n, n), (1, n)),
        index_map(lambda t: t.unsqueeze(0), (1, n), (n,), False),
    )
    after = index_map(lambda t: t[1:], (n - 1,), (n,), False)
    before = index_map(lambda t: t[:-1], (n - 1,), (n,), False)
    difference = add(after, product(diagonal((n - 1,), -1.0), before))
    table = to_csr(apply(product(difference, full), seed((n,), 0, n)))
    assert table.nnz == n - 1
    assert (table.data == 1).all()


def test_terms_on_one_table_are_one_term() -> None:
    value = apply(axis_sum((3, 2), [1]), seed((3, 2), 0, 6))
    assert len(sum_dependences([value, value, apply(identity((3,)), value)]).terms) == 1
    assert not sum_dependences([value, apply(diagonal((3,), -1.0), value)]).terms
    unknown = sum_dependences([value, apply(diagonal((3,), UNKNOWN), value)])
    assert isinstance(unknown.terms[0], Term)
    assert np.isnan(to_csr(unknown).data).all()


@given(cases(KNOWN, 2))
def test_an_unknown_dependence_stays_unknown(case: Case) -> None:
    """Of a value that may depend on everything, a map keeps that wherever it has an entry."""
    shape = case.map.shape_in
    entries = dense_of(to_csr(apply(case.map, full_dependence(shape, 2))))
    touched = (case.matrix != 0).any(axis=1)
    assert np.isnan(entries[touched]).all()
