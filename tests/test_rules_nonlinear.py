"""What a backward may do besides being linear: clip, mask, branch, loop.

A custom `autograd.Function` may apply anything to its cotangent. Where zero stays zero the rule is
diagonal; where it does not, every row of J has the entry, and the pattern says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop
from torch.nn import functional as F

from laws import value
from patterns import check, dense_pattern, interpreted, numeric, pattern_of
from test_rules_linear import backward_is
from torchjac.errors import CaptureRefused
from torchjac.linear.rules import RULES, nonlinear

higher_order = importlib.import_module("torch._higher_order_ops")

CLIPPED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "clamp": lambda g: g.clamp(-0.5, 0.5),
    "clamp, tensors": lambda g: g.clamp(-torch.ones(4).double(), torch.ones(4).double()),
    "clamp_min": lambda g: g.clamp_min(0),
    "sign": torch.sign,
    "mask of itself": lambda g: g * (g > 0),
    "where of itself": lambda g: torch.where(g > 0, g, torch.zeros_like(g)),
    "square": lambda g: g * g,
    "power": lambda g: g**3,
    "maximum": lambda g: torch.maximum(g, torch.zeros_like(g)),
    "above a limit": lambda g: g * (g > 0.1),
    "to integers and back": lambda g: (2 * g).to(torch.int64).to(torch.float64),
    "nan_to_num": torch.nan_to_num,
    "tanh": torch.tanh,
}
SPREAD: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "cos": torch.cos,
    "plus one": lambda g: g + 1,
    "clamp above zero": lambda g: g.clamp(0.5, 1.0),
    "below a limit": lambda g: (g < 0.1).to(g.dtype),
    "not": lambda g: (g == 0).to(g.dtype),
    "softmax": lambda g: torch.softmax(g, 0),
    "power of": lambda g: 2.0**g,
    "zeroth power": lambda g: g**0,
    "reciprocal": lambda g: 1 / (g + 2),
    "threshold": lambda g: F.threshold(g, 0.5, 7.0),
}


@pytest.mark.parametrize("name", CLIPPED)
def test_nonlinear_backward_that_vanishes_is_diagonal(name: str) -> None:
    """A custom backward may clip or mask its cotangent: zero stays zero, element by element."""
    function = backward_is(CLIPPED[name], 4)
    for scope in ("global", "local"):
        pattern = pattern_of(function, value(4), scope=scope)
        np.testing.assert_array_equal(pattern != 0, np.eye(4) != 0)
        assert np.isnan(pattern.diagonal()).all()  # not linear: no entry is a constant


@pytest.mark.parametrize("name", SPREAD)
def test_nonlinear_backward_that_does_not_vanish_is_everything(name: str) -> None:
    """Where a zero cotangent gives something, every row of J has it: reported, never a zero."""
    function = backward_is(SPREAD[name], 4)
    for scope in ("global", "local"):
        interpretation = interpreted(function, value(4), scope=scope)[1]
        assert interpretation.assumed
        assert np.isnan(pattern_of(function, value(4), scope=scope)).all()
    assert (numeric(function, value(4)) != 0).sum() > 4


VANISHING = [
    operation
    for operation, rule in RULES.items()
    if rule
    in (
        nonlinear.zero_at_zero,
        nonlinear.zero_at_zeros,
        nonlinear.logical_and,
        nonlinear.zero_reduction,
    )
]


@pytest.mark.parametrize("operation", VANISHING, ids=str)
def test_functions_that_are_said_to_vanish_do(operation: Any) -> None:
    """f(0) = 0 for every operation that a table says it of."""
    kind = torch.bool if "bitwise" in str(operation) else torch.float64
    zeros = torch.zeros(2, 3, dtype=kind)
    arguments: dict[str, Any] = {"decimals": 2, "p": 2, "dim": [1]}
    arguments["other"] = 0 if operation._overloadname == "Scalar" else zeros
    if operation._overloadname in ("dim", "dim_int", "default"):
        arguments["dim"] = 1
    required = [a.name for a in operation._schema.arguments[1:] if not a.has_default_value()]
    assert not operation(zeros, **{name: arguments[name] for name in required}).any()


def test_a_product_of_nothing_is_one() -> None:
    """The one element that vanishes with its cotangent only as long as there is one."""
    interpretation = interpreted(backward_is(lambda g: g[:, :0].prod(1), 3, 2), value(3))[1]
    assert interpretation.assumed


def test_both_branches_of_a_condition_count() -> None:
    """`torch.cond` in a traced derivative: the union; known where the branches agree."""

    def function(x: Tensor) -> Tensor:
        return torch.cond(
            x.sum() > 0, lambda x: 2 * x + 3 * x.flip(0), lambda x: 2 * x * x[:1], (x,)
        )

    pattern = pattern_of(function, value(4))
    for point in (torch.ones(4).double(), -torch.ones(4).double()):
        jacobian = numeric(function, point)
        assert not ((jacobian != 0) & (pattern == 0)).any()
    expected = np.eye(4) + np.eye(4)[::-1]
    expected[:, 0] = 1
    np.testing.assert_array_equal(pattern != 0, expected != 0)


def test_branches_that_agree_are_known() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: 2 * x, lambda x: x + x, (x,))

    np.testing.assert_array_equal(pattern_of(function, value(3)), 2 * np.eye(3))


def test_the_branch_of_a_graph() -> None:
    """A graph that exists went one way."""

    def function(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.flip(0).sin(), (x,))

    ones = torch.ones(3, dtype=torch.float64)
    np.testing.assert_array_equal(pattern_of(function, ones, scope="local") != 0, np.eye(3))
    flipped = pattern_of(function, -ones, scope="local") != 0
    np.testing.assert_array_equal(flipped, np.eye(3)[::-1])


class TestWhile:
    """`while_loop` is unrolled; how often it turns must not depend on values."""

    def test_a_known_number_of_turns(self) -> None:
        def function(x: Tensor) -> Tensor:
            turn = lambda i, v: (i + 1, v * v.roll(1))  # noqa: E731
            return while_loop(lambda i, v: i < 2, turn, (torch.tensor(0), x))[1]

        expected = sum(np.roll(np.eye(8), -k, 1) for k in range(3))
        np.testing.assert_array_equal(pattern_of(function, value(8)) != 0, expected != 0)

    def test_turns_that_depend_on_values(self) -> None:
        def function(x: Tensor) -> Tensor:
            turn = lambda v: (v * v.roll(1) + 1,)  # noqa: E731
            return while_loop(lambda v: v.sum() < 20, turn, (x,))[0]

        with pytest.raises(CaptureRefused, match="values"):
            pattern_of(function, value(8))
        local = pattern_of(function, value(8), scope="local")
        np.testing.assert_array_equal(local != 0, numeric(function, value(8)) != 0)


def test_a_branch_that_does_not_vanish_is_everything() -> None:
    """A condition inside a custom backward, one branch of which adds one."""

    def operation(g: Tensor, w: Tensor) -> Tensor:
        return torch.cond(w.sum() > 0, lambda g: g + 1, lambda g: 2 * g, (g,))

    derivative, interpretation = interpreted(backward_is(operation, 3), value(3), value(3))
    assert interpretation.assumed
    assert np.isnan(dense_pattern(derivative, interpretation)).all()


def test_slices_of_a_map_are_lanes() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return higher_order.map(lambda row, all_: row.sin() * all_, x, y)

    check(function, value(4, 3), value(3), argnums=(0, 1))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_scan_is_causal() -> None:
    """Step by step: what is carried on depends on what came before, and on nothing else."""

    def function(x: Tensor) -> Any:
        def step(carry: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
            return carry * row + row.sin(), 2 * carry

        return higher_order.scan(step, x[0].clone(), x)

    function(value(4, 2))  # torch traces a scan within a trace only after it has seen it once
    pattern = pattern_of(function, value(4, 2)) != 0
    np.testing.assert_array_equal(pattern, numeric(function, value(4, 2)) != 0)
