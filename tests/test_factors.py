"""What is known of factors: zeros that are proved, numbers that were rounded, strides of 0."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mapcases import same, stored_elements
from torchjac.structure.maps import UNKNOWN, plus, times
from torchjac.structure.maps.factors import on_axis, on_support, stored

LANES = 10**6

DYADIC = st.sampled_from([1.0, -1.0, 0.5, -2.0, 3.0, 0.25, -1.5])
ROUNDED = st.sampled_from([0.1, -0.1, 0.3, 1 / 3, -1 / 41, 1 / 47, 1e-8, 16777217.0, 41.0, 47.0])


@given(st.lists(st.lists(DYADIC | ROUNDED, min_size=1, max_size=3), min_size=1, max_size=4))
def test_a_zero_is_a_zero_in_float32_too(terms: list[list[float]]) -> None:
    """A sum of products of constants, as a program in float32 adds them up."""
    total, single = 0.0, np.float32(0)
    for term in terms:
        made, path = 1.0, np.float32(1)
        for factor in term:
            made = times(made, factor)
            path = np.float32(path * np.float32(factor))
        total = plus(total, made)
        single = np.float32(single + path)
    assert single == 0 or total != 0


def test_exact_numbers_cancel_and_rounded_ones_do_not() -> None:
    assert plus(0.75, -0.75) == 0
    assert math.isnan(plus(0.1, -0.1))
    assert times(1 / 41, 41.0) != 1  # it is 1 in float64 and not in float32
    assert times(1 / 41, 41.0) == pytest.approx(1)
    assert plus(times(1 / 41, 41.0), -1.0) != 0
    assert times(0.0, UNKNOWN) == 0
    assert math.isnan(times(1e-200, 1e-200))
    assert times(math.inf, 0.0) == 0
    grid = torch.tensor([[1.0, 0.1, UNKNOWN, 0.0]], dtype=torch.float64)
    found = plus(grid, -grid)
    assert isinstance(found, Tensor)
    assert found[0, 0] == 0
    assert found[0, 1:3].isnan().all()
    assert found[0, 3] == 0


@given(
    st.lists(DYADIC | ROUNDED | st.just(0.0) | st.just(UNKNOWN), min_size=1, max_size=4),
    DYADIC | ROUNDED,
)
def test_tensors_of_factors_are_numbers_side_by_side(numbers: list[float], other: float) -> None:
    tensor = torch.tensor(numbers, dtype=torch.float64)
    for function in (times, plus):
        alone = torch.tensor([function(x, other) for x in numbers], dtype=torch.float64)
        for given_ in (other, torch.full_like(tensor, other)):
            found = torch.as_tensor(function(tensor, given_), dtype=torch.float64)
            assert same(found.numpy(), alone.numpy())


def test_what_repeats_is_computed_once() -> None:
    wide = torch.tensor([1.0, 2.0]).expand(LANES, 2)
    assert stored_elements(on_support(torch.add, wide, wide)) == 2
    assert stored_elements(on_axis(lambda t: t.flip(1), wide, 1)) == 2
    assert on_axis(lambda t: t.narrow(1, 0, 1), wide, 1).shape == (LANES, 1)
    assert tuple(stored(wide).shape) == (1, 2)
