"""``hessian`` follows ``torch.func.hessian``, and is symmetric to rounding for a scalar f."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.func import hessian as func_hessian

import torchjac
from graphs import OldStyle
from laws import leaf, same, value
from torchjac.errors import PlanRefused
from torchjac.testing import force_plan


def scalar(x: Tensor, y: Tensor) -> Tensor:
    """Couples its arguments."""
    return (x.sin().sum() * y.cumsum(0).square()).sum().tanh() + (x[0] * y[0]).exp()


@pytest.mark.parametrize("argnums", [0, 1, -1, (0,), (0, 1), (1, 0)])
def test_argnums(argnums: int | tuple[int, ...]) -> None:
    x, y = value(3), value(2, seed=1)
    # torch.func.hessian gives zeros for negative argnums (torch 2.13), so they are made positive.
    counted = argnums % 2 if isinstance(argnums, int) else argnums
    same(torchjac.hessian(scalar, argnums)(x, y), func_hessian(scalar, counted)(x, y))


def test_pytrees() -> None:
    def f(p: dict[str, Any]) -> dict[str, Tensor]:
        return {"loss": (p["w"] @ p["b"][0]).tanh().sum(), "reg": p["w"].square().sum()}

    p = {"w": value(2, 3), "b": [value(3, seed=1)]}
    same(torchjac.hessian(f)(p), func_hessian(f)(p))


@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3), (0,)])
def test_shapes(shape: tuple[int, ...]) -> None:
    x = value(*shape)

    def f(x: Tensor) -> Tensor:
        return (x.sin() * x).sum() ** 2

    # torch.func.hessian itself fails on an empty input.
    expected = func_hessian(f)(x) if x.numel() else x.new_zeros(shape + shape)
    same(torchjac.hessian(f)(x), expected)


def test_vector_function() -> None:
    """Not scalar: the Hessian of each output, as in torch.func."""

    def f(x: Tensor) -> Tensor:
        return torch.stack([x.prod(), x.sin().sum(), x[0] * x[1]])

    same(torchjac.hessian(f)(value(3)), func_hessian(f)(value(3)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_symmetric_to_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 20), nn.Softplus(), nn.Linear(20, 1)
    )
    net = net.to(dtype)
    H = torchjac.hessian(lambda x: net(x).sum())(value(6, dtype=dtype))
    eps = torch.finfo(dtype).eps
    assert (H - H.T).abs().max() <= 100 * eps * H.abs().max()
    same(H, func_hessian(lambda x: net(x).sum())(value(6, dtype=dtype)))


def test_linear_and_constant_functions() -> None:
    """Second derivatives that are zero everywhere are zeros and quiet: nothing is wrong with f."""
    x = value(3)
    same(torchjac.hessian(lambda x: 2 * x.sum())(x), torch.zeros(3, 3, dtype=torch.float64))
    same(
        torchjac.hessian(lambda x, y: x.sum() * y.sum(), (0, 1))(x, x),
        func_hessian(lambda x, y: x.sum() * y.sum(), (0, 1))(x, x),
    )


def test_input_that_f_does_not_use() -> None:
    with pytest.warns(torchjac.UnusedInputWarning):
        H = torchjac.hessian(lambda x: x.new_ones(()))(value(2))
    same(H, torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(torchjac.UnusedInputError):
        torchjac.hessian(lambda x: x.new_ones(()), strict=True)(value(2))


def test_old_style_function() -> None:
    """torch.func refuses it; its backward is differentiable."""
    x = value(3)
    H = torchjac.hessian(lambda x: OldStyle.apply(x).sum() ** 2)(x)
    same(H, func_hessian(lambda x: x.sin().sum() ** 2)(x))


def test_value_and() -> None:
    """value_and gives f's value with the Hessian."""
    x = value(3)
    out, H = torchjac.hessian(lambda x: x.sin().sum() ** 2).value_and(x)
    same(out, x.sin().sum() ** 2)
    same(H, func_hessian(lambda x: x.sin().sum() ** 2)(x))


def test_create_graph() -> None:
    x = leaf(3)

    def f(x: Tensor) -> Tensor:
        return (x.sin() * x.prod()).sum()

    H = torchjac.hessian(f, create_graph=True)(x)
    (got,) = torch.autograd.grad(H.square().sum(), x)
    same(got, torch.func.grad(lambda x: func_hessian(f)(x).square().sum())(x.detach()))
    assert not torchjac.hessian(f)(x).requires_grad


def test_vmap() -> None:
    xs = value(4, 3)

    def f(x: Tensor) -> Tensor:
        return (x.sin() * x.prod()).sum()

    same(torch.vmap(torchjac.hessian(f))(xs), torch.vmap(func_hessian(f))(xs))


def test_batched() -> None:
    """One Hessian per sample of a function that takes the whole batch."""
    xs = value(5, 3)

    def f(xs: Tensor) -> Tensor:
        return (xs.sin() * xs.prod(-1, keepdim=True)).sum(-1)

    expected = torch.vmap(func_hessian(lambda x: f(x[None])[0]))(xs)
    same(torchjac.hessian(f, batched=True)(xs), expected)


def test_batched_coupled() -> None:
    with pytest.raises(torchjac.CoupledBatchError):
        torchjac.hessian(lambda xs: (xs * xs.mean(0)).sum(-1), batched=True)(value(5, 3))


def test_parameters() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    params = {k: p.detach() for k, p in net.named_parameters()}
    x = value(4, 2)

    def loss(p: dict[str, Tensor]) -> Tensor:
        return functional_call(net, p, (x,)).square().mean()

    same(torchjac.hessian(loss)(params), func_hessian(loss)(params))


@pytest.mark.parametrize("chunk", [1, 2, 1000])
def test_chunks(chunk: int) -> None:
    x, y = value(3), value(2, seed=1)
    with force_plan(mode="reverse", chunk=chunk):
        got = torchjac.hessian(scalar, (0, 1))(x, y)
    same(got, func_hessian(scalar, (0, 1))(x, y))


def test_under_no_grad() -> None:
    with torch.no_grad():
        H = torchjac.hessian(lambda x: x.prod() ** 2)(value(3))
    same(H, func_hessian(lambda x: x.prod() ** 2)(value(3)))


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.LayerNorm((3, 4))], ids=str)
def test_norms(norm: nn.Module) -> None:
    """Forward mode, which differentiates their backward pass, is not used for what is kept."""
    norm = norm.double()

    def f(x: Tensor) -> Tensor:
        return norm(x.sin().expand(3, 4)).exp().sum(0)

    nested, x = torchjac.jacobian(torchjac.jacobian(f)), value(4)
    with force_plan(mode="forward"), pytest.raises(PlanRefused, match="three times"):
        nested(x)
    want = torch.func.jacrev(torch.func.jacrev(f))
    for seed in range(6):
        same(nested(value(4, seed=seed)), want(value(4, seed=seed)))
