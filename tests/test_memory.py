"""Bounded memory: a dense result stays within output + budget, a sparse one never allocates m x n.

Each case runs in a process of its own: the peak of the process, less what it held just before the
call, is what the Jacobian took.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import torchjac
from laws import leaf, oracle, quiet, same, value

MIB = 2**20
# What a first call takes besides: threads' stacks and arenas, kernels' code pages, the interpreter.
SLACK = 96 * MIB

MEASURE = """
import json, resource, sys
import torch, torchjac

def held():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()
def peak_of_this_process():  # ru_maxrss would count the test runner that it was started from
    with open("/proc/self/status") as f:
        return 1024 * next(int(line.split()[1]) for line in f if line.startswith("VmHWM"))

def measured(compute):
    before = held()
    J = compute()
    peak = peak_of_this_process()
    record = torchjac.last_run()
    return J, {"took": peak - before, "budget": record.budget, "passes": record.passes,
               "chunk": record.chunk, "mode": record.mode}
"""

RESIDUALS = (
    MEASURE
    + """
torch.manual_seed(0)
points, target = torch.randn(10_000, 3, dtype=torch.float64), torch.randn(10_000).double()
x = (0.1 * torch.randn(1001)).double()

def residuals(p):
    w, b, v = p[:600].view(3, 200), p[600:800], p[800:1000]
    return torch.tanh(points @ w + b) @ v + p[1000] - target

torchjac.jacobian(lambda p: residuals(p)[:4])(x)  # loads what a first call loads
J, report = measured(lambda: torchjac.jacobian(residuals, memory_budget=BUDGET)(x))
w, b, v = x[:600].view(3, 200), x[600:800], x[800:1000]
h = torch.tanh(points @ w + b)
inner = v * (1 - h * h)
by_weight = (points[:, :, None] * inner[:, None, :]).flatten(1)
exact = torch.cat([by_weight, inner, h, torch.ones(10_000, 1).double()], 1)
report["wrong"] = (J - exact).abs().max().item()
report["shape"] = list(J.shape)
print(json.dumps(report))
"""
)

DIAGONAL = (
    MEASURE
    + """
n = 20_000
x = torch.linspace(-1, 1, n, dtype=torch.float64)
torchjac.jacobian(torch.sin, layout=LAYOUT)(x[:8])
J, report = measured(
    lambda: torchjac.jacobian(torch.sin, layout=LAYOUT, memory_budget=256 * 2**20)(x)
)
coo = J.to_sparse_coo().coalesce()
rows, columns = coo.indices()
report["nonzeros"] = coo.values().numel()
report["wrong"] = (coo.values() - x.cos()[rows]).abs().max().item() + (rows != columns).sum().item()
report["shape"] = list(J.shape)
print(json.dumps(report))
"""
)


def run(code: str, **names: str) -> dict[str, Any]:
    """Runs a script in a fresh interpreter and reads the JSON it prints."""
    for name, text in names.items():
        code = code.replace(name, text)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("budget", [256 * MIB, None])
def test_tall_residuals_stay_within_output_and_budget(budget: int | None) -> None:
    """10 000 x 1001 in float64, on which jacrev asks for tens of GB: 80 MB and the budget."""
    report = run(RESIDUALS, BUDGET=repr(budget))
    assert report["shape"] == [10_000, 1001]
    assert report["wrong"] < 1e-10
    if budget is not None:
        assert report["budget"] == budget
    assert report["took"] <= 10_000 * 1001 * 8 + report["budget"] + SLACK, report


@linux
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["torch.sparse_csr", "torch.sparse_coo"])
def test_sparse_result_never_allocates_rows_times_columns(layout: str) -> None:
    """A 20 000 x 20 000 diagonal: the dense matrix alone would be 3.2 GB."""
    report = run(DIAGONAL, LAYOUT=layout)
    assert report["shape"] == [20_000, 20_000]
    assert report["nonzeros"] == 20_000
    assert report["wrong"] < 1e-12
    assert report["took"] <= 256 * MIB + SLACK, report


class Crowded(torch.autograd.Function):
    """exp, whose backward runs out of memory when more than `limit` cotangents come at once."""

    limit = 8
    error: type[BaseException] = torch.OutOfMemoryError
    message = "CUDA out of memory. Tried to allocate 2.00 GiB."
    seen: list[int] = []  # noqa: RUF012  (reset by every test)

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        at_once = (
            torch._C._functorch.get_unwrapped(grad).numel() // grad.numel()
            if (torch._C._functorch.is_batchedtensor(grad))
            else 1
        )
        Crowded.seen.append(at_once)
        if at_once > Crowded.limit:
            raise Crowded.error(Crowded.message)
        return grad * y


ERRORS: dict[str, tuple[type[BaseException], str]] = {
    "cuda": (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": (
        RuntimeError,
        "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: "
        "can't allocate memory: you tried to allocate 80000000000 bytes. Error code 12",
    ),
    "python": (MemoryError, ""),
}


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("limit", [1, 3, 8, 33])
@pytest.mark.parametrize("entry", ["jac", "jacobian"])
def test_chunk_is_halved_when_memory_runs_out(
    kind: str, limit: int, entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on with half the rows, says so, and J is right."""
    monkeypatch.setattr(Crowded, "limit", limit)
    monkeypatch.setattr(Crowded, "error", ERRORS[kind][0])
    monkeypatch.setattr(Crowded, "message", ERRORS[kind][1])
    monkeypatch.setattr(Crowded, "seen", [])
    x = leaf(64)
    expected = torch.diag(x.detach().exp())
    with quiet():
        if entry == "jac":
            same(torchjac.jac(Crowded.apply(x), x), expected)
        else:
            same(torchjac.jacobian(Crowded.apply)(x.detach()), expected)
    record = torchjac.last_run()
    too_large = [k for k in Crowded.seen if k > limit]
    if too_large and record.mode == "reverse":
        assert record.chunk <= limit
        assert len(too_large) <= 7  # halved, not retried


def test_a_single_row_that_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing left to halve: torch's own error reaches the user."""
    monkeypatch.setattr(Crowded, "limit", 0)
    monkeypatch.setattr(Crowded, "seen", [])
    x = leaf(8)
    with pytest.raises(torch.OutOfMemoryError):
        torchjac.jac(Crowded.apply(x), x)


def test_a_real_allocation_failure_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own error from an allocation that no machine can make."""

    class Huge(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            if torch._C._functorch.is_batchedtensor(grad):
                torch.empty(2**58, dtype=torch.uint8)
            return grad.clone()

    x = leaf(6)
    with quiet():
        same(torchjac.jac(Huge.apply(x), x), torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("budget", [1, 1000, 10_000, 10**9])
def test_budget_bounds_the_chunk(budget: int) -> None:
    """A smaller budget means smaller chunks, down to the loop; the values are the same."""
    x = value(40)
    weight = value(50, 40)

    def f(x: Tensor) -> Tensor:
        return (weight @ x.sin()).tanh()

    with quiet():
        J = torchjac.jacobian(f, memory_budget=budget)
        got = J(x)
    record = torchjac.last_run()
    assert record.budget == budget
    assert budget > 1 or record.chunk == 1
    x = x.clone().requires_grad_()
    same(got, oracle(f(x), x))


def test_no_graph_and_no_copy_is_left_behind() -> None:
    """What a call allocates goes away with its result (counted by the tensors alive)."""
    import gc

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    f = torchjac.jacobian(lambda x: (x.sin() * x).cumsum(0))
    x = leaf(50)
    for _ in range(3):
        f(x)
        torchjac.jac(x.sin() * x, x)
    before = alive()
    for _ in range(5):
        f(x)
        torchjac.jac(x.sin() * x, x)
        f.value_and(x)
    assert alive() <= before
