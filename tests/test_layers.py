"""Kernels of products of matrices: cases x the law that they give what passes give."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchjac
from accumulating import plan_of, run
from laws import oracle_jacobian, quiet, same, value
from test_export import CC, ran
from test_kernel import cache, kernel_of  # noqa: F401
from test_strips import NETWORKS, network, trained, with_numbers
from torchjac.errors import PlanRefused

Function = Callable[..., Any]
pytestmark = pytest.mark.skipif(CC is None, reason="there is no C compiler")


def wide(*sizes: int, dtype: torch.dtype) -> nn.Sequential:
    """Layers of these widths, with tanh between them."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after, dtype=dtype), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def plan_with_products(f: Function, *args: Any) -> Any:
    """The plan, which keeps products whole."""
    plan, _ = plan_of(f, *args)
    plan = kernel_of(plan, f, *args)
    assert "torchjac_strip" in plan.program.kernel.source.text
    return plan


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, frozen: bool, dtype: torch.dtype) -> None:
    """One sample, with parameters that may change, and with numbers that stay."""
    net, inputs = trained(name, dtype)
    batched = with_numbers(net) if frozen else net

    def f(x: Tensor) -> Tensor:
        return batched(x[None])[0]

    plan = plan_with_products(f, value(inputs, dtype=dtype))
    y = value(inputs, seed=1, dtype=dtype)
    with quiet():
        same(run(plan, f, y), oracle_jacobian(f)(y))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("order", ["reverse", "forward"])
@pytest.mark.parametrize("sizes", [(9, 40, 33, 2), (4, 64, 64, 7), (2, 33, 47, 9), (40, 17, 3)])
def test_narrow_and_wide(sizes: tuple[int, ...], order: Any, dtype: torch.dtype) -> None:
    """Few rows, many columns, of numbers that lie in either way, in one order or the other."""
    net = wide(*sizes, dtype=dtype)
    x, y = value(sizes[0], dtype=dtype), value(sizes[0], seed=1, dtype=dtype)
    plan, _ = plan_of(net, x, orders=(order,))
    with quiet():
        same(run(kernel_of(plan, net, x), net, y), oracle_jacobian(net)(y))


def test_a_diagonal_goes_with_the_smaller_matrix() -> None:
    """Between two layers, whichever was met first."""
    net = wide(6, 128, 128, 2, dtype=torch.float64)
    plan, _ = plan_of(net, value(6), orders=("reverse",))
    scaled = [
        math.prod(call.results[0].shape)
        for call in plan.program.recording.calls
        if call.operation is torch.ops.aten.mul.Tensor
    ]
    assert max(scaled) <= 128 * 6  # not 128 * 128


CASES: dict[str, tuple[Function, tuple[int, ...]]] = {
    "vectors": (lambda x, m: (m @ x.sin()).exp(), (40,)),
    "from the left": (lambda x, m: (x.sin() @ m).exp(), (40,)),
    "rows": (lambda x, m: (x.sin() @ m[:, :9] @ m[:9]).sum(0), (3, 40)),
    "columns": (lambda x, m: (m[:7] @ x.sin() @ m[:5, :3].T).sum(0), (40, 3)),
    "of itself": (lambda x, m: (x @ x.T).sum(0), (11, 9)),
    "powers": (lambda x, m: (x @ m[:12, :12] @ x)[0], (12, 12)),
    "stacks": (lambda x, m: (x.sin() @ m.view(4, 10, 40)[:, :, :9].tanh()).sum(1), (4, 3, 10)),
    "every other": (lambda x, m: m[::2, ::2] @ x[::2].exp(), (40,)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_products(name: str, dtype: torch.dtype) -> None:
    """Of all shapes, by every way to read operands."""
    g, shape = CASES[name]
    matrix = value(40, 40, seed=5, dtype=dtype)

    def f(x: Tensor) -> Tensor:
        return g(x, matrix)

    plan, _ = plan_of(f, value(*shape, dtype=dtype))
    plan = kernel_of(plan, f, value(*shape, dtype=dtype))
    y = value(*shape, seed=2, dtype=dtype)
    with quiet():
        same(run(plan, f, y), oracle_jacobian(f)(y))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 45), min_size=2, max_size=4),
    st.sampled_from([nn.Tanh, nn.ReLU, nn.SiLU]),
    st.booleans(),
)
def test_any_network(widths: list[int], act: Any, bias: bool) -> None:
    """Of any widths; where it is too small for that something else gives the same."""
    torch.manual_seed(0)
    net = network(*widths, 40, widths[-1], act=act, bias=bias).double()
    x = value(widths[0])
    try:
        plan, _ = plan_of(net, x)
        plan = kernel_of(plan, net, x)
    except PlanRefused:
        return  # layers that multiply by nothing
    with quiet():
        same(run(plan, net, 0.5 - x), oracle_jacobian(net)(0.5 - x))


def test_parameters_are_read_anew() -> None:
    net, inputs = trained("silu")
    x = value(inputs)
    plan = plan_with_products(net, x)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    same(run(plan, net, x), oracle_jacobian(net)(x))


@pytest.mark.parametrize("flags", [[], ["-mno-avx"], ["-mno-avx512f"]], ids=str)
def test_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    """In C, without warnings, under sanitizers, whatever registers the processor has."""
    net, inputs = trained("tanh")
    y = value(inputs, seed=3)
    files = torchjac.jacobian(net).export(tmp_path / "net.c", value(inputs))
    assert "torchjac_strip" in files[0].read_text()
    monkeypatch.setattr("test_export.SANITIZED", [*flags, "-fsanitize=address,undefined"])
    results = ran(files, {"x": y}, {"jacobian": 15, "value": 5})
    same(results["jacobian"].view(5, 3), oracle_jacobian(net)(y))
    same(results["value"], net(y).detach())


class TestFusedAttention:
    """Attention in torch's fused kernel for the CPU, which is written out while it is recorded."""

    MASKS: ClassVar[dict[str, Any]] = {
        "none": {},
        "causal": {"is_causal": True},
        "numbers": {"attn_mask": torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)},
        "bool": {"attn_mask": torch.ones(3, 4, dtype=torch.bool).tril()},
        "a row of large numbers": {
            "attn_mask": torch.zeros(3, 4, dtype=torch.float64).index_fill(
                0, torch.tensor([1]), torch.finfo(torch.float64).min
            )
        },
        "scale": {"scale": 0.3},
    }

    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("shape", [(2, 3, 5), (1, 2, 3, 5)], ids=["3", "4"])
    def test_is_planned(self, mask: str, shape: tuple[int, ...]) -> None:
        keys = value(*shape[:-2], 4, 5, seed=1)

        def f(x: Tensor) -> Tensor:
            k = keys * x[..., :1, :]
            return F.scaled_dot_product_attention(x, k, k.sin(), **self.MASKS[mask])

        J = torchjac.jacobian(f, compile=True)
        for seed in range(2):
            x = value(*shape, seed=seed)
            same(J(x), oracle_jacobian(f)(x))
        assert J.explain(x).engine == "accumulate"

    # Where numbers are not finite passes are taken, in which torch loops over the fused kernel.
    @pytest.mark.filterwarnings("ignore:torchjac. torch has no batching rule for aten.._scaled_dot")
    def test_a_mask_that_comes_later(self) -> None:
        """A plan made with small numbers in a mask, and a row of large ones: as torch has it."""

        def f(x: Tensor, mask: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x.sin(), x.cos(), attn_mask=mask)

        x, mask = value(1, 1, 4, 3), torch.zeros(4, 4, dtype=torch.float64)
        J = torchjac.jacobian(f, compile=True)
        J(x, mask)
        for large in (-1e9, -1e30, torch.finfo(torch.float64).min, -math.inf):
            mask[1] = large
            got, want = J(x, mask), oracle_jacobian(f)(x, mask)
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, equal_nan=True)
            assert J.explain(x, mask).report is None
