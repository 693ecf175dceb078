"""Laws between accumulated Jacobians, and graphs of extreme shapes."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchjac
from accumulating import plan_of, run
from laws import oracle_jacobian, same, value
from test_accumulate import ORDERS, PROBLEMS, Function, attention, check, residual
from torchjac.errors import PlanRefused
from torchjac.request import Mode

VECTORS = {
    name: (f, shape)
    for name, (f, shape) in PROBLEMS.items()
    if len(shape) == 1 and f(value(*shape)).ndim == 1
}


def matrix(f: Function, x: Tensor, order: Mode = "reverse") -> Tensor:
    """The Jacobian as a matrix, by passes where the plan is refused."""
    try:
        _, J = plan_of(f, x, orders=(order,))
    except PlanRefused:
        J = oracle_jacobian(f)(x)
    return J.reshape(-1, x.numel())


@pytest.mark.parametrize("name", VECTORS)
class TestLaws:
    def test_orders_and_passes_agree(self, name: str) -> None:
        """All engines give the same J."""
        f, shape = VECTORS[name]
        x = value(*shape)
        for order in ORDERS:
            same(matrix(f, x, order), torchjac.jacobian(f)(x).reshape(-1, x.numel()))

    def test_chain_rule(self, name: str) -> None:
        """J(f o g)(x) = J(f)(g(x)) J(g)(x)."""
        f, shape = VECTORS[name]
        x = value(*shape)

        def g(x: Tensor) -> Tensor:
            return torch.sin(x) * x.flip(0) + 0.5

        for order in ORDERS:
            whole = matrix(lambda x: f(g(x)), x, order)
            same(whole, matrix(f, g(x), order) @ matrix(g, x, order))

    def test_permuted_inputs_permute_columns(self, name: str) -> None:
        f, shape = VECTORS[name]
        x = value(*shape)
        order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))
        back = torch.argsort(order)
        for mode in ORDERS:
            moved = matrix(lambda y: f(y[back]), x[order], mode)
            same(moved, matrix(f, x, mode)[:, order])

    def test_a_part_that_does_not_matter_is_exactly_zero(self, name: str) -> None:
        f, shape = VECTORS[name]
        x, count = value(*shape), shape[0]
        for mode in ORDERS:
            wide = matrix(lambda y: f(y[:count]), torch.cat([x, value(3, seed=9)]), mode)
            assert torch.equal(wide[:, count:], torch.zeros_like(wide[:, count:]))
            same(wide[:, :count], matrix(f, x, mode))

    def test_linear_in_the_function(self, name: str) -> None:
        """J(a f + b f) = (a + b) J(f)."""
        f, shape = VECTORS[name]
        x = value(*shape)
        for mode in ORDERS:
            same(matrix(lambda x: 2 * f(x) + 3 * f(x), x, mode), 5 * matrix(f, x, mode))


class TestAdversarial:
    """Graphs that are deep, wide, or fill in."""

    def test_ten_thousand_operations_deep(self) -> None:
        """No recursion, and no time spent on a plan that is refused in the end."""

        def f(x: Tensor) -> Tensor:
            for k in range(5000):
                x = x * (1 + 1e-4 * (k % 7)) + 1e-3
            return x

        x = value(4)
        started = time.perf_counter()
        J = torchjac.jacobian(f)
        want = 1.0
        for k in range(5000):
            want *= 1 + 1e-4 * (k % 7)
        for _ in range(4):
            same(J(x), want * torch.eye(4, dtype=x.dtype))
        assert time.perf_counter() - started < 120

    def test_a_deep_plan(self) -> None:
        def f(x: Tensor) -> Tensor:
            for k in range(300):
                x = torch.sin(x) + 0.01 * k
            return x

        check(f, value(5))

    def test_very_wide(self) -> None:
        """Two thousand branches, stacked."""

        def f(x: Tensor) -> Tensor:
            return torch.stack([(x * (k + 1)).sum() for k in range(2000)])

        x = value(3)
        want = torch.arange(1, 2001, dtype=x.dtype)[:, None].expand(2000, 3)
        J = torchjac.jacobian(f)
        for _ in range(3):
            same(J(x), want)

    def test_a_hundred_residual_blocks(self) -> None:
        def f(x: Tensor) -> Tensor:
            for k in range(100):
                x = x + 0.1 * torch.tanh(x.roll(k) * (1 + 0.01 * k))
            return x

        x = value(6)
        J = torchjac.jacobian(f, compile=False)
        want = oracle_jacobian(f)(x)
        for _ in range(5):
            same(J(x), want)
        check(residual, value(6))

    def test_recurrent(self) -> None:
        cell = nn.GRUCell(3, 5, dtype=torch.float64).requires_grad_(False)

        def f(x: Tensor) -> Tensor:
            h = torch.zeros(1, 5, dtype=x.dtype)
            for step in x.reshape(8, 1, 3):
                h = cell(step, h)
            return h.reshape(-1)

        check(f, value(24))

    def test_transformer_block(self) -> None:
        first, second = value(6, 12, seed=4), value(12, 6, seed=5)

        def f(x: Tensor) -> Tensor:
            x = attention(x)
            return x + F.gelu(F.layer_norm(x, x.shape[-1:]) @ first) @ second

        check(f, value(5, 6))

    def test_unet_with_skips(self) -> None:
        kernels = [value(2, 1, 3, 3), value(3, 2, 3, 3), value(3, 2, 2, 2), value(1, 4, 3, 3)]

        def f(x: Tensor) -> Tensor:
            image = x.reshape(1, 1, 8, 8)
            first = F.silu(F.conv2d(image, kernels[0], padding=1))
            low = F.silu(F.conv2d(F.max_pool2d(first, 2), kernels[1], padding=1))
            up = F.conv_transpose2d(low, kernels[2], stride=2)
            return F.conv2d(torch.cat([up, first], 1), kernels[3], padding=1).reshape(-1)

        J = torchjac.jacobian(f)
        x = value(64)
        for _ in range(3):
            same(J(x), oracle_jacobian(f)(x))

    def test_fft_solver_step(self) -> None:
        """An implicit step of diffusion by FFT."""
        waves = torch.fft.rfftfreq(16, dtype=torch.float64) * 16

        def f(x: Tensor) -> Tensor:
            explicit = x + 0.1 * x * (1 - x * x)
            return torch.fft.irfft(torch.fft.rfft(explicit) / (1 + 0.01 * waves * waves), n=16)

        x = value(16)
        plan, first = plan_of(f, x)
        same(first, oracle_jacobian(f)(x))
        same(run(plan, f, x + 1), oracle_jacobian(f)(x + 1))

    def test_fill_in_is_not_accumulated(self) -> None:
        """A stencil applied so often that all cells depend on each other."""

        def f(x: Tensor) -> Tensor:
            for _ in range(60):
                x = x + 0.1 * (x.roll(1) + x.roll(-1) - 2 * x) + 0.01 * x * x
            return x

        x = value(400)
        J = torchjac.jacobian(f)
        want = torchjac.jacobian(f)(x)
        for _ in range(4):
            same(J(x), want)
        assert torchjac.last_run().engine != "accumulate"

    def test_outputs_reused(self) -> None:
        def f(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = x.sin()
            return y, y, y * y

        for order in ORDERS:
            _, first = plan_of(f, value(4), orders=(order,))
            same(first, oracle_jacobian(f)(value(4)))
