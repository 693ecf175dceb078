"""The cases in which another detector of sparsity is unsound, raises, or says too much.

Each is checked for soundness against the row loop at several points, and where an exact pattern
is possible for every input, its number of entries is the true one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torchjac
from laws import oracle_jacobian, value


class Rounded(torch.autograd.Function):
    """Rounds, and passes the gradient straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


KERNEL = torch.tensor([[[0.5, 0.0, -1.5]]], dtype=torch.float64)
COEFFICIENTS = torch.linspace(1, 2, 8, dtype=torch.float64)
MATRIX = value(4, 4, seed=3) + 4 * torch.eye(4, dtype=torch.float64)


def by_loop(x: Tensor) -> Tensor:
    """Each element is reached by an index that a loop counts."""
    return torch.stack([x[i] * (i + 1) for i in range(len(x))])


def spd(x: Tensor) -> Tensor:
    """A batch of symmetric positive definite matrices."""
    return x @ x.mT + 3 * torch.eye(3, dtype=x.dtype)


# Function, shape of its argument, entries (None: only soundness can be asked of a global pattern).
CASES: dict[str, tuple[Callable[..., Any], tuple[int, ...], int | None]] = {
    "straight-through estimator": (Rounded.apply, (8,), 8),
    "difference of a running sum": (lambda x: torch.diff(torch.cumsum(x, 0)), (8,), 7),
    "a sum added and taken away": (lambda x: x + x.sum() - x.sum(), (8,), 8),
    "constant diagonal matrix": (lambda x: torch.diag(COEFFICIENTS) @ x, (8,), 8),
    "diagonal matrix of the input": (lambda x: torch.diag(x.sin()) @ x, (8,), 8),
    "zero tap of a convolution": (
        lambda x: F.conv1d(x.reshape(1, 1, -1), KERNEL).reshape(-1),
        (14,),
        24,
    ),
    "convolution with its kernel": (
        lambda k: F.conv1d(value(1, 1, 9), k.reshape(1, 1, -1)),
        (3,),
        21,
    ),
    "loop index": (by_loop, (8,), 8),
    "detach": (lambda x: x * x.flip(0).detach(), (8,), 8),
    "cast to integers": (lambda x: x.to(torch.int64).to(x.dtype) + 0 * x, (8,), 0),
    "fft": (lambda x: torch.view_as_real(torch.fft.fft(x, dim=-1)), (3, 5), None),
    "solve, a constant matrix": (lambda x: torch.linalg.solve(MATRIX, x), (4, 3), 48),
    "solve, a batch": (lambda x: torch.linalg.solve(spd(x), x), (2, 3, 3), 2 * 9 * 9),
    "inverse": (lambda x: torch.linalg.inv(spd(x)), (2, 3, 3), 2 * 9 * 9),
    "cholesky, a batch": (lambda x: torch.linalg.cholesky(spd(x)), (2, 3, 3), None),
    "matrix exponential": (lambda x: torch.linalg.matrix_exp(x), (2, 2, 2), None),
    "average pooling": (lambda x: F.avg_pool1d(x.reshape(1, 1, -1), 2), (8,), 8),
    "max pooling": (lambda x: F.max_pool1d(x.reshape(1, 1, -1), 2), (8,), None),
    "where, both branches": (lambda x: torch.where(x > 0, x, x.flip(0)), (8,), 16),
    "sort": (lambda x: x.sort().values, (6,), 36),
    "softmax, a batch": (lambda x: x.softmax(-1), (3, 4), 48),
    "layer norm, a batch": (lambda x: F.layer_norm(x, (4,)), (3, 4), 48),
    "transposed triangular solve": (
        lambda x: torch.linalg.solve_triangular(MATRIX.tril(), x, upper=False),
        (4, 3),
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_pattern_is_sound(name: str) -> None:
    """Every entry that is nonzero somewhere is in the pattern."""
    f, shape, _ = CASES[name]
    pattern = torchjac.jacobian(f).pattern(value(*shape))
    assert pattern.scope == "global"
    mask = pattern.to_dense()
    for seed in range(3):
        x = value(*shape, seed=seed)
        numbers = oracle_jacobian(f)(x).reshape(mask.shape)
        assert not (numbers[~mask] != 0).any()


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case[2] is not None])
def test_pattern_is_exact(name: str) -> None:
    """No entry too many."""
    f, shape, entries = CASES[name]
    assert torchjac.jacobian(f).pattern(value(*shape)).nnz == entries


@pytest.mark.parametrize("name", CASES)
def test_batch_axes_are_lanes(name: str) -> None:
    """Linear algebra, transforms and normalization keep the samples of a batch apart."""
    f, shape, _ = CASES[name]
    if ", a batch" not in name and name not in ("inverse", "fft"):
        return  # its leading axis is no batch
    assert torchjac.jacobian(f).pattern(value(*shape)).batched


def test_graph_patterns_are_local() -> None:
    """On a graph that exists the branch taken counts, and a zero factor is a zero."""
    x = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    y = torch.where(x > 0, x, x.flip(0)) * torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    pattern = torchjac.pattern(y, x)
    assert pattern.scope == "local"
    assert pattern.to_dense().tolist() == [
        [True, False, False],
        [False, True, False],
        [False, False, False],
    ]


def test_rows_that_share_unknown_numbers_do_not_cancel() -> None:
    """Both elements of a row depend on the same rows of J, but not by the same numbers."""

    def f(x: Tensor) -> Tensor:
        other = x.detach().sin()
        return (x - x.mean(1, keepdim=True)) @ other.mT

    pattern = torchjac.jacobian(f).pattern(value(3, 2))
    want = oracle_jacobian(f)(value(3, 2)).reshape(9, 6)
    assert pattern.scope == "global"
    assert not (want != 0)[torch.from_numpy(pattern.to_scipy().toarray() == 0)].any()
    assert pattern.nnz == 18


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_the_middle_cancels_nothing(dtype: torch.dtype) -> None:
    """2049 is 2048 there."""

    def f(x: Tensor) -> Tensor:
        low = x.to(dtype)
        return (low * 2049.0 - low * 2048.0).float() - x

    assert torchjac.jacobian(f).pattern(torch.ones(3)).nnz == 3
