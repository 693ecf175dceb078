"""The algebra of structured maps against matrices that were made entry by entry."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from map_lanes import Along, lanes
from map_matrices import column_counts, column_sums, multiplications, pattern, row_counts, row_sums
from mapcases import (
    KNOWN,
    MIXED,
    POSITIVE,
    Case,
    Family,
    by_basis,
    cases,
    chains,
    contains,
    dense_of,
    is_structure_of,
    parallel,
    same,
    stored_elements,
)
from torchjac.linear.maps import (
    UNKNOWN,
    AxisSum,
    Dense,
    Diagonal,
    IndexMap,
    Product,
    Scaled,
    Scatter,
    Sum,
    Zero,
    add,
    axis_sum,
    broadcast,
    dense,
    diagonal,
    fixed,
    gather,
    identity,
    index_map,
    product,
    rank_bound,
    reshape,
    scatter,
    transpose,
)
from torchjac.linear.maps.factors import stored

FAMILIES = pytest.mark.parametrize("family", [KNOWN, POSITIVE], ids=["known", "positive"])
LANES = 10**6


# Patterns.


@given(cases(MIXED, 3))
def test_a_pattern_holds_every_nonzero(case: Case) -> None:
    """Soundness, with factors of any kind: and what is said to be known is that number."""
    assert contains(dense_of(pattern(case.map)), case.matrix)


@FAMILIES
@given(st.data())
def test_a_pattern_holds_nothing_else(family: Family, data: st.DataObject) -> None:
    """Exactness where every factor is known, or nothing can cancel."""
    case = data.draw(cases(family, 3))
    assert is_structure_of(dense_of(pattern(case.map)), case.matrix)


@given(cases(KNOWN, 3))
def test_known_factors_give_known_entries(case: Case) -> None:
    assert np.array_equal(dense_of(pattern(case.map)), case.matrix)


# Laws.


@FAMILIES
@given(st.data())
def test_transpose(family: Family, data: st.DataObject) -> None:
    case = data.draw(cases(family, 3))
    turned = transpose(case.map)
    assert (turned.shape_out, turned.shape_in) == (case.map.shape_in, case.map.shape_out)
    assert same(dense_of(pattern(turned)), dense_of(pattern(case.map)).T)
    assert same(dense_of(pattern(transpose(turned))), dense_of(pattern(case.map)))


@FAMILIES
@given(st.data())
def test_sum(family: Family, data: st.DataObject) -> None:
    a, b = data.draw(parallel(family))
    both = dense_of(pattern(add(a.map, b.map)))
    assert is_structure_of(both, a.matrix + b.matrix)
    assert same(both, dense_of(pattern(add(b.map, a.map))))


@FAMILIES
@given(st.data())
def test_product(family: Family, data: st.DataObject) -> None:
    """The structure of a product is the product of the structures."""
    a, b = data.draw(chains(family, 2))
    structure = dense_of(pattern(product(a.map, b.map)))
    assert is_structure_of(structure, a.matrix @ b.matrix)
    if family is POSITIVE:
        left, right = (dense_of(pattern(m.map)) != 0 for m in (a, b))
        assert np.array_equal(structure != 0, left.astype(int) @ right.astype(int) > 0)


@FAMILIES
@given(st.data())
def test_product_is_associative(family: Family, data: st.DataObject) -> None:
    a, b, c = data.draw(chains(family, 3))
    left = product(product(a.map, b.map), c.map)
    right = product(a.map, product(b.map, c.map))
    assert same(dense_of(pattern(left)), dense_of(pattern(right)))
    turned = product(transpose(c.map), transpose(b.map), transpose(a.map))
    assert same(dense_of(pattern(turned)), dense_of(pattern(left)).T)


@FAMILIES
@given(st.data())
def test_product_distributes_over_a_sum(family: Family, data: st.DataObject) -> None:
    a, b = data.draw(parallel(family))
    shape = a.map.shape_out
    head = Case(identity(shape), np.eye(math.prod(shape)))
    if shape:
        total = axis_sum(shape, [0])
        head = Case(total, by_basis(lambda t: t.sum(0), total.shape_out, shape))
    structure = pattern(product(head.map, add(a.map, b.map)))
    assert is_structure_of(dense_of(structure), head.matrix @ (a.matrix + b.matrix))


# Counts.


@FAMILIES
@given(st.data())
def test_counts_are_those_of_the_matrix(family: Family, data: st.DataObject) -> None:
    map_ = data.draw(cases(family, 3)).map
    entries = dense_of(pattern(map_)) != 0
    rows, columns = row_counts(map_), column_counts(map_)
    assert (tuple(rows.shape), tuple(columns.shape)) == (map_.shape_out, map_.shape_in)
    assert np.array_equal(rows.reshape(-1).numpy(), entries.sum(1))
    assert np.array_equal(columns.reshape(-1).numpy(), entries.sum(0))


@FAMILIES
@given(st.data())
def test_sums_are_those_of_the_matrix(family: Family, data: st.DataObject) -> None:
    map_ = data.draw(cases(family, 3)).map
    entries = dense_of(pattern(map_))
    assert same(row_sums(map_).reshape(-1).numpy(), entries.sum(1))
    assert same(column_sums(map_).reshape(-1).numpy(), entries.sum(0))


@FAMILIES
@given(st.data())
def test_multiplications_are_counted_pair_by_pair(family: Family, data: st.DataObject) -> None:
    a, b = (c.map for c in data.draw(chains(family, 2)))
    left, right = (dense_of(pattern(m)) for m in (a, b))
    expected = 0
    for k in range(left.shape[1]):
        for x in left[:, k]:
            expected += sum(bool(x and y and abs(x) != 1 and abs(y) != 1) for y in right[k])
    assert multiplications(a, b) == expected


def test_multiplications_of_a_matrix_product() -> None:
    """A (5, 3) matrix times a (3, 7) one, for a batch of a million: 105 each."""
    left = dense((LANES, 5), (LANES, 3), [1], [1])
    right = dense((LANES, 3), (LANES, 7), [1], [1])
    assert multiplications(left, right) == LANES * 5 * 3 * 7
    assert multiplications(axis_sum((LANES, 3), [1]), right) == 0
    assert multiplications(diagonal((LANES, 3), 2.0), right) == LANES * 3 * 7
    assert multiplications(diagonal((LANES, 3), -1.0), right) == 0
    with pytest.raises(AssertionError):
        multiplications(right, right)


def contraction() -> Product:
    """A known (4, 3) matrix applied to each of a million vectors."""
    weights = torch.arange(1.0, 13.0, dtype=torch.float64).reshape(4, 3)
    full = (LANES, 4, 3)
    map_ = product(
        axis_sum(full, [2]),
        diagonal(full, weights.expand(full)),
        broadcast(full, (LANES, 1, 3)),
        reshape((LANES, 1, 3), (LANES, 3)),
    )
    assert isinstance(map_, Product)
    return map_


def test_lanes_cost_no_memory() -> None:
    """A million lanes: what is the same in all of them is stored once."""
    map_ = contraction()
    (weights,) = (f.factors for f in map_.factors if isinstance(f, Diagonal))
    assert stored_elements(weights) == 12
    both = product(map_.factors[1], diagonal((LANES, 4, 3), 2.0))
    assert isinstance(both, Diagonal)
    assert stored_elements(both.factors) == 12
    assert stored_elements(add(both, both).factors) == 12
    for counts, each in ((row_counts(map_), 3), (column_counts(map_), 4)):
        assert stored_elements(counts) <= 12
        assert bool((stored(counts) == each).all())
    assert stored_elements(row_sums(map_)) <= 12
    assert stored(row_sums(map_)).reshape(-1).tolist() == [6.0, 15.0, 24.0, 33.0]
    assert (
        stored_elements(
            gather((LANES, 3), 1, torch.tensor([2, 0])).run(torch.ones(3).expand(LANES, 3))
        )
        == 2
    )


# Simplifications.


def test_neighbors_are_joined() -> None:
    shape = (2, 3, 4)
    ones = torch.ones(shape, dtype=torch.float64)
    two = diagonal(shape, 2.0)
    assert isinstance(product(two, two), Scaled)
    assert isinstance(product(two, diagonal(shape, ones)), Diagonal)
    half = product(two, diagonal(shape, 0.5))
    assert isinstance(half, Scaled)
    assert half.factor == 1
    assert product(axis_sum((3, 4), [0]), axis_sum(shape, [0])).axes == (0, 1)
    assert product(axis_sum((2, 4), [1]), axis_sum(shape, [1])).axes == (1, 2)
    assert isinstance(product(reshape((24,), (6, 4)), reshape((6, 4), shape)), IndexMap)
    every = dense(shape, shape, [2], [2])
    for joined in (product(every, two), product(two, every), product(every, diagonal(shape, ones))):
        assert isinstance(joined, Dense)
    assert isinstance(product(every, every), Dense)
    assert isinstance(product(every, diagonal(shape, ones.tril())), Product)
    assert isinstance(product(dense((2,), (0,), [0], [0]), dense((0,), (2,), [0], [0])), Zero)


def test_a_product_of_nothing() -> None:
    """What cancels out inside of a product is gone, and zero is zero from end to end."""
    eye = identity((3,))
    assert isinstance(product(eye, eye), Scaled)
    flip = index_map(lambda t: t.flip(0), (3,), (3,), False)
    minus = diagonal((3,), -1.0)
    assert isinstance(product(flip, minus, minus, flip), IndexMap)
    even = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    assert isinstance(product(flip, Zero((3,), (4,))), Zero)
    assert pattern(product(flip, diagonal((3,), even), diagonal((3,), 1 - even))).nnz == 0
    with pytest.raises(AssertionError, match=r"meets"):
        product(eye, identity((4,)))


def test_diagonals_are_added_up() -> None:
    shape = (2, 3)
    factors = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64).expand(shape)
    assert isinstance(add(identity(shape), diagonal(shape, -1.0)), Zero)
    assert isinstance(add(identity(shape), diagonal(shape, factors)), Diagonal)
    flip = index_map(lambda t: t.flip(0), shape, shape, False)
    total = add(flip, identity(shape), flip, diagonal(shape, factors))
    assert isinstance(total, Sum)
    assert len(total.parts) == 3
    assert isinstance(add(add(flip, Zero(shape, shape)), Zero(shape, shape)), IndexMap)
    with pytest.raises(AssertionError, match=r"other shapes"):
        add(identity((2,)), identity((3,)))


def test_a_scatter_that_only_moves_is_an_index_map() -> None:
    assert isinstance(scatter((4, 2), (3, 2), 0, torch.tensor([3, 0, 1])), IndexMap)
    assert isinstance(scatter((2, 3), (2, 3), 1, torch.tensor([2, 0, 1])), IndexMap)
    assert isinstance(scatter((2, 3), (2, 3), 1, torch.arange(3)), Scaled)
    assert isinstance(scatter((4,), (3,), 0, torch.tensor([3, 0, 3])), Scatter)
    # Turning a movement around twice is a movement; a broadcast becomes a sum.
    assert isinstance(transpose(index_map(lambda t: t[1:], (3,), (4,), False)), IndexMap)
    assert isinstance(transpose(broadcast((5, 3), (3,))), AxisSum)


def test_rank_bound() -> None:
    low = product(dense((50,), (2,)), dense((2,), (40,)))
    assert rank_bound(low) == 40  # joined: nothing is known of a dense map
    flip = index_map(lambda t: t.flip(0), (2,), (2,), False)
    low = product(dense((50,), (2,)), flip, dense((2,), (40,)))
    assert rank_bound(low) == 2
    assert rank_bound(add(low, low, low)) == 6
    assert rank_bound(Zero((5,), (5,))) == 0
    assert rank_bound(axis_sum((5, 3), [0])) == 3


def test_fixed_is_its_matrix() -> None:
    rows, columns = torch.tensor([2, 0, 2, 1]), torch.tensor([0, 1, 4, 4])
    factors = torch.tensor([1.0, UNKNOWN, 3.0, 4.0], dtype=torch.float64)
    matrix = pattern(fixed((2, 3), (2, 5), rows, columns, factors)).toarray()
    block = np.zeros((3, 5))
    block[rows, columns] = factors
    assert same(matrix[:3, :5], block)
    assert same(matrix[3:, 5:], block)
    assert not matrix[:3, 5:].any()
    assert not matrix[3:, :5].any()


# Lanes.


@given(cases(MIXED, 3))
def test_lanes_are_block_diagonal(case: Case) -> None:
    map_ = case.map
    entries = case.matrix.reshape((*map_.shape_out, *map_.shape_in))
    shift = len(map_.shape_out)
    for along in lanes(map_):
        size = map_.shape_in[along.axis_in]
        assert map_.shape_out[along.axis_out] == size
        blocks = np.moveaxis(entries, (along.axis_out, shift + along.axis_in), (0, 1))
        for i in range(size):
            for j in range(size):
                if i != j:
                    assert not blocks[i, j].any()
        if along.same:
            pattern_blocks = pattern(map_).toarray().reshape(entries.shape)
            kinds = np.moveaxis(pattern_blocks, (along.axis_out, shift + along.axis_in), (0, 1))
            for i in range(size):
                assert same(kinds[i, i], kinds[0, 0])


def test_lanes_that_must_be_proved() -> None:
    """What a batch, a Kronecker product and an all-to-all within it look like."""
    assert lanes(contraction()) == (Along(0, 0, True),)
    shape = (2, 3, 4)
    assert lanes(identity(shape)) == tuple(Along(i, i, True) for i in range(3))
    each = diagonal(shape, torch.rand(1, 3, 1, dtype=torch.float64).expand(shape))
    assert lanes(each) == (Along(0, 0, True), Along(1, 1, False), Along(2, 2, True))
    turned = index_map(lambda t: t.permute(2, 0, 1), (4, 2, 3), shape, False)
    assert lanes(turned) == (Along(1, 0, True), Along(2, 1, True), Along(0, 2, True))
    assert lanes(index_map(lambda t: t.flip(1), shape, shape, False)) == (
        Along(0, 0, True),
        Along(2, 2, True),
    )
    assert lanes(index_map(torch.tril, (3, 4), (3, 4), True)) == (
        Along(0, 0, False),
        Along(1, 1, False),
    )
    assert lanes(dense((5, 2, 6), (2, 3, 7), [0, 2], [1, 2])) == (Along(1, 0, False),)
    assert lanes(scatter((2, 5), (2, 7), 1, torch.zeros(7, dtype=torch.int64))) == (
        Along(0, 0, True),
    )
    both = add(identity((3, 3)), index_map(lambda t: t.flip(0), (3, 3), (3, 3), False))
    assert lanes(both) == (Along(1, 1, True),)
    assert lanes(dense((3, 3), (3, 3))) == ()
