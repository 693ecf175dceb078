"""Programs built to get a wrong number out: coupled batches, nonlinear backwards, late surprises.

Each was once answered with wrong values and no error. The law is the same everywhere: on every
call, whichever plan is tried, the values are the row loop's or there is an error.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchjac
from accumulating import plan_of
from laws import PLANS, leaf, oracle, oracle_jacobian, quiet, same, under_plan, value
from torchjac.call import Call
from torchjac.capture.eager import capture_function
from torchjac.errors import Disagrees, PlanRefused, RefusedHere
from torchjac.passes.verify import Reference
from torchjac.request import Dense

# More calls than the planner takes to try its candidates and to settle.
CALLS = 25
BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])

Function = Callable[..., Any]
ERRORS = (torchjac.CoupledBatchError, torchjac.errors.PlanRefused)


def stays_right(f: Function, *shape: int, dtype: torch.dtype = torch.float64) -> None:
    """``jacobian(f)``, ``jac`` of its graph and every forced plan equal the row loop."""
    J = torchjac.jacobian(f)
    for seed in range(CALLS):
        x = value(*shape, dtype=dtype, seed=seed)
        expected = oracle_jacobian(f)(x)
        with quiet():
            same(J(x), expected)
            known = x.clone().requires_grad_()
            same(torchjac.jac(f(known), known), expected)
    for mode, chunk in PLANS:
        got = under_plan(mode, chunk, lambda: torchjac.jacobian(f)(x))
        if got is not None:
            same(got, expected)


def right_or_coupled(J: Function, f: Function, *args: Any) -> bool:
    """Whether a batched call gave the row loop's values; otherwise it said that samples meet."""
    try:
        got = J(*args)
    except torchjac.CoupledBatchError:
        return False
    expected = oracle_jacobian(f)(*args)
    samples = torch.arange(len(args[0]))
    index = (samples, *[slice(None)] * (got.dim() - args[0].dim()), samples)
    same(got, expected[index])
    return True


class Apart(torch.autograd.Function):
    """sin, with a backward that cannot be differentiated: it detaches."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (grad * ctx.saved_tensors[0].cos()).detach()


class Changed(torch.autograd.Function):
    """The identity, with any function of the cotangent for its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.change(grad), None


def hooked(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    h = x * 1
    h.register_hook(change)
    return h


def node_hooked(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    h = x * 1
    h.grad_fn.register_prehook(lambda grads: (change(grads[0]),))
    return h


def module_hooked(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    (module := nn.Identity()).register_full_backward_hook(lambda m, g, _: (change(g[0]),))
    return module(x * 1)


# Changes of a cotangent that no tangent can be pushed through; those that are positively
# homogeneous agree with their own derivative at the point where that is taken.
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp in Python": lambda g: g.clamp(min=0),
    "relu": torch.relu,
    "abs": torch.abs,
    "partial": functools.partial(torch.clamp, min=0),
    "functional": nn.functional.relu,
    "gate": lambda g: torch.where(g.abs() > 0.5, 0.0, g),
    "value clip": lambda g: g.clamp(-0.3, 0.3),
    "norm clip": lambda g: g * (0.5 / g.norm()).clamp(max=1.0),
    "branch": lambda g: g * 0 if g.abs().max() > 1 else g,
}
PLACES: dict[str, Callable[..., Tensor]] = {
    "custom function": Changed.apply,
    "tensor hook": hooked,
    "node hook": node_hooked,
    "module hook": module_hooked,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("place", PLACES)
def test_backward_that_is_not_linear(place: str, change: str) -> None:
    """Guided backpropagation and clipping came out of forward mode as their plain derivative."""
    weight = value(80, 3, seed=1)
    stays_right(lambda x: weight @ PLACES[place](x, CHANGES[change]), 3)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("place", PLACES)
def test_batch_through_a_backward_that_is_not_linear(place: str, change: str) -> None:
    """Samples share a pass: where the backward mixes them, wrong numbers came without an error."""

    def f(x: Tensor) -> Tensor:
        return PLACES[place](x * 3, CHANGES[change]).sin() * 2

    J = torchjac.jacobian(f, batched=True)
    right = [right_or_coupled(J, f, value(6, 3, seed=seed)) for seed in range(CALLS)]
    if change not in ("norm clip", "branch"):
        assert all(right), "each sample has its own cotangent: nothing is coupled"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_detached_backward(dtype: torch.dtype) -> None:
    """Its tangents are zeros, which half precision's tolerance let pass."""
    weight = value(400, 2, dtype=dtype, seed=1)
    J = torchjac.jacobian(lambda x: weight @ Apart.apply(x))
    for plan in [*[None] * CALLS, *PLANS]:
        x = value(2, dtype=dtype)
        got = under_plan(*plan, lambda: J(x)) if plan else J(x)  # noqa: B023  (called here)
        if got is not None:
            same(got, weight * x.cos(), rtol=2e-2, atol=2e-2)


@BOTH
def test_small_output_next_to_a_large_one(dtype: torch.dtype) -> None:
    """The check measured errors by the largest entry of all outputs: a small one could be zeros."""
    weight, scale = value(200, 2, dtype=dtype, seed=1), 1e5 if dtype == torch.float32 else 1e13
    for small in (Apart.apply, lambda x: hooked(x, torch.relu), lambda x: x.sin()):
        J = torchjac.jacobian(lambda x, f=small: (scale * (weight @ x), weight @ f(x)))
        for seed in range(CALLS):
            x = value(2, dtype=dtype, seed=seed)
            same(J(x)[1], oracle_jacobian(lambda x, f=small: weight @ f(x))(x))


@BOTH
def test_forward_order_through_a_detached_backward(dtype: torch.dtype) -> None:
    """The derivative of such a backward pass is not Jv, and u'J is not off by much here."""
    weight, scale = value(200, 2, dtype=dtype, seed=1), 1e5 if dtype == torch.float32 else 1e13
    x = value(2, dtype=dtype)

    def f(x: Tensor) -> Tensor:
        return torch.cat([scale * (weight @ x), weight @ Apart.apply(x)])

    with pytest.raises(PlanRefused, match="not known to be J"):
        plan_of(f, x, orders=("forward",))
    J = torchjac.jacobian(f)
    for _ in range(CALLS):
        same(J(x)[200:], weight * x.cos())


def test_small_jacobians_are_checked() -> None:
    """Errors were measured by 1e-3 at least: a Jacobian of 1e-15 could have been anything."""
    weight, x = value(30, 4, seed=1), value(4)
    for scale in (1.0, 1e-9, 1e-15, 1e-40):
        call = Call(lambda x: scale * (weight @ x).sin(), 0, False, (x,), {})  # noqa: B023
        program, _ = capture_function(call, batched=False, create_graph=False, replayable=False)
        reference = Reference(program)
        J = scale * (weight @ x).cos()[:, None] * weight
        reference.check([J], Dense())
        with pytest.raises((Disagrees, RefusedHere)):
            reference.check([J * (1 + 1e-6)], Dense())


@pytest.mark.parametrize("place", ["custom function", "tensor hook"])
def test_backward_that_keeps_what_it_saw(place: str) -> None:
    """Recording a backward pass left the user's own buffer with a graph that grew call by call."""
    buffer, weight = torch.zeros(3, dtype=torch.float64), value(200, 3)

    def keep(g: Tensor) -> Tensor:
        buffer.copy_(g.detach() if torch._C._functorch.is_batchedtensor(g) else g)
        return g * 1

    for seed in range(CALLS):
        x = leaf(3, seed=seed)
        with quiet():
            same(torchjac.jac(weight @ PLACES[place](x, keep), x), weight)
        assert not buffer.requires_grad


READS_DATA = """
import sys, warnings, torch, torchjac
warnings.simplefilter("ignore")
weight = torch.randn(5, 3)
class Old(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x * 1
    @staticmethod
    def backward(ctx, g): return g.data * 2
def hook(x):
    (h := x * 1).register_hook(lambda g: g.data * 2)
    return h
def node(x):
    (h := x * 1).grad_fn.register_prehook(lambda gs: (gs[0].data * 2,))
    return h
for read in (Old.apply, hook, node):
    for _ in range(4):
        x = torch.randn(3, requires_grad=True)
        torch.testing.assert_close(torchjac.jac(weight @ read(x), x), 2 * weight)
        torch.testing.assert_close(torchjac.jacobian(lambda x: weight @ read(x))(x), 2 * weight)
    print(read.__name__, flush=True)
"""


def test_backward_that_reads_data() -> None:
    """`grad.data` in a stacked pass, common in old code, ended the process."""
    assert subprocess.run([sys.executable, "-c", READS_DATA], check=False).returncode == 0


# What comes late in the life of a Jacobian, when checks made at the start have long been passed.
TALL: Function = lambda x: (x * 1).repeat(20, 1)  # noqa: E731  (one of many)
LATE: dict[str, tuple[Function, Function]] = {
    # torch 2.13 batches the backward of cdist wrongly.
    "cdist": (
        lambda x: (x[:, None] - x[None] * 2).sum(-1).flatten(),
        lambda x: torch.cdist(x, x.flip(0) * 2).flatten(),
    ),
    "custom function": (TALL, lambda x: Changed.apply(x, torch.relu).repeat(20, 1)),
    "hook": (TALL, lambda x: hooked(x, CHANGES["gate"]).repeat(20, 1)),
    "builtin hook": (TALL, lambda x: hooked(x, torch.relu).repeat(20, 1)),
    "infinite slope": (lambda x: (x * 1).sqrt(), lambda x: (x * 0).sqrt()),
}


@pytest.mark.parametrize("case", LATE)
def test_what_comes_late_is_checked_too(case: str) -> None:
    """Proofs were remembered by shape, and served for another graph of the same shape."""

    def f(x: Tensor, late: bool) -> Tensor:
        return LATE[case][late](x)

    J = torchjac.jacobian(f)
    for seed in range(2 * CALLS):
        x = value(4, 3, seed=seed).abs()
        with quiet():
            same(J(x, seed >= CALLS), oracle_jacobian(f)(x, seed >= CALLS))


COUPLED: dict[str, Function] = {
    "mean": lambda x: x - x.mean(0),
    "softmax": lambda x: x.softmax(0),
    "row sum": lambda x: x.sum(1) - x.sum(),
    "large rows first": lambda x: torch.cat([1e4 * x, x - x.mean(0)], 1),
    "beside infinite slopes": lambda x: ((x * 0).sqrt(), x - x.mean(0)),
    "two outputs": lambda x: (1e4 * x, x.flip(0)),
}


@pytest.mark.parametrize("size", [2, 5, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", COUPLED)
def test_coupling_is_detected_at_every_precision(case: str, dtype: torch.dtype, size: int) -> None:
    """A tolerance in units of half precision (780 %) or of the largest row hid any coupling."""
    f, x = COUPLED[case], leaf(size, 3, dtype=dtype)
    with pytest.raises(torchjac.CoupledBatchError):
        torchjac.jacobian(f, batched=True)(x.detach())
    with pytest.raises(torchjac.CoupledBatchError):
        torchjac.jac(f(x), x, batched=True)
    for mode, chunk in PLANS:
        with torchjac.testing.force_plan(mode, chunk), pytest.raises(ERRORS):
            torchjac.jacobian(f, batched=True)(x)


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float32, torch.float64])
@BOTH
def test_coupling_of_one_input_next_to_another(dtype: torch.dtype, other: torch.dtype) -> None:
    """A large or a coarse input must not lend its tolerance to the coupled one."""
    x, y = value(5, 3, dtype=dtype), value(5, 3, dtype=other, seed=1)
    for f in (
        lambda x, y: (x - x.mean(0)) * y.to(dtype),
        lambda x, y: x - x.mean(0) + 1e5 * y.to(dtype),
        lambda x, y: (x - x.mean(0)).to(other) + y,
    ):
        with pytest.raises(torchjac.CoupledBatchError):
            torchjac.jacobian(f, (0, 1), batched=True)(x, y)


def test_coupling_next_to_samples_that_are_all_rounding() -> None:
    """Only the samples that disagreed most were looked at: four noisy ones hid the others."""

    def f(x: Tensor) -> Tensor:
        far = torch.zeros(10, 1)
        far[:4] = 1e7
        noisy = ((x + far) ** 3 - (x - far) ** 3) * (far > 0)
        return torch.cat([noisy, torch.cat([x[:4] * 0, x[4:] - 1e-3 * x[4:].mean(0)])], 1)

    with pytest.raises(torchjac.CoupledBatchError):
        torchjac.jacobian(f, batched=True)(value(10, 3, dtype=torch.float32))


def test_normalization_over_the_batch_under_autocast() -> None:
    """Outputs in half precision made the check of single-precision users blind."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    x = value(6, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(torchjac.CoupledBatchError, match="batch normalization"):
            torchjac.jacobian(net, batched=True)(x)
        expected = oracle_jacobian(net.eval(), batched=True)(x)
        J = torchjac.jacobian(net, batched=True)
        for _ in range(CALLS):
            same(J(x), expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize(
    ("size", "pair"), [*((5, p) for p in itertools.combinations(range(5), 2)), (40, (0, 16))]
)
def test_pair_that_is_coupled_later(size: int, pair: tuple[int, int]) -> None:
    """Which samples meet can hang on data; the graph looks the same before and after."""

    def f(x: Tensor, partner: Tensor) -> Tensor:
        return x + x[partner].sin()

    J = torchjac.jacobian(f, batched=True)
    alone, met = torch.arange(size), torch.arange(size)
    met[list(pair)] = met[list(pair[::-1])]
    for seed in range(CALLS):
        assert right_or_coupled(J, f, value(size, 2, seed=seed), alone)
    for seed in range(CALLS):
        x = value(size, 2, seed=seed)
        with pytest.raises(torchjac.CoupledBatchError):
            J(x, met)


def _half(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for size in (64, 64, 10):
            x = (x @ torch.randn(x.shape[1], size, generator=generator)).tanh()
    return x.float()


NOISY: dict[str, Function] = {
    "saturated softmax": lambda x: (x * 100).softmax(1),
    "cancellation": lambda x: torch.stack(
        [(x * 1e6).sin().sum(1), (x[:, 0] + 1e6) ** 3 - (x[:, 0] - 1e6) ** 3, x.prod(1)], 1
    ),
    "autocast inside": _half,
}


@pytest.mark.parametrize("case", NOISY)
def test_rounding_is_no_coupling_and_refuses_no_batching(case: str) -> None:
    """Noise in u'J was held against every batched plan: the row loop for ever, or an error."""
    x = value(8, 9, dtype=torch.float32)
    J = torchjac.jacobian(NOISY[case], batched=True)
    expected = oracle_jacobian(NOISY[case], batched=True)(x)
    for _ in range(CALLS):
        same(J(x), expected, rtol=5e-2, atol=5e-2 * expected.abs().max().item())
    refused = [name for name, _ in torchjac.last_run().refusals]
    assert not any(name.startswith("reverse") for name in refused)


def test_unused_input_is_reported_by_every_plan() -> None:
    """In forward mode an unused input beside a used one was zeros without a word."""
    weight = value(200, 2)
    J, strict = (torchjac.jacobian(lambda x, z: weight @ x, (0, 1), strict=s) for s in (0, 1))
    for seed in range(CALLS):
        x, z = leaf(2, seed=seed), leaf(2, seed=seed + 1)
        with pytest.raises(torchjac.UnusedInputError, match=r"inputs\[1\]"):
            torchjac.jac((weight @ x).sin(), [x, z])
        with pytest.warns(torchjac.UnusedInputWarning, match="'z'"):
            J(x.detach(), z.detach())
        with pytest.raises(torchjac.UnusedInputError, match="'z'"):
            strict(x.detach(), z.detach())
    for mode, chunk in PLANS[:-2]:
        with torchjac.testing.force_plan(mode, chunk), pytest.raises(torchjac.UnusedInputError):
            torchjac.jac((weight @ x).sin(), [x, z])


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo])
def test_sparse_inside_another_jacobian_is_an_error(layout: torch.layout) -> None:
    """Sparse values are detached: the derivative through them was dropped in silence."""
    inner = torchjac.jacobian(lambda x: x**3, layout=layout)
    second = torchjac.hessian(lambda x: (x**4).sum(), layout=layout)
    for f in (inner, second, lambda x: inner(x).to_dense().sum(1) + x):
        with pytest.raises(torchjac.ArgumentError, match="dense"):
            torchjac.jacobian(f)(value(4))


def test_second_derivative_of_a_compiled_function_is_never_quiet_zeros() -> None:
    """torch.compile cuts the graph of a gradient: an error or a warning, not a zero Hessian."""
    f = torch.compile(lambda x: torch.stack([x.sin().prod(), (x**3).sum()]), backend="aot_eager")
    x = leaf(4)
    calls: list[Callable[[], Tensor]] = [
        lambda: torch.autograd.grad(torchjac.jac(f(x), x, create_graph=True).sum(), x)[0],
        lambda: torchjac.hessian(lambda z: f(z).sum())(x.detach()),
        lambda: torchjac.jacobian(torchjac.jacobian(f))(x.detach()),
    ]
    same(torchjac.jac(f(x), x), oracle(f(x), x))
    for call in calls:
        with warnings.catch_warnings(record=True) as caught, contextlib.suppress(RuntimeError):
            warnings.simplefilter("always", torchjac.UnusedInputWarning)
            assert call().any() or caught
