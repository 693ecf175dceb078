"""Kernels of networks with wide layers: cases x the law that they give what passes give."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import torchjac
from accumulating import plan_of, run
from laws import oracle_jacobian, quiet, same, value
from test_export import CC, ran
from test_kernel import cache  # noqa: F401
from torchjac.errors import PlanRefused

Function = Callable[..., Any]
pytestmark = pytest.mark.skipif(CC is None, reason="there is no C compiler")


class Residual(nn.Module):
    """Layers with a way around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(3, width)
        self.blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.last = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + functional.silu(block(x))
        return self.last(x)


class Gated(nn.Module):
    """Two branches that are multiplied, joined with the input, and summed."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 40), nn.Linear(3, 40)
        self.last = nn.Linear(40, 40)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.last(self.one(x).sigmoid() * self.other(x))
        return torch.stack([hidden.sum(-1), (hidden * hidden).mean(-1), x[:, 0] * hidden[:, 3]], -1)


def network(*sizes: int, act: Callable[[], nn.Module] = nn.Tanh, **how: Any) -> nn.Module:
    """Dense layers."""
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b, **how), act()]
    return nn.Sequential(*layers[:-1])


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 48), nn.LayerNorm(48), nn.ReLU(), nn.Linear(48, 48), nn.Softmax(-1)
    )


class Heads(nn.Module):
    """Products of matrices that differ from sample to sample, and of those that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 256)
        self.second = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        keys = self.first(x).view(-1, 8, 32)
        values = torch.tanh(self.second(keys))
        return (keys @ values.transpose(1, 2)).flatten(1)[:, :5]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "tanh": (lambda: network(3, 64, 64, 5), 3),
    "relu": (lambda: network(4, 33, 47, 2, act=nn.ReLU), 4),
    "gelu": (lambda: network(2, 50, 50, 1, act=nn.GELU), 2),
    "silu": (lambda: network(5, 48, 48, 9, act=nn.SiLU), 5),
    "softplus": (lambda: network(2, 40, 40, 3, act=nn.Softplus), 2),
    "elu": (lambda: network(2, 40, 40, 3, act=nn.ELU), 2),
    "hardswish": (lambda: network(2, 40, 40, 3, act=nn.Hardswish), 2),
    "mish": (lambda: network(2, 40, 40, 3, act=nn.Mish), 2),
    "log sigmoid": (lambda: network(2, 40, 40, 3, act=nn.LogSigmoid), 2),
    "no bias": (lambda: network(3, 64, 64, 1, bias=False), 3),
    "deep": (lambda: network(3, 40, 40, 40, 40, 40, 2), 3),
    "many outputs": (lambda: network(2, 64, 30), 2),
    "many inputs": (lambda: network(60, 64, 2), 60),
    "square": (lambda: network(20, 64, 64, 20), 20),
    "residual": (lambda: Residual(40), 3),
    "gated": (Gated, 3),
    "normed": (normed, 3),
    "heads": (Heads, 4),
}


def trained(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, int]:
    """A network, and how many inputs it has."""
    torch.manual_seed(0)
    build, inputs = NETWORKS[name]
    return build().to(dtype), inputs


def with_numbers(net: nn.Module) -> Function:
    """A network whose parameters are numbers that stay."""
    numbers = {k: v.detach() for k, v in net.named_parameters()}
    return lambda x: torch.func.functional_call(net, numbers, (x,))


def plan_of_strips(f: Function, *args: Any) -> Any:
    """The plan, which is for strips of samples."""
    plan, J = plan_of(f, *args, batched=True)
    assert plan.program.samples is not None, plan.tried
    assert "TORCHJAC_STRIP" in plan.program.kernel.source.text
    return plan, J


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", NETWORKS)
def test_gives_what_passes_give(name: str, frozen: bool, dtype: torch.dtype) -> None:
    """With parameters that may change, and with numbers that stay."""
    net, inputs = trained(name, dtype)
    f = with_numbers(net) if frozen else net
    plan, J = plan_of_strips(f, value(37, inputs, dtype=dtype))
    want = oracle_jacobian(f, 0, batched=True)
    with quiet():
        same(J, want(value(37, inputs, dtype=dtype)))
        y = value(37, inputs, seed=1, dtype=dtype)
        same(run(plan, f, y), want(y))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("samples", [32, 33, 47, 64, 1000])
def test_any_number_of_samples(samples: int, dtype: torch.dtype) -> None:
    """The last strip may be short."""
    net, inputs = trained("tanh", dtype)
    x = value(samples, inputs, dtype=dtype)
    plan, _ = plan_of_strips(net, x)
    same(run(plan, net, -x), oracle_jacobian(net, 0, batched=True)(-x))


def test_memory_that_is_not_initialized_is_no_table() -> None:
    """Memory that `silu`'s backward asks for, to be filled, is not read: it is in no text."""
    garbage = [value(7, 48, seed=k) for k in range(64)]  # memory that holds something
    del garbage
    net, inputs = trained("silu")
    plan, _ = plan_of_strips(net, value(37, inputs))
    assert {t.dtype.kind for t in plan.program.kernel.source.tables} <= {"i"}


def test_parts_of_the_samples() -> None:
    """Threads take parts that begin anywhere, each with memory of its own."""
    net, inputs = trained("silu")
    x = value(101, inputs)
    plan, want = plan_of_strips(net, x)
    kernel = plan.program.kernel
    for cuts in ([0, 101], [0, 1, 50, 101], [0, 7, 8, 93, 101]):
        kernel._divided = lambda run, c=cuts: all([run(a, b) for a, b in pairwise(c)])
        same(run(plan, net, x), want)


def test_what_is_not_finite() -> None:
    """A sample that overflows is left to passes, in a strip that is not full too."""
    net, inputs = trained("tanh")
    plan, _ = plan_of_strips(net, value(35, inputs))
    x = value(35, inputs)
    x[34, 0] = float("nan")
    assert run(plan, net, x) is None


def test_parameters_are_read_anew() -> None:
    """Training changes them in place."""
    net, inputs = trained("normed")
    x = value(40, inputs)
    plan, _ = plan_of_strips(net, x)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    same(run(plan, net, x), oracle_jacobian(net, 0, batched=True)(x))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 45), min_size=2, max_size=4),
    st.sampled_from([nn.Tanh, nn.ReLU, nn.SiLU, nn.Sigmoid]),
    st.integers(32, 70),
    st.booleans(),
)
def test_any_network(widths: list[int], act: Any, samples: int, bias: bool) -> None:
    """Of any widths; where it is too small for strips something else gives the same."""
    torch.manual_seed(0)
    net = network(*widths, 40, widths[-1], act=act, bias=bias).double()
    x = value(samples, widths[0])
    try:
        plan, J = plan_of(net, x, batched=True)
    except PlanRefused:
        return  # layers that multiply by nothing
    want = oracle_jacobian(net, 0, batched=True)
    with quiet():
        same(J, want(x))
        same(run(plan, net, 0.5 - x), want(0.5 - x))


@pytest.mark.parametrize("flags", [[], ["-mno-avx"], ["-mno-avx512f"]], ids=str)
def test_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    """In C, without warnings, under sanitizers, whatever registers the processor has."""
    net, inputs = trained("tanh")
    x = value(40, inputs)
    files = torchjac.jacobian(net, batched=True).export(tmp_path / "net.c", x)
    y = value(21, inputs, seed=3)
    monkeypatch.setattr("test_export.SANITIZED", [*flags, "-fsanitize=address,undefined"])
    results = ran(files, {"x": y}, {"jacobian": 21 * 15, "value": 21 * 5}, "21, ")
    same(results["jacobian"].view(21, 5, 3), oracle_jacobian(net, 0, batched=True)(y))
    same(results["value"].view(21, 5), net(y).detach())


def test_faster_than_it_was_is_chosen() -> None:
    """By default, from the first call on that compiles."""
    net, inputs = trained("tanh", torch.float32)
    J = torchjac.jacobian(net, batched=True, compile=True)
    x = value(128, inputs, dtype=torch.float32)
    J(x)
    assert "kernel" in str(J.explain(x))
