"""The accumulate engine against the row loop: the point it was planned at, and others.

What it cannot do it must refuse; which operations it refuses stands on a scoreboard
(`data/accumulate_scoreboard.json`, and files of later versions of torch: see `versions.py`), which
fails on more and on fewer. After a change that is meant to change it:

    OMP_NUM_THREADS=1 python tests/test_accumulate.py
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import scipy.sparse
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from hypothesis import given
from torch import Tensor, nn

import torchjac
from accumulating import plan_of, run
from captured import values
from laws import oracle_jacobian, quiet, same, value
from opinfo_exceptions import TORCH_DISAGREES
from programs import PROGRAMS, Program
from test_opinfo import cases
from test_pattern_cases import CASES
from test_patterns_opinfo import OPS, elsewhere, realized
from torchjac._torch.inductor import NotCompiled, compile_graph
from torchjac.compiler import compile as elimination
from torchjac.errors import CaptureRefused, Disagrees, PlanRefused
from torchjac.request import Mode
from versions import board, write_board

tensor_program = importlib.import_module("torchjac.compiler.program.tensor_program")
SCOREBOARD = "accumulate_scoreboard"
SAMPLES = 3
Function = Callable[..., Any]

ENDS = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [1, 3]])
WIDE = value(6, 5, seed=1)
DEEP = value(5, 6, seed=2)
KERNEL = value(2, 1, 3, 3, seed=3)


def pairs(x: Tensor) -> Tensor:
    """Forces between all pairs of bodies."""
    p = x.reshape(-1, 2)
    apart = p[:, None] - p[None, :]
    near = (apart.square().sum(-1) + 0.5).pow(-1.5)
    return (apart * near[..., None]).sum(1).reshape(-1)


def edges(x: Tensor) -> Tensor:
    """Messages along edges, gathered, and added up at both ends."""
    a, b = x[ENDS[:, 0]], x[ENDS[:, 1]]
    flux = (a * b).sin()
    return torch.zeros_like(x).index_add(0, ENDS[:, 0], flux).index_add(0, ENDS[:, 1], -flux)


def twice(x: Tensor) -> Tensor:
    """Two rounds of messages: the second begins where the first ended."""
    return edges(edges(x) * 0.5 + x)


def residual(x: Tensor) -> Tensor:
    """Blocks with skips around them."""
    for k in range(4):
        x = x + torch.tanh(x @ WIDE @ DEEP + 0.1 * k)
    return x


def recurrent(x: Tensor) -> Tensor:
    """A small cell, unrolled."""
    h = torch.zeros(5, dtype=x.dtype)
    for step in x.reshape(3, 2):
        h = torch.tanh(step @ WIDE[:2] + h @ DEEP[:, :5])
    return h


def attention(x: Tensor) -> Tensor:
    """One head, with a norm and a skip."""
    h = F.layer_norm(x, x.shape[-1:])
    q, k, v = (h @ WIDE).unsqueeze(0).expand(3, -1, -1)
    return x + (torch.softmax(q @ k.mT, -1) @ v) @ DEEP


def stencil(x: Tensor) -> Tensor:
    """Reaction and diffusion on a ring."""
    return x.roll(1) + x.roll(-1) - 2 * x + x * x * x.flip(0)


def bounded(x: Tensor) -> Tensor:
    """A stencil with a boundary."""
    padded = F.pad(x, (1, 1))
    return (padded[2:] - padded[:-2]) * x


def steps(x: Tensor) -> Tensor:
    """Several steps of a stencil, which fill in."""
    for _ in range(4):
        x = x + 0.1 * stencil(x)
    return x


def unet(x: Tensor) -> Tensor:
    """Down, up, and a skip."""
    image = x.reshape(1, 1, 4, 4)
    down = F.avg_pool2d(torch.tanh(F.conv2d(image, KERNEL, padding=1)), 2)
    up = F.interpolate(down, scale_factor=2)
    return torch.cat([up, image], 1)


PROBLEMS: dict[str, tuple[Function, tuple[int, ...]]] = {
    "the question": (lambda q: torch.cat([2 * q, 4 * q * q], -1), (2,)),
    "pairs": (pairs, (8,)),
    "edges": (edges, (4, 3)),
    "edges twice": (twice, (4, 3)),
    "residual": (residual, (2, 6)),
    "recurrent": (recurrent, (6,)),
    "attention": (attention, (3, 6)),
    "stencil": (stencil, (9,)),
    "bounded": (bounded, (9,)),
    "steps": (steps, (9,)),
    "unet": (unet, (16,)),
    "mean added": (lambda x: x + x.mean().exp(), (7,)),
    "softmax": (lambda x: x.softmax(-1), (3, 4)),
    "norm": (lambda x: F.layer_norm(x, (4,)) + F.normalize(x, dim=-1), (3, 4)),
    "waist": (lambda x: torch.tanh(torch.tanh(x @ WIDE[:, :1]) @ DEEP[:1]), (6,)),
    "fft step": (lambda x: torch.fft.irfft(torch.fft.rfft(x).abs() + 1, n=8), (8,)),
    "solve": (lambda x: torch.linalg.solve(torch.diag(x) + x.outer(x) * 0.1, x), (5,)),
    "scan": (lambda x: x.cumsum(0).sin().cumprod(0), (6,)),
    "output twice": (lambda x: torch.cat([x.sin(), x.sin()]), (5,)),
    "constant": (lambda x: 3 * x.flip(0) - x, (5,)),
    "conv": (lambda x: F.conv2d(x.reshape(1, 1, 4, 4), KERNEL).sigmoid(), (16,)),
    "maximum": (lambda x: torch.maximum(x, x.flip(0)) + x.amax(), (6,)),
}


def inside(x: Tensor) -> Tensor:
    """The same numbers somewhere in the memory of a larger tensor."""
    larger = torch.full((x.numel() + 11,), 7.0, dtype=x.dtype)
    return larger[5:-6].view(x.shape).copy_(x)


def check(f: Function, *args: Any, argnums: int | tuple[int, ...] = 0, **how: Any) -> None:
    """Law: the plan gives the Jacobian of the row loop, where it was made and elsewhere."""
    for order in ("reverse",) if f in ONLY_REVERSE else ORDERS:
        check_order(order, f, *args, argnums=argnums, **how)


ORDERS: tuple[Mode, ...] = ("reverse", "forward")
# The factors that a solve leaves behind are a result of an operation that takes the cotangent too,
# so that it is linear in that is not seen; a custom function's backward may detach what it gives.
ONLY_REVERSE = {
    CASES["straight-through estimator"][0],
    PROBLEMS["solve"][0],
    CASES["solve, a batch"][0],
    CASES["solve, a constant matrix"][0],
}


def check_order(
    order: Mode, f: Function, *args: Any, argnums: int | tuple[int, ...] = 0, **how: Any
) -> None:
    """The law for one order of elimination."""
    plan, first = plan_of(f, *args, argnums=argnums, orders=(order,), **how)
    assert plan.program.mode == order
    batched = how.get("batched", False)
    points = [args, *(tuple(inside(0.7 * a.roll(1) + 0.1 * k) for a in args) for k in (1, 2))]
    for k, point in enumerate(points):
        J = run(plan, f, *point, argnums=argnums)
        want = oracle_jacobian(f, argnums, batched=batched)(*point)
        if "layout" in how:
            J, first = (x if x is None else x.to_dense() for x in (J, first))
            want = want.reshape(J.shape)
        same(J, want)
        if not k:
            same(first, want)


@pytest.mark.parametrize("name", PROBLEMS)
def test_dense(name: str) -> None:
    """Every problem."""
    f, shape = PROBLEMS[name]
    check(f, value(*shape))


SINGLE = ["the question", "pairs", "edges", "edges twice", "stencil", "bounded", "steps", "softmax"]


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_csr], ids=["dense", "csr"])
def test_single_precision(name: str, layout: torch.layout) -> None:
    """Those that close over nothing, in float32."""
    f, shape = PROBLEMS[name]
    how = {} if layout is torch.strided else {"layout": layout}
    check(f, value(*shape, dtype=torch.float32), **how)


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo], ids=["csr", "coo"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_sparse(name: str, layout: torch.layout) -> None:
    """The same entries in their places."""
    f, shape = PROBLEMS[name]
    check(f, value(*shape), layout=layout)


@pytest.mark.parametrize("name", CASES)
def test_where_patterns_are_hard(name: str) -> None:
    """The cases that another detector gets wrong."""
    f, shape, _ = CASES[name]
    if name in REFUSED:
        with pytest.raises((CaptureRefused, PlanRefused)):
            plan_of(f, value(*shape))
    else:
        check(f, value(*shape))


# What is left to passes, and why.
REFUSED = {
    "convolution with its kernel": "it draws random numbers",
    "matrix exponential": "its backward is linear through a trick of its formula only",
}


BATCHED: dict[str, Function] = {
    "network": lambda x: torch.tanh(torch.tanh(x @ WIDE) @ DEEP),
    "softmax": lambda x: x.softmax(-1),
    "norm": lambda x: F.layer_norm(x, (6,)),
    "product": lambda x: x.prod(-1, keepdim=True) * x.sin(),
    "matrices": lambda x: (x[:, :4].reshape(-1, 2, 2) @ x[:, 2:].reshape(-1, 2, 2)).flatten(1),
    "linear": lambda x: x @ WIDE,
    "gathered": lambda x: x[:, [0, 0, 3]] * x[:, [1, 2, 5]],
}


@pytest.mark.parametrize("name", BATCHED)
def test_batched(name: str) -> None:
    """Samples side by side."""
    check(BATCHED[name], value(7, 6), batched=True)


def test_samples_that_are_coupled_are_refused() -> None:
    """The plan is for what is proved."""
    with pytest.raises(PlanRefused, match="independent"):
        plan_of(lambda x: x - x.mean(0), value(5, 3), batched=True)


def test_several_arguments_and_results() -> None:
    """Trees of inputs and outputs, one of which does not depend on everything."""

    def f(state: dict[str, Tensor], k: float, gain: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return state["a"] * gain, {"sum": state["b"].sum() * k, "both": state["a"] * state["b"]}

    args = {"a": value(3), "b": value(3, seed=1)}, 2.0, value(3, seed=2)
    plan, first = plan_of(f, *args, argnums=(0, 2))
    want = oracle_jacobian(f, (0, 2))(*args)
    same(first, want)
    same(run(plan, f, *args, argnums=(0, 2)), want)


@given(PROGRAMS)
def test_random_programs(program: Program) -> None:
    """Law: right or refused."""
    inputs = program.inputs()
    argnums = tuple(range(len(inputs)))
    with quiet():
        want = oracle_jacobian(program, argnums)(*inputs)
        for order in ORDERS:
            try:
                plan, first = plan_of(program, *inputs, argnums=argnums, orders=(order,))
            except (CaptureRefused, PlanRefused):
                continue
            same(first, want)
            again = run(plan, program, *inputs, argnums=argnums)
            if again is not None:
                same(again, want)


def refusals(n: str) -> dict[str, list[str]]:
    """Checks the samples of an op; gives why some are refused, for each order of elimination."""
    reasons: dict[str, set[str]] = {order: set() for order in ORDERS}
    for case in cases(n)[:SAMPLES]:
        torch.manual_seed(0)  # of what is compared
        f, tensors = realized(case), case.tensors
        argnums = tuple(range(len(tensors)))
        plain = [x.detach() for x in tensors]
        if not all(x.numel() for x in plain):
            continue
        points = [tuple(plain), *([x.detach() for x in elsewhere(tensors, k)] for k in range(2))]
        wanted = []
        for point in points:
            with contextlib.suppress(RuntimeError):  # not defined there
                wanted.append((point, oracle_jacobian(f, argnums)(*point)))
        for order in ORDERS:
            try:
                plan, _ = plan_of(f, *plain, argnums=argnums, orders=(order,))
            except (CaptureRefused, PlanRefused, RuntimeError) as refusal:
                # Where all cancels, rounding decides.
                if not isinstance(refusal, Disagrees) and "rounding" not in str(refusal):
                    reasons[order].add(type(refusal).__name__)
                continue
            for point, want in () if n in TORCH_DISAGREES else wanted:
                agrees(run(plan, f, *point, argnums=argnums), want)
        if wanted and n not in TORCH_DISAGREES:
            in_other_kinds(f, plain, argnums, wanted[0][1])
    return {order: sorted(names) for order, names in reasons.items() if names}


def in_other_kinds(f: Function, plain: list[Tensor], argnums: tuple[int, ...], want: Any) -> None:
    """Law: a sparse result, and one in single precision, say the same; or are refused."""
    refused = (CaptureRefused, PlanRefused, RuntimeError)
    with contextlib.suppress(*refused):
        _, J = plan_of(f, *plain, argnums=argnums, layout=torch.sparse_csr)
        blocks = zip(pytree.tree_leaves(J), pytree.tree_leaves(want), strict=True)
        agrees([b.to_dense().reshape(w.shape) for b, w in blocks], pytree.tree_leaves(want))
    single = [x.float() for x in plain]
    with contextlib.suppress(*refused):  # what it closes over may be in double precision
        _, J = plan_of(f, *single, argnums=argnums)
        agrees(J, oracle_jacobian(f, argnums)(*single))


def agrees(got: Any, want: Any) -> None:
    """Law: the same but for rounding, where the plan gives anything."""
    if got is None:
        return
    for x, y in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        tolerance = 1e-7 if y.dtype == torch.float64 else 2e-3
        size = float(y.abs().max()) if y.numel() else 0.0
        torch.testing.assert_close(
            x, y, rtol=tolerance, atol=tolerance * max(size, 1.0), check_stride=False
        )


@pytest.mark.parametrize("n", OPS)
def test_operations(n: str) -> None:
    """Every differentiable operation: right, or refused as the scoreboard says."""
    with quiet():
        reasons, counted = refusals(n), board(SCOREBOARD)
    if counted is not None:
        assert reasons == counted.get(n, {})


class TestJacobian:
    """The engine behind the public call."""

    def ran(self, J: Any, *args: Any, calls: int = 400) -> bool:
        """Whether it comes into use."""
        for _ in range(calls):
            J(*args)
            if torchjac.last_run().engine == "accumulate":
                return True
        return False

    def test_planning_says_nothing(self, recwarn: pytest.WarningsRecorder, capfd: Any) -> None:
        """Of operations that torch.vmap loops over while a plan is made: neither Python nor C++."""
        J = torchjac.jacobian(lambda x: torch.view_as_real(torch.fft.ihfft2(x)), compile=True)
        J(value(3, 4))
        assert not recwarn.list
        assert "performance drop" not in capfd.readouterr().err

    def test_comes_into_use(self) -> None:
        J = torchjac.jacobian(pairs)
        x = value(24)
        assert self.ran(J, x)
        record = torchjac.last_run()
        same(J(x), oracle_jacobian(pairs)(x))
        y = value(24, seed=5)
        same(J(y), oracle_jacobian(pairs)(y))
        assert record.engine in str(record)
        assert {c.name for c in record.candidates} >= {"accumulate reverse", "passes"}

    def test_what_is_read_is_not_looked_at_before_that_is_needed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It takes longer than a small Jacobian: at the first call, and when a plan is due."""

        def f(x: Tensor) -> Tensor:
            for _ in range(60):
                x = torch.sin(x) + x
            return x

        J = torchjac.jacobian(f)
        seen = []
        entries = J._dispatcher._entries
        build = entries.build_guard
        monkeypatch.setattr(entries, "build_guard", lambda call: (seen.append(1), build(call))[1])
        for _ in range(5):  # less than planning takes
            J(value(3))
            assert torchjac.last_run().engine == "plain"
        assert len(seen) == 1

    def test_scipy(self) -> None:
        J = torchjac.jacobian(stencil, layout=scipy.sparse.csr_array)
        x = value(4000)
        assert self.ran(J, x)
        got = J(x)
        assert isinstance(got, scipy.sparse.csr_array)
        assert got.nnz == J.pattern(x).nnz

    def test_what_the_function_reads_may_change(self) -> None:
        """A plan is not used for a function that is another one now."""
        scale = {"k": 2.0}
        J = torchjac.jacobian(f := lambda x: scale["k"] * pairs(x))
        x = value(24)
        assert self.ran(J, x)
        scale["k"] = 3.0
        same(J(x), oracle_jacobian(f)(x))

    @pytest.mark.parametrize("how", ["in place", "data", "replaced"])
    def test_parameters_may_be_trained(self, how: str) -> None:
        net = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 40)).double()
        J = torchjac.jacobian(net)
        x = value(40)
        assert self.ran(J, x)
        with torch.no_grad():
            if how == "in place":
                net[0].weight.mul_(1.5)
            elif how == "data":
                net[0].weight.data = net[0].weight.data * 1.5
            else:
                net[0].weight = nn.Parameter(net[0].weight * 1.5)
        same(J(x), oracle_jacobian(net)(x))
        if how == "in place":
            assert torchjac.last_run().engine == "accumulate"

    def test_value_and_aux(self) -> None:
        J = torchjac.jacobian(lambda x: (pairs(x), {"n": x.sum()}), has_aux=True)
        x = value(24)
        assert self.ran(J, x)
        jacobian, aux = J(x)
        same(jacobian, oracle_jacobian(pairs)(x))
        same(aux["n"], x.sum())
        (out, aux), jacobian = J.value_and(x)
        same(out, pairs(x))
        assert not out.requires_grad

    def test_values_that_are_not_finite_are_for_passes(self) -> None:
        J = torchjac.jacobian(f := lambda x: pairs(x).abs().sqrt() + x.abs().sqrt())
        x = value(24)
        assert self.ran(J, x)
        x[3] = 0.0
        same(J(x), oracle_jacobian(f)(x))

    def test_another_argument_may_have_any_value(self) -> None:
        J = torchjac.jacobian(f := lambda x, w: pairs(x) * w)
        x, w = value(24), value(24, seed=1)
        assert self.ran(J, x, w)
        w = value(24, seed=2)
        same(J(x, w), oracle_jacobian(f)(x, w))
        assert torchjac.last_run().engine == "accumulate"

    def test_arguments_need_not_be_contiguous(self) -> None:
        J = torchjac.jacobian(pairs)
        assert self.ran(J, value(24))
        x = value(48)[::2]
        same(J(x), oracle_jacobian(pairs)(x))

    def test_rows_of_a_matrix(self) -> None:
        """Arguments that do not begin where their memory does."""
        J = torchjac.jacobian(f := lambda q: (q.view(6, 4).T @ q.view(6, 4)).sin().sum(0))
        assert self.ran(J, value(24))
        for row in value(5, 24, seed=3):
            same(J(row), oracle_jacobian(f)(row))

    def test_parameters_that_are_parts_of_a_vector(self) -> None:
        net = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 40)).double()
        J = torchjac.jacobian(net)
        x = value(40)
        assert self.ran(J, x)
        count = sum(p.numel() for p in net.parameters())
        nn.utils.vector_to_parameters(0.1 * value(count, seed=1), net.parameters())
        same(J(x), oracle_jacobian(net)(x))

    def test_the_value_is_what_the_function_gives(self) -> None:
        """It may differentiate inside, or ask whether its argument requires a gradient."""

        def f(x: Tensor) -> Tensor:
            slope = torch.autograd.grad(pairs(x).square().sum(), x, create_graph=True)[0]
            return slope if x.requires_grad else -slope

        J = torchjac.jacobian(f)
        x = value(24)
        assert self.ran(J, x)
        for _ in range(3):
            out, jacobian = J.value_and(x)
            same(out, f(x.clone().requires_grad_()).detach())
            same(jacobian, oracle_jacobian(f)(x))

    def test_blocks_that_are_the_same_share_nothing(self) -> None:
        plan, _ = plan_of(f := lambda x: {"a": x.sin().sum(), "b": x.sin().sum()}, value(3))
        J = run(plan, f, value(3))
        J["a"].zero_()
        same(J["b"], value(3).cos())

    def test_indices_of_a_result_are_the_callers(self) -> None:
        plan, first = plan_of(torch.sin, value(4), layout=torch.sparse_csr)
        for J in (first, run(plan, torch.sin, value(4))):
            J.crow_indices().zero_()
            J.col_indices().zero_()
        same(run(plan, torch.sin, value(4)).to_dense(), torch.diag(value(4).cos()))

    def test_what_a_function_writes_is_written_each_time(self) -> None:
        norm = nn.BatchNorm1d(3).double()
        J = torchjac.jacobian(norm)
        for _ in range(60):
            J(value(5, 3))
        assert int(norm.num_batches_tracked) == 60
        log: list[int] = []

        def f(x: Tensor) -> Tensor:
            log.append(1)
            return pairs(x)

        J = torchjac.jacobian(f)
        for _ in range(60):
            J(value(24))
        assert len(log) >= 60

    @pytest.mark.parametrize("name", ["clamp", "where", "round"])
    def test_hooks_that_are_not_linear_are_for_passes(self, name: str) -> None:
        hook = {
            "clamp": lambda g: g.clamp(-3, 3),
            "where": lambda g: torch.where(g.abs() > 3, 0.0, g),
            "round": lambda g: g.round(),
        }[name]

        def f(x: Tensor) -> Tensor:
            y = x.sin()
            y.register_hook(hook)
            return y * x * 2 + (y * x).sum()

        with pytest.raises(PlanRefused, match="linear"):
            plan_of(f, value(5))

    @pytest.mark.parametrize(
        "hidden",
        [
            lambda x: nn.Parameter(x * 2),
            lambda x: nn.Parameter(x),
            lambda x: nn.Parameter(x.detach(), requires_grad=False),
            lambda x: nn.ParameterList([x.detach()])[0],
            lambda x: torch.Tensor._make_subclass(torch.Tensor, x * 2),
        ],
    )
    def test_tensors_filled_without_an_operation(self, hidden: Function) -> None:
        """A gain of zero hides them from any comparison, here but not elsewhere."""

        def f(x: Tensor, gain: Tensor) -> Tensor:
            return gain * hidden(x) * x + x**3

        with pytest.raises(CaptureRefused, match="without an operation"):
            plan_of(f, value(4), torch.zeros((), dtype=torch.float64))

    def test_structural_zeros_stay_zero(self) -> None:
        """Where autograd makes 0 times infinity NaN, an entry that is structurally zero is zero."""
        plan, _ = plan_of(f := lambda x: x.sqrt()[1:], torch.ones(3, dtype=torch.float64))
        J = run(plan, f, torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64))
        expected = torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.0, 0.25]], dtype=torch.float64)
        same(J, expected)

    def test_a_plan_compiled_in_inference_mode_gives_ordinary_tensors(self) -> None:
        with torch.inference_mode():
            plan, first = plan_of(pairs, value(8))
            assert not first.is_inference()
            assert not run(plan, pairs, value(8)).is_inference()

    def test_a_small_result_holds_no_large_memory(self) -> None:
        plan, _ = plan_of(f := lambda x, w: (x * w.sin()[:, 2]).sum(), value(4), value(4, 50))
        assert run(plan, f, value(4), value(4, 50)).untyped_storage().nbytes() == 4 * 8

    def test_a_second_derivative_is_not_lost(self) -> None:
        J = torchjac.jacobian(pairs, create_graph=True)
        x = value(24)
        for _ in range(20):
            J(x)
        y = x.clone().requires_grad_()
        J(y).square().sum().backward()
        assert y.grad is not None

    def test_random_numbers_that_do_not_matter_are_drawn(self) -> None:
        """Or what is drawn after it is something else."""
        J = torchjac.jacobian(lambda x: (x * x).sin() + 0 * torch.rand(1, dtype=x.dtype))
        x = value(50)
        states = set()
        for _ in range(60):
            J(x)
            states.add(bytes(torch.get_rng_state().numpy()))
        assert len(states) == 60
        with pytest.raises(PlanRefused, match="random"):
            plan_of(lambda x: x * x + 0 * torch.rand(1), value(3))

    def test_random_functions_are_for_passes(self) -> None:
        J = torchjac.jacobian(lambda x: F.dropout(pairs(x)))
        assert not self.ran(J, value(24), calls=30)

    def test_a_hessian(self) -> None:
        H = torchjac.hessian(energy := lambda x: pairs(x).square().sum())
        x = value(24)
        assert self.ran(H, x)
        same(H(x), torch.func.hessian(energy)(x))

    @pytest.mark.parametrize("layout", [torch.strided, torch.sparse_csr, torch.sparse_coo])
    def test_results_are_the_callers(self, layout: torch.layout) -> None:
        """Constant entries, entries that are an argument, entries that are the same twice."""

        def f(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
            return torch.cat([3 * (x + y), w * (x + y), (x + y).sin()])

        x, y, w = value(4), value(4, seed=1), value(4, seed=2)
        plan, first = plan_of(f, x, y, w, argnums=(0, 1), layout=layout)
        want = oracle_jacobian(f, (0, 1))(x, y, w)
        for _ in range(3):
            for got in (first, run(plan, f, x, y, w, argnums=(0, 1))):
                dense = [g if layout is torch.strided else g.to_dense() for g in got]
                same(tuple(dense), want)
                for block in got:
                    block.mul_(0) if layout is torch.strided else block.values().mul_(0)
            first = run(plan, f, x, y, w, argnums=(0, 1))
        same(w, value(4, seed=2))

    def test_a_linear_function(self) -> None:
        plan, _ = plan_of(f := lambda x: 2 * x.flip(0), value(5), layout=torch.sparse_csr)
        for _ in range(3):
            J = run(plan, f, value(5))
            assert torch.equal(J.values(), torch.full((5,), 2.0, dtype=torch.float64))
            J.values().zero_()

    def test_results_do_not_share_memory(self) -> None:
        J = torchjac.jacobian(lambda x: torch.cat([pairs(x), 3 * x]))
        x = value(24)
        assert self.ran(J, x)
        one = J(x)
        copy = one.clone()
        J(values(24)).mul_(2)
        same(one, copy)


class TestCompiled:
    """The same through Inductor, which is for what has no kernel."""

    @pytest.fixture(autouse=True)
    def without_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no(*_: Any) -> Any:
            raise PlanRefused("no kernels here")

        monkeypatch.setattr(elimination, "with_kernel", no)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["the question", "pairs", "edges twice", "attention"])
    def test_gives_the_same(self, name: str) -> None:
        f, shape = PROBLEMS[name]
        J = torchjac.jacobian(f, compile=True)
        for seed in range(3):
            x = value(*shape, seed=seed)
            same(J(x), oracle_jacobian(f)(x))
        assert any(c.name.endswith("compiled") for c in torchjac.last_run().candidates)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", PROBLEMS)
    def test_every_program_compiled(self, name: str) -> None:
        """What Inductor makes of it, whether that is faster or not."""
        f, shape = PROBLEMS[name]
        x = value(*shape)
        plan, _ = plan_of(f, x)
        compiled = plan.program.compiled([x])
        assert compiled.refusal is None
        for point in (x, 0.7 * x + 0.1):
            parts = compiled([point])
            assert parts is not None
            same(plan.finish(parts), oracle_jacobian(f)(point))

    @pytest.mark.slow
    def test_sparse(self) -> None:
        J = torchjac.jacobian(stencil, layout=torch.sparse_csr, compile=True)
        for seed in range(3):
            x = value(9, seed=seed)
            same(J(x).to_dense(), oracle_jacobian(stencil)(x))
        assert any(c.name.endswith("compiled") for c in torchjac.last_run().candidates)

    def test_without_a_compiler_it_runs_as_it_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no(*_: Any) -> Any:
            raise NotCompiled("no compiler found")

        monkeypatch.setattr(tensor_program, "compile_graph", no)
        J = torchjac.jacobian(pairs, compile=True)
        x = value(24)
        J(x)
        same(J(x), oracle_jacobian(pairs)(x))
        record = J.explain(x)
        assert record.engine == "accumulate"
        assert ("compile", "no compiler found") in record.refusals

    def test_what_went_wrong_is_told(self) -> None:
        module = straight_line()
        with pytest.raises(NotCompiled):
            compile_graph(module, [torch.zeros(3)])  # it takes two


def straight_line() -> torch.fx.GraphModule:
    """A graph of two inputs."""
    graph = torch.fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    graph.output((graph.call_function(torch.ops.aten.mul.Tensor, (a, b)),))
    return torch.fx.GraphModule({}, graph)


if __name__ == "__main__":
    with quiet():
        write_board(SCOREBOARD, {n: reasons for n in OPS if (reasons := refusals(n))})
