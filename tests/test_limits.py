"""Limits of memory, threads and the planner's own memory, and what is said at the border.

Each was once crossed: a budget ignored, a switch of torch left off, a fault of one call remembered
for ever. No test looks at a clock: asserted is what the planner knows and what is allocated.
"""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import torchjac
from graphs import ThroughNumpy
from laws import leaf, oracle, oracle_jacobian, quiet, same, value
from torchjac.testing import force_plan

MIB = 2**20
CALLS = 25  # more than the planner takes to settle


def known_limit(reason: str) -> pytest.MarkDecorator:
    """A limit that the documentation states: when it falls, say so there."""
    return pytest.mark.xfail(strict=True, reason=reason)


def refusals() -> list[str]:
    """What the last run of this thread says was refused."""
    return [f"{name}: {why}" for name, why in torchjac.last_run().refusals]


def widening(x: Tensor, width: int, depth: int) -> Tensor:
    """A chain with two wide operations in its middle; its shape outside is that of x."""
    for _ in range(depth):
        x = x.sin()
    x = (x[:, None] * torch.ones(width)).sin().mean(1)
    for _ in range(depth):
        x = x.sin()
    return x


@pytest.mark.parametrize("depth", [*range(0, 8), 92, 100, 101, 102, 155, 200, 201, 236])
@pytest.mark.parametrize("entry", ["jac", "jacobian"])
def test_budget_holds_when_the_data_grow(entry: str, depth: int) -> None:
    """A plan found on a small graph ran a big one of the same shapes: 6 GB with 8 MiB allowed."""
    J = torchjac.jacobian(widening, memory_budget=MIB)
    for width in (4, 4, 4, 5000, 4, 5000, 40):
        x = leaf(20, dtype=torch.float32)
        if entry == "jac":
            got = torchjac.jac(widening(x, width, depth), x, memory_budget=MIB)
        else:
            got = J(x.detach(), width, depth)
        assert torchjac.last_run().chunk < 2 + MIB // (20 * width * 4)
        assert got.isfinite().all()


ROW_LOOP = """
import json, resource, torch, torchjac
def held():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()
def peak_of_this_process():  # ru_maxrss would count the test runner that it was started from
    with open("/proc/self/status") as f:
        return 1024 * next(int(line.split()[1]) for line in f if line.startswith("VmHWM"))
x = torch.randn(700, requires_grad=True)
torchjac.jac(x[:3].sin(), x)
y = torch.outer(x, x).sin().sum(1)
torch.autograd.grad(y[0], x, retain_graph=True)
before = held()
J = torchjac.jac(y, x, memory_budget=2**20)
peak = peak_of_this_process()
print(json.dumps({"took": peak - before, "chunk": torchjac.last_run().chunk}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_row_loop_does_not_pin_the_heap() -> None:
    """Small rows kept alive among the large temporaries of their passes held on to 1.4 GB."""
    report = json.loads(subprocess.check_output([sys.executable, "-c", ROW_LOOP], text=True))
    assert report["chunk"] == 1
    assert report["took"] < 100 * MIB, report


def living() -> int:
    """Bytes of all tensors that Python can reach."""
    gc.collect()
    tensors = (o for o in gc.get_objects() if issubclass(type(o), Tensor))
    sizes = {}
    for tensor in tensors:
        with contextlib.suppress(NotImplementedError, RuntimeError):  # what other tests left
            memory = tensor.untyped_storage()
            if memory.device.type != "meta":
                sizes[memory._cdata] = memory.nbytes()
    return sum(sizes.values())


@pytest.mark.parametrize("batched", [True, False])
def test_nothing_the_size_of_an_output_stays(batched: bool) -> None:
    """Random cotangents were remembered per shape: 64 tensors of the size of the outputs."""
    torch.manual_seed(0)
    J = torchjac.jacobian(nn.Linear(2, 20).double() if batched else torch.sin, batched=batched)
    J(value(10, 2))
    before = living()
    for extra in range(12):
        J(value(1000 + extra, 2) if batched else value(60 + extra))
    assert living() - before < 4096


@known_limit("a graph does not tell what a user's own backward allocates")
def test_budget_sees_into_custom_functions() -> None:
    """What a user's backward allocates beside its result cannot be read off the graph."""
    most = 0

    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            nonlocal most
            wide = grad[:, None] * torch.ones(1, 5000)
            stacked = torch._C._functorch.is_batchedtensor(wide)
            raw = torch._C._functorch.get_unwrapped(wide) if stacked else wide
            most = max(most, raw.numel() * raw.element_size())
            return wide.sin().sum(1)

    x = leaf(40, dtype=torch.float32)
    torchjac.jac(Opaque.apply(x), x, memory_budget=MIB)
    assert most <= MIB


_library = torch.library.Library("torchjac_limits", "DEF")
_library.define("double(Tensor x) -> Tensor")
_library.impl("double", lambda x: x * 2, "CPU")


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("fresh", [False, True])
def test_vmap_of_other_threads_goes_on(fresh: bool) -> None:
    """Its fallback is one switch for the process, which was off while a Jacobian was computed."""
    weight, errors, stop = value(30, 4), [], threading.Event()
    J = torchjac.jacobian(f := lambda x: (weight @ x).sin().tanh().exp())
    for _ in range(CALLS):
        J(value(4))

    def other() -> None:
        while not stop.is_set():
            try:
                torch.vmap(torch.ops.torchjac_limits.double)(torch.ones(3, 2))
            except RuntimeError as error:
                errors.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    try:
        for seed in range(300):
            (torchjac.jacobian(f) if fresh else J)(value(4, seed=seed))
    finally:
        stop.set()
        thread.join()
    assert torch._C._functorch._is_vmap_fallback_enabled()
    assert not errors, f"{len(errors)} times {errors[0]}"


def test_values_that_do_not_exist() -> None:
    """One call under FakeTensorMode broke every later one; meta tensors and make_fx raised."""
    J = torchjac.jacobian(torch.sin)
    with FakeTensorMode():
        assert J(torch.ones(11)).shape == (11, 11)
        x = torch.ones(11, requires_grad=True)
        with contextlib.suppress(torchjac.ArgumentError):  # words are as good as a result
            assert torchjac.jac(x.sin(), x).shape == (11, 11)
    for _ in range(CALLS):
        same(J(value(11)), value(11).cos().diag())
    assert J(torch.ones(3, device="meta")).shape == (3, 3)
    x = torch.ones(3, device="meta", requires_grad=True)
    with contextlib.suppress(torchjac.ArgumentError):
        assert torchjac.jac(x.sin(), x).shape == (3, 3)
    assert torchjac.hessian(lambda x: x.sin().sum())(x.detach()).shape == (3, 3)
    traced = make_fx(J)(value(4))
    same(traced(value(4, seed=1)), value(4, seed=1).cos().diag())


@known_limit("torch hands a batched pass to retain_grad() and to hooks as it is")
def test_retained_gradient_is_a_tensor() -> None:
    """A batched pass leaves its stack, of a vmap that is over, in `h.grad` of retain_grad()."""
    x = leaf(3)
    h = x * 2
    h.retain_grad()
    torchjac.jac(h.sin(), x)
    assert h.grad is None or not torch._C._functorch.is_batchedtensor(h.grad)


class Failing(torch.autograd.Function):
    """The identity, whose backward raises or asks for a number while it is told to."""

    mood = "raise"

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if Failing.mood == "raise":
            raise RuntimeError("not now")
        if Failing.mood == "item":
            grad.sum().item()
        return grad * 1


@pytest.mark.parametrize("spoil", [lambda y: y.sum().backward(), lambda y: y.detach().mul_(2)])
def test_error_of_one_graph_is_not_held_against_the_next(spoil: Callable[[Tensor], None]) -> None:
    """After one freed graph, graphs of its kind were never batched again in that process."""
    weight = value(30, 20)
    for _ in range(3):
        x = leaf(20)
        y = (weight @ x.sin()).tanh()
        spoil(y)
        with pytest.raises(RuntimeError, match=r"second time|modified by an inplace"):
            torchjac.jac(y, x)
        same(torchjac.jac(y := (weight @ x.sin()).tanh(), x), oracle(y, x))
        assert not refusals()


@pytest.mark.parametrize("mood", ["raise", "item"])
def test_passing_fault_of_a_backward_passes(mood: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward that failed, or could not be stacked, once was looped over for ever."""
    weight = value(40, 20)
    J = torchjac.jacobian(lambda x: (weight @ Failing.apply(x)).tanh())
    monkeypatch.setattr(Failing, "mood", mood)
    expected = pytest.raises(RuntimeError, match="not now") if mood == "raise" else quiet()
    with quiet():
        with expected:
            J(value(20))
        monkeypatch.setattr(Failing, "mood", "fine")
        for _ in range(2 * CALLS):
            J(value(20))
    assert not [r for r in refusals() if r.startswith("reverse")]


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_values_that_are_not_finite_refuse_nothing_for_later(bad: float) -> None:
    """One call at the usual starting point, zero, ruled forward mode out for ever."""
    weight = value(300, 2)
    J = torchjac.jacobian(f := lambda x: (weight @ x).abs().sqrt())
    modes = set()
    for seed in range(CALLS + 5):
        x = torch.full((2,), bad).double() if seed % 8 == 0 else value(2, seed=seed)
        same(J(x), oracle_jacobian(f)(x))
        modes.add(torchjac.last_run().mode)
        assert not refusals()
    assert "forward" in modes


def seen_candidates(outputs: Tensor, inputs: Any) -> list[tuple[str, float]]:
    torchjac.jac(outputs, inputs, memory_budget=64 * MIB)
    return [(c.name, c.predicted) for c in torchjac.last_run().candidates]


@pytest.mark.parametrize("kind", ["before the input", "before a constant", "around the input"])
def test_what_leads_to_no_input_does_not_count(kind: str) -> None:
    """jac(y, hidden) walked and costed all that lies behind hidden, on every call."""
    backbone = leaf(10)
    for _ in range(300):
        backbone = backbone.sin()
    weight = leaf(4, 10)

    def costs(x: Tensor) -> list[tuple[str, float]]:
        if kind == "before the input":
            h = x * 1
            return seen_candidates((weight.detach() @ h).tanh(), h)
        if kind == "before a constant":
            return seen_candidates((weight @ x).tanh(), weight)
        h = x[:5] * 1
        return seen_candidates((weight.detach()[:, :5] @ h + x[5:9]).tanh(), h)

    bare = backbone.detach().requires_grad_(kind != "before a constant")
    assert costs(backbone) == costs(bare)


class Counting(nn.Module):
    """A module that counts its calls, through NumPy so that copies of the input look attractive."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = ThroughNumpy.apply(x)
        for _ in range(20):
            h = h + 0.1 * h.tanh()
        return h.repeat(20)


TWICE = known_limit("a plain function may run once more, on copies of its input, to save passes")


@pytest.mark.parametrize(
    "wrapped", [False, pytest.param(True, marks=TWICE)], ids=["module", "function of it"]
)
def test_function_runs_once_a_call(wrapped: bool) -> None:
    """Counters and averages moved twice: the replicated plan runs f again on copies."""
    module = Counting()
    J = torchjac.jacobian((lambda x: module(x)) if wrapped else module)
    with quiet():
        for _ in range(CALLS):
            J(value(3))
    assert module.calls == CALLS


@known_limit("a record is put together when it is asked for")
def test_record_stays_as_it_was() -> None:
    """Later calls in another place show in the record of an earlier one."""
    J = torchjac.jacobian(lambda x: torch.outer(x, x).sin())
    J(value(6))
    first = torchjac.last_run()
    thread = threading.Thread(target=lambda: [J(value(6)) for _ in range(CALLS)])
    thread.start()
    thread.join()
    assert torchjac.last_run() == first


@known_limit("inside a transform torch.func does the work, and gives zeros")
def test_strict_holds_inside_a_transform() -> None:
    """Under torch.vmap an unused input is zeros, whatever `strict` says."""
    J = torchjac.jacobian(lambda x: torch.ones(3), strict=True)
    with pytest.raises(torchjac.UnusedInputError):
        torch.vmap(J)(value(2, 3))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_coupling_is_named_when_the_graph_is_freed(rows: int, chunk: int | None) -> None:
    """The last pass freed the graph before it was known whether samples meet."""
    x = leaf(5, 3)
    y = (x - x.mean(0)).pow(2)
    y = y.sum(1) if rows == 1 else y
    plan = contextlib.nullcontext() if chunk is None else force_plan("reverse", chunk)
    with plan, pytest.raises(torchjac.CoupledBatchError, match="sample"):
        torchjac.jac(y, x, batched=True, retain_graph=False)


@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_csr, torch.sparse_coo])
@pytest.mark.parametrize("batched", [False, True])
def test_input_without_a_gradient(layout: torch.layout, batched: bool) -> None:
    """An input that does not require a gradient was an IndexError instead of the promised words."""
    x, other = leaf(3), value(3)
    for inputs in (other, [other], {"a": x, "b": other}):
        with pytest.raises(torchjac.UnusedInputError, match="does not require a gradient"):
            torchjac.jac(x * 2, inputs, layout=layout, batched=batched)
        zeros = torchjac.jac(x * 2, inputs, layout=layout, batched=batched, allow_unused=True)
        block = zeros if inputs is other else zeros[0] if isinstance(inputs, list) else zeros["b"]
        assert not block.to_dense().any()
        assert block.layout == layout


x3 = value(3)
WORDS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "jac of a function": (lambda: torchjac.jac(torch.sin, leaf(3)), r"jacobian\(f\)", "has_aux"),
    "jac of a number": (lambda: torchjac.jac(3, leaf(3)), "int", "has_aux"),
    "jac of an array": (lambda: torchjac.jac(x3.numpy(), leaf(3)), "ndarray", "has_aux"),
    "jac at an array": (lambda: torchjac.jac(leaf(3), x3.numpy()), "ndarray", "argnums"),
    "hessian of a tensor": (lambda: torchjac.hessian(x3), "hessian", "jacobian takes"),
    "layout": (lambda: torchjac.jacobian(torch.sin, layout=[]), "layout", "unhashable"),
    "argnums name": (lambda: torchjac.jacobian(torch.sin, "x"), "argnums", "!"),
    "argnums tensor": (lambda: torchjac.jacobian(torch.sin, x3), "argnums", "!"),
    "argnums list": (lambda: torchjac.hessian(torch.sin, [0]), "argnums", "!"),
    "argnums twice": (lambda: torchjac.jacobian(torch.sin, (0, 0)), "argnums", "!"),
    "sparse": (lambda: torchjac.jacobian(torch.sin)(torch.eye(3).to_sparse()), "sparse|dense", "!"),
}


@pytest.mark.parametrize("case", WORDS)
def test_mistakes_are_named(case: str) -> None:
    """Words about options that the call does not have, another call's name, or a bare TypeError."""
    call, says, not_that = WORDS[case]
    with pytest.raises(torchjac.ArgumentError, match=says) as caught:
        call()
    assert not_that not in str(caught.value)
