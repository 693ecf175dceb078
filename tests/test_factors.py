"""Small factorizations in C: cases x the law that they give what LAPACK and the row loop give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from accumulating import plan_of, run
from laws import oracle_jacobian, quiet, same, value
from test_kernel import cache, kernel_of  # noqa: F401
from torchjac.errors import PlanRefused

linalg = torch.linalg
Function = Callable[[Tensor], Tensor]


def square(x: Tensor, n: int) -> Tensor:
    """A matrix whose largest pivots are not on its diagonal."""
    matrix = x[..., : n * n].unflatten(-1, (n, n))
    return matrix + 4 * torch.eye(n, dtype=x.dtype).flip(0)


def positive(x: Tensor, n: int) -> Tensor:
    """A matrix that is positive definite."""
    matrix = x[..., : n * n].unflatten(-1, (n, n))
    return matrix @ matrix.mT + torch.eye(n, dtype=x.dtype)


def wide(x: Tensor, n: int) -> Tensor:
    """Right sides."""
    return x[..., : 2 * n].unflatten(-1, (n, 2)).sin()


KNOWN = value(36, seed=5)
CASES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "solve": lambda x, n: linalg.solve(square(x, n), x[..., :n].cos()),
    "solve, more sides": lambda x, n: linalg.solve(square(x, n), wide(x, n)),
    "solve, transposed": lambda x, n: linalg.solve(square(x, n).mT, wide(x, n)),
    "solve, from the right": lambda x, n: linalg.solve(square(x, n), wide(x, n).mT, left=False),
    "solve, known matrix": lambda x, n: linalg.solve(square(KNOWN, n), x[..., :n, None])[..., 0],
    "solve, known sides": lambda x, n: linalg.solve(
        square(x, n), torch.ones(*x.shape[:-1], n, dtype=x.dtype)
    ),
    "inv": lambda x, n: linalg.inv(square(x, n)),
    "det": lambda x, n: linalg.det(square(x, n)),
    "det, transposed": lambda x, n: linalg.det(square(x, n).mT),
    "slogdet": lambda x, n: linalg.slogdet(square(x, n))[1],
    "logdet": lambda x, n: torch.logdet(positive(x, n)),
    "cholesky": lambda x, n: linalg.cholesky(positive(x, n)),
    "cholesky, upper": lambda x, n: linalg.cholesky(positive(x, n), upper=True),
    "cholesky_solve": lambda x, n: torch.cholesky_solve(
        wide(x, n), linalg.cholesky(positive(x, n))
    ),
    "solve_triangular": lambda x, n: linalg.solve_triangular(
        positive(x, n).tril(), wide(x, n), upper=False
    ),
    "solve_triangular, upper, unit, right": lambda x, n: linalg.solve_triangular(
        positive(x, n), wide(x, n).mT, upper=True, left=False, unitriangular=True
    ),
    "lu_solve": lambda x, n: linalg.lu_solve(*linalg.lu_factor(square(x, n)), wide(x, n)),
}


def flat(case: str, n: int, batched: bool) -> Function:
    """The case, with one axis for the result of each sample."""
    f = CASES[case]
    return lambda x: f(x, n).reshape(*x.shape[: int(batched)], -1)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("case", CASES)
def test_one(case: str, n: int) -> None:
    """Wherever the largest pivots are."""
    f = flat(case, n, False)
    plan, _ = plan_of(f, value(36))
    plan = kernel_of(plan, f, value(36))
    with quiet():
        for seed in range(4):
            x = 3 * value(36, seed=seed)
            same(run(plan, f, x), oracle_jacobian(f)(x))


@pytest.mark.parametrize("samples", [3, 40])
@pytest.mark.parametrize("case", CASES)
def test_batches(case: str, samples: int) -> None:
    f = flat(case, 3, True)
    x = value(samples, 9)
    plan, _ = plan_of(f, x, batched=True)
    plan = kernel_of(plan, f, x)
    want = oracle_jacobian(f, 0, batched=True)
    with quiet():
        y = 3 * value(samples, 9, seed=4)
        same(
            run(
                plan,
                f,
                y,
            ),
            want(y),
        )


def test_single_precision() -> None:
    f = flat("inv", 4, False)
    x = value(36, dtype=torch.float32)
    plan, _ = plan_of(f, x)
    plan = kernel_of(plan, f, x)
    same(run(plan, f, 2 * x), oracle_jacobian(f)(2 * x))


@pytest.mark.parametrize("case", ["inv", "cholesky", "solve"])
def test_what_has_no_factors_is_left_to_passes(case: str) -> None:
    """Singular, or not positive definite: torch says what that is."""
    f = {
        "inv": lambda x: linalg.inv(x.view(2, 2)),
        "cholesky": lambda x: linalg.cholesky(x.view(2, 2) + x.view(2, 2).mT),
        "solve": lambda x: linalg.solve(x.view(2, 2), x[:2]),
    }[case]
    good = torch.tensor([4.0, 1, 1, 5], dtype=torch.float64)
    plan, _ = plan_of(f, good)
    plan = kernel_of(plan, f, good)
    same(run(plan, f, 2 * good), oracle_jacobian(f)(2 * good))
    bad = torch.tensor([-1.0, -2, -2, -4], dtype=torch.float64)
    assert run(plan, f, bad) is None


def test_large_ones_are_left_to_lapack() -> None:
    f = flat("inv", 9, False)
    plan, _ = plan_of(f, value(81))
    with pytest.raises(PlanRefused, match="larger than 8"):
        kernel_of(plan, f, value(81))
