"""Kernels of one sample: cases x the law that they give what passes give, for every sample."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchjac
from accumulating import plan_of, run
from laws import oracle_jacobian, quiet, same, value
from test_export import CC, ran
from test_kernel import cache  # noqa: F401
from torchjac.call import Call
from torchjac.capture.trace import trace_function
from torchjac.compiler.batch_invariance import first_samples, is_batch_invariant
from torchjac.errors import CaptureRefused, PlanRefused
from torchjac.host import costs
from torchjac.sparsity.detect import KEEP

Function = Callable[..., Any]
pytestmark = pytest.mark.skipif(CC is None, reason="there is no C compiler")


def rotated(x: Tensor) -> Tensor:
    """Products of small matrices."""
    c, s = x.cos(), x.sin()
    turns = torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)
    total = turns[:, 0]
    for k in range(1, x.shape[1]):
        total = total @ turns[:, k]
    return total.reshape(-1, 4)


MATRIX = value(5, 4, seed=9)
SIGNS = torch.tensor([0.0, -0.0, 1.0, -2.0], dtype=torch.float64)
ONE = {
    "signs of zeros": lambda x: torch.copysign(x, SIGNS.to(x.dtype)) * x.exp(),
    "pointwise": lambda x: x.sin() * x.sum(-1, keepdim=True),
    "matrices": rotated,
    "outer": lambda x: (x[:, :, None] * x[:, None, :]).reshape(len(x), -1),
    "constants": lambda x: torch.cat([x @ MATRIX.to(x.dtype).T, 3 * x, torch.ones_like(x)], 1),
    "constant rows": lambda x: x * torch.ones(len(x), 1, dtype=x.dtype),
    "one number": lambda x: (x**2).sum(-1),
    "two outputs": lambda x: (x.exp(), x[:, :2].prod(-1)),
    "softmax": lambda x: torch.softmax(x, -1),
    "linear": lambda x: 2 * x.flip(1),
    "branches": lambda x: torch.where(x > 0, x.exp(), x**2),
    "views": lambda x: x.view(-1).sin().view(len(x), 2, 2).transpose(1, 2).reshape(-1, 4),
}


def plan_of_sample(f: Function, *args: Tensor, **how: Any) -> Any:
    """The plan, which is for one sample."""
    plan, J = plan_of(f, *args, batched=True, **how)
    assert plan.program.samples is not None, plan.tried
    return plan, J


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("samples", [32, 65, 1001])
@pytest.mark.parametrize("name", ONE)
def test_gives_what_passes_give(name: str, samples: int, dtype: torch.dtype) -> None:
    f = ONE[name]
    x = value(samples, 4, dtype=dtype)
    plan, J = plan_of_sample(f, x)
    want = oracle_jacobian(f, 0, batched=True)
    with quiet():
        same(J, want(x))
        for seed in (1, 2):
            y = value(samples, 4, seed=seed, dtype=dtype)
            same(run(plan, f, y), want(y))


def test_other_arguments() -> None:
    """With samples, without, and with a size that is also that of few samples."""

    def f(x: Tensor, target: Tensor, *, scale: Tensor, weights: Tensor) -> Tensor:
        return scale * (x - target) ** 2 * weights[:4] * weights[6]

    x, target, scale, weights = value(50, 4), value(50, 4, seed=1), value(1), value(7, seed=2)
    plan, J = plan_of_sample(f, x, target, scale=scale, weights=weights)
    want = oracle_jacobian(f, 0, batched=True)
    same(J, want(x, target, scale=scale, weights=weights))
    other = dict(scale=2 + scale, weights=value(7, seed=3))
    same(run(plan, f, target, x, **other), want(target, x, **other))


def test_two_inputs() -> None:
    def f(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * y.sum(-1, keepdim=True), y.sin()

    x, y = value(40, 3), value(40, 2, seed=1)
    plan, _ = plan_of_sample(f, x, y, argnums=(0, 1))
    want = oracle_jacobian(f, (0, 1), batched=True)
    same(run(plan, f, x + 1, y - 1, argnums=(0, 1)), want(x + 1, y - 1))


def test_a_network_that_is_trained() -> None:
    """Parameters are read anew, and each from its own place."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = value(64, 3)
    plan, _ = plan_of_sample(net, x)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3)
    same(run(plan, net, x), oracle_jacobian(net, 0, batched=True)(x))


POINTS = [value(50, 4, seed=k) for k in range(2)]
WEIGHTS = [nn.Parameter(torch.zeros(4, dtype=torch.float64)) for _ in range(2)]


LONG = torch.ones(100, 1, dtype=torch.float64)
LONG[40] = 2
WIDE = value(100, 4, seed=7)
TABLE = torch.ones(100, 1, dtype=torch.float64)
TABLE[20:] = 3
FIRST = torch.zeros(100, 1, dtype=torch.long)


def late(then: Tensor, x: Tensor) -> Tensor:
    """Something where x is positive, which it is not at first."""
    return torch.where(x > 0, then, x.sin())


def by_size(x: Tensor) -> Tensor:
    return x.exp() if len(x) > 30 else x.sin()


def by_threshold(x: Tensor) -> Tensor:
    """The same here, whatever the size, and not elsewhere."""
    return torch.where(x > len(x), x, x.sin())


# What is not the same with fewer samples, or is not seen to be.
NOT_ONE = {
    "size as a branch": by_size,
    "size as a number": lambda x: x.sin() * len(x),
    "size as a float": lambda x: x.sin() / float(len(x)),
    "size as a threshold": by_threshold,
    "size as an exponent": lambda x: x ** (len(x) % 5),
    "constants of samples": lambda x: x * POINTS[0],
    "another parameter": lambda x: x * WEIGHTS[len(x) > 30].exp() + x**2,
    # From here on what shows only where x is positive.
    "a part of a constant": lambda x: torch.where(x > 0, x * LONG[: len(x)], x.sin()),
    "a sum of constants": lambda x: late(torch.ones(len(x), dtype=x.dtype).sum() * x**2, x),
    "a sum over samples": lambda x: late(torch.ones_like(x).sum(0) * x**2, x),
    "positions": lambda x: late(torch.ones(len(x), 30, dtype=x.dtype).triu()[:, 29:] * x**2, x),
    "positions across": lambda x: late(torch.ones(4, len(x)).triu().sum(1).double() * x**2, x),
    "a second axis": lambda x: late((x**2)[:, None].expand(len(x), len(x), 4).sum(1), x),
    "repeated": lambda x: late((x**2).repeat(1, len(x)).sum(1, keepdim=True) * x, x),
    "a shift by the size": lambda x: late(x.roll(len(x), 1), x),
    "a shift of samples": lambda x: late(x * x.detach().roll(7, 0), x),
    "as many columns": lambda x: late((WIDE @ x[..., None])[:, : len(x), 0].sum(1, True) + x, x),
    "rows of a triangle": lambda x: late(x.triu(-20), x),
    "transposed": lambda x: late(x.t().cumsum(1).t().detach() * x, x),
    "a row of a table": lambda x: late(TABLE.gather(1, FIRST[: len(x)]) * x**2, x),
    "rows that are written": lambda x: late(
        torch.ones_like(x).detach().scatter(1, FIRST[:7], 5 * TABLE[:7]) * x**2, x
    ),
    "number of a sample": lambda x: x.sin() * torch.arange(len(x), dtype=x.dtype)[:, None],
}


@pytest.mark.parametrize("name", NOT_ONE)
def test_what_is_not_the_same_with_fewer(name: str) -> None:
    """It is not planned in that way; whatever happens the result is right."""
    f, x = NOT_ONE[name], -value(50, 4).abs()
    call = Call(f, 0, False, (x,), {})
    less, few = first_samples(call, 50) or (call, 0)
    try:
        small = trace_function(less, KEEP)
    except CaptureRefused:
        pass  # the constants are of another size
    else:
        assert not is_batch_invariant(small.module, trace_function(call, KEEP).module, few, 50)
    with quiet():
        want = torch.func.jacrev(f)
    try:
        plan, _ = plan_of(f, x, batched=True)
    except (CaptureRefused, PlanRefused):
        return
    assert plan.program.samples is None
    for y in (x, 100 + x):
        each = torch.arange(50)
        same(run(plan, f, y), want(y)[each, :, each])


@pytest.mark.parametrize("shift", [7, 11, 77])
def test_a_shift_by_all_of_few_samples(shift: int) -> None:
    """With seven samples it is none: samples are independent there, and not with more."""
    x = value(50, 4)
    with pytest.raises((PlanRefused, torchjac.CoupledBatchError)):
        plan_of(lambda x: x * x.roll(shift, 0), x, batched=True)


def test_few_is_no_other_size() -> None:
    call = Call(torch.sin, 0, False, (value(50, 7, 11),), {})
    less, few = first_samples(call, 50) or (call, 0)
    assert few == 13
    assert less.args[0].shape == (13, 7, 11)
    assert first_samples(Call(torch.sin, 0, False, (value(20, 3),), {}), 20) is None


def test_by_default() -> None:
    """Without being asked, once calls have taken some time; then for other sizes too."""
    f = ONE["matrices"]
    J = torchjac.jacobian(f, batched=True)
    want = oracle_jacobian(f, 0, batched=True)
    for samples in (300, 77):
        x = value(samples, 4)
        for _ in range(3000):
            got = J(x)
            if torchjac.last_run().mode.endswith("kernel"):
                break
        else:
            pytest.fail("it never runs as a kernel")
        same(got, want(x))


def test_saved(tmp_path: Path) -> None:
    f, x = ONE["outer"], value(60, 4)
    J = torchjac.jacobian(f, batched=True, compile=True)
    J(x)
    J.save(tmp_path / "plan", x)
    again = torchjac.jacobian(f, batched=True).load(tmp_path / "plan")
    same(again(0.5 * x), oracle_jacobian(f, 0, batched=True)(0.5 * x))
    assert torchjac.last_run().mode.endswith("kernel")


@pytest.mark.parametrize("samples", [0, 1, 3, 100])
def test_exported(tmp_path: Path, samples: int) -> None:
    """For any number of samples."""
    f = ONE["constants"]
    files = torchjac.jacobian(f, batched=True).export(tmp_path / "made", value(50, 4))
    y = value(samples, 4, seed=3)
    main = tmp_path / "sizes.c"
    main.write_text(
        '#include "made.h"\nint check(void) { return MADE_JACOBIAN_SIZE == 13 * 4 &&'
        " MADE_VALUE_SIZE == 13; }\n"
    )
    sizes = {"jacobian": 52 * samples, "value": 13 * samples}
    got = ran(files, {"x": y}, sizes, first=f"{samples}, ")
    if samples:
        same(got["jacobian"].view(samples, 13, 4), oracle_jacobian(f, 0, batched=True)(y))
    same(got["value"].view(samples, 13), f(y))
    subprocess.run([CC, "-c", str(main), "-o", str(tmp_path / "sizes.o")], check=True)


@pytest.mark.slow
def test_packaged(tmp_path: Path) -> None:
    """A package takes any number of samples."""
    f, x = ONE["constants"], value(40, 4)
    J = torchjac.jacobian(f, batched=True, compile=True)
    J(x)
    (file,) = J.export(tmp_path / "made.pt2", x)
    run_it = torch._inductor.aoti_load_package(str(file))
    for samples in (40, 1, 3, 77):
        y = value(samples, 4, seed=samples)
        result, jacobian = run_it(y)
        same(result, f(y))
        same(jacobian, oracle_jacobian(f, 0, batched=True)(y))


class TestThreads:
    """Samples are divided among as many threads as torch has."""

    @pytest.fixture(autouse=True)
    def many(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(costs, "_THREAD", 1e-9)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 5)

    @pytest.mark.parametrize("count", [32, 33, 64, 1001])
    @pytest.mark.parametrize("name", ["matrices", "outer"])
    def test_results(self, name: str, count: int) -> None:
        f = ONE[name]
        plan, _ = plan_of_sample(f, value(count, 4))
        want = oracle_jacobian(f, 0, batched=True)
        for seed in range(6):
            y = value(count, 4, seed=seed)
            same(run(plan, f, y), want(y))
        y[count - 1, 3] = float("nan")  # one that is not finite is enough
        assert run(plan, f, y) is None
