"""Bottlenecks: multiplications of branchy programs against those of the best order by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from accumulating import plan_of
from laws import oracle_jacobian, same, value


def matrices(*sizes: int) -> list[Tensor]:
    """Layers between values of these sizes."""
    return [value(b, a, seed=a + b) / a for a, b in pairwise(sizes)]


def chain(x: Tensor, layers: Sequence[Tensor]) -> Tensor:
    """Layers with a tanh between."""
    for layer in layers[:-1]:
        x = torch.tanh(layer @ x)
    return layers[-1] @ x


N = 300
ONE, OTHER = matrices(N, 250, 10, 250, N), matrices(N, 200, 15, 150, N)
JOINED = matrices(25, 150, N)


def encoded(x: Tensor, layers: Sequence[Tensor]) -> Tensor:
    return torch.tanh(chain(x, layers[:2]))


def decoded(h: Tensor) -> Tensor:
    return chain(h, ONE[2:])


def twice(x: Tensor) -> Tensor:
    h = encoded(x, ONE)
    return decoded(h) + torch.sin(decoded(h * h))


def normed(x: Tensor) -> Tensor:
    h = encoded(x, ONE)
    return decoded((h - h.mean()) / h.std())


# Multiplications of matrices: down to the bottleneck from one side, up to it from the other, and
# the product of both; `ONE` takes 250 (300 + 300) 10 + 300 300 10.
_ONE = 250 * 600 * 10 + N * N * 10
_OTHER = 200 * N * 15 + 150 * N * 15 + N * N * 15
CASES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "chain": (lambda x: chain(x, ONE), _ONE),
    "two branches": (lambda x: chain(x, ONE) + chain(x, OTHER), _ONE + _OTHER),
    "a way around": (lambda x: x + chain(x, ONE), _ONE),
    "one after the other": (
        lambda x: (lambda y: y + chain(y, OTHER))(x + chain(x, ONE)),
        _ONE + _OTHER + N * 10 * 200 + 200 * 10 * 15 + N * 15 * 10,
    ),
    "used twice": (twice, _ONE + 250 * N * 10),
    "normed": (normed, _ONE),
    "parts": (
        lambda x: decoded((lambda h: torch.cat([h[:4].sin(), h[4:].cos()]))(encoded(x, ONE))),
        _ONE,
    ),
    "joined": (
        lambda x: chain(torch.cat([encoded(x, ONE), encoded(x, OTHER)]), JOINED),
        250 * N * 10 + 200 * N * 15 + 150 * N * 25 + N * N * 25,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_near_the_best_order(name: str) -> None:
    """Within an eighth of the best order: every branch is split at its bottleneck."""
    f, best = CASES[name]
    plan, J = plan_of(f, value(N))
    same(J, oracle_jacobian(f)(value(N)))
    fewest = min(way.work.multiplications for way in plan.programs)
    assert fewest < 1.125 * best + 20 * N
    assert plan.program.waists
