"""Accumulated Jacobians that keep their graph, against the derivative of the row loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchjac
from accumulating import graph_plan_of
from laws import oracle_jacobian, same, value
from test_accumulate import PROBLEMS
from torchjac.errors import PlanRefused
from torchjac.jit.dispatcher import Dispatcher

Function = Callable[..., Any]
CALLS = 25


@pytest.fixture(autouse=True)
def plans_come_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles at the first call: the work that pays for compiling depends on the machine."""
    monkeypatch.setattr(Dispatcher, "_is_eager", True)


def used(J: Any, *args: Any) -> bool:
    """Calls until a plan answers; False if none does."""
    for _ in range(CALLS):
        J(*args)
        record = torchjac.last_run()
        assert record is not None
        if record.engine == "accumulate":
            return True
    return False


def second(f: Function, x: Tensor) -> Tensor:
    """The derivative of a random functional of the Jacobian, by passes through passes."""
    J = torch.func.jacrev(f)
    return torch.func.grad(lambda x: (J(x).cos() * weight(J(x))).sum())(x)


def weight(J: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, J.numel(), dtype=J.dtype).reshape(J.shape)


# Their plans take second results of operations (statistics of a norm, factors of a solve), which
# autograd takes for constants.
LEFT_TO_PASSES = {"norm", "attention", "solve"}


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems(name: str) -> None:
    """The Jacobian, and the gradient of a function of it."""
    f, shape = PROBLEMS[name]
    x = value(*shape)
    if name in LEFT_TO_PASSES:
        with pytest.raises(PlanRefused, match="second result"):
            graph_plan_of(f, x)
        return
    plan, _ = graph_plan_of(f, x)
    for point in (x, x * 0.7 + 0.1):
        leaf = point.clone().requires_grad_()
        J = plan(leaf)
        same(J, oracle_jacobian(f)(point))
        loss = (J.cos() * weight(J)).sum() + 0 * leaf.sum()
        (got,) = torch.autograd.grad(loss, leaf)
        same(got, second(f, point))


def test_comes_into_use() -> None:
    f, _ = PROBLEMS["pairs"]
    J = torchjac.jacobian(f, create_graph=True)
    x = value(24).requires_grad_()
    assert used(J, x)
    jacobian = J(x)
    assert jacobian.requires_grad
    (got,) = torch.autograd.grad(jacobian.square().sum(), x)
    want = torch.func.grad(lambda x: torch.func.jacrev(f)(x).square().sum())(x.detach())
    same(got, want)


def test_the_hessian_of_a_gradient() -> None:
    """Second derivatives against torch.func.hessian."""

    def energy(x: Tensor) -> Tensor:
        return (x.sin() * x.roll(1) * x.roll(2)).sum() + torch.tanh(x).square().mean()

    J = torchjac.jacobian(lambda x: energy(x).unsqueeze(0), create_graph=True)
    x = value(8).requires_grad_()
    assert used(J, x)
    gradient = J(x)[0]
    rows = [torch.autograd.grad(g, x, retain_graph=True)[0] for g in gradient]
    same(torch.stack(rows), torch.func.hessian(energy)(x.detach()))


def test_third_derivatives() -> None:
    def f(x: Tensor) -> Tensor:
        return x.sin() * x.square().sum()

    J = torchjac.jacobian(f, create_graph=True)
    x = value(4).requires_grad_()
    assert used(J, x)
    (first,) = torch.autograd.grad(J(x).square().sum(), x, create_graph=True)
    (got,) = torch.autograd.grad(first.sum(), x)
    inner = torch.func.grad(lambda x: torch.func.jacrev(f)(x).square().sum())
    same(got, torch.func.grad(lambda x: inner(x).sum())(x.detach()))


def test_parameters_learn_through_it() -> None:
    """A penalty on the Jacobian trains the parameters of the function, as by passes."""

    def losses(uses_plan: bool) -> list[float]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        J = torchjac.jacobian(net, create_graph=True)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        history, engines = [], set()
        x = value(3)
        for _ in range(CALLS):
            optimizer.zero_grad()
            if uses_plan:
                jacobian = J(x)
                record = torchjac.last_run()
                assert record is not None
                engines.add(record.engine)
            else:
                leaf = x.clone().requires_grad_()
                y = net(leaf)
                rows = [torch.autograd.grad(v, leaf, create_graph=True)[0] for v in y]
                jacobian = torch.stack(rows)
            loss = (jacobian - 1).square().sum() + net(x).square().sum()
            loss.backward()
            optimizer.step()
            history.append(float(loss.detach()))
        assert not uses_plan or "accumulate" in engines
        return history

    torch.testing.assert_close(losses(True), losses(False), rtol=1e-9, atol=1e-12)


def test_other_arguments_keep_their_graph() -> None:
    J = torchjac.jacobian(lambda x, k: (k * x).sin() * x.sum(), create_graph=True)
    x, k = value(5).requires_grad_(), value(5, seed=1).requires_grad_()
    assert used(J, x, k)
    got = torch.autograd.grad(J(x, k).square().sum(), [x, k])

    def loss(x: Tensor, k: Tensor) -> Tensor:
        return torch.func.jacrev(lambda x: (k * x).sin() * x.sum())(x).square().sum()

    same(got, torch.func.grad(loss, (0, 1))(x.detach(), k.detach()))


def test_batched() -> None:
    wide = value(6, 4)
    J = torchjac.jacobian(lambda x: torch.tanh(x @ wide), batched=True, create_graph=True)
    x = value(9, 6).requires_grad_()
    assert used(J, x)
    (got,) = torch.autograd.grad(J(x).square().sum(), x)
    one = torch.func.jacrev(lambda x: torch.tanh(x @ wide))
    want = torch.func.grad(lambda x: torch.func.vmap(one)(x).square().sum())(x.detach())
    same(got, want)


def test_value_and() -> None:
    J = torchjac.jacobian(lambda x: x.sin() * x.sum(), create_graph=True)
    x = value(5).requires_grad_()
    assert used(J, x)
    y, jacobian = J.value_and(x)
    (got,) = torch.autograd.grad(y.sum() + jacobian.sum(), x)

    def loss(x: Tensor) -> Tensor:
        f = lambda x: x.sin() * x.sum()  # noqa: E731
        return f(x).sum() + torch.func.jacrev(f)(x).sum()

    same(got, torch.func.grad(loss)(x.detach()))


class _Straight(torch.autograd.Function):
    """Rounding with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def stopped(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.square().sum() + 1
    return x.square() * scale


STOPS: dict[str, Function] = {
    "detach": lambda x: x * x.detach() * x.sum(),
    "detach of something": lambda x: x.sin() * (x * 2).detach(),
    "no_grad": stopped,
    "custom": lambda x: _Straight.apply(3 * x).square(),
    "custom of the input": lambda x: _Straight.apply(x).square(),
    "detach of complex": lambda x: (torch.complex(x, x.sin()).detach() * x).real + x.square(),
    "real part": lambda x: torch.complex(x, x.cos()).real.detach() * x.square(),
    "where it is not taken": lambda x: torch.where(x > 100, x.detach() * x, x.square()),
}


@pytest.mark.parametrize("name", STOPS)
def test_where_gradients_stop_passes_do_it(name: str) -> None:
    """The operations of the plan would have another derivative."""
    f = STOPS[name]
    J = torchjac.jacobian(f, create_graph=True)
    x = value(4).requires_grad_()
    for _ in range(CALLS):
        jacobian = J(x)
        (got,) = torch.autograd.grad(jacobian.square().sum(), x)
    leaf = x.detach().requires_grad_()
    y = f(leaf)
    rows = [torch.autograd.grad(v, leaf, create_graph=True)[0] for v in y]
    (want,) = torch.autograd.grad(torch.stack(rows).square().sum(), leaf)
    same(got, want)
    record = torchjac.last_run()
    assert record is not None
    assert record.engine != "accumulate"


FILLS: dict[str, Function] = {
    "zeros_like": lambda x: torch.zeros_like(x) + x.square(),
    "ones_like": lambda x: torch.ones_like(x) * x.square(),
    "new_zeros": lambda x: torch.cat([x.new_zeros(2), x.square()]),
    "full_like": lambda x: torch.full_like(x, 2.0) * x.square(),
    "a mask": lambda x: torch.where(x > 0, x.square(), torch.zeros_like(x)),
    "written to": lambda x: torch.zeros_like(x).index_add(0, torch.arange(4), x.square()),
    "one hot": lambda x: (x > 0).to(x.dtype) * x.square(),
}


@pytest.mark.parametrize("name", FILLS)
def test_what_is_filled_stops_nothing(name: str) -> None:
    """Tensors that take only the shape of another tensor."""
    f = FILLS[name]
    x = value(4)
    plan, _ = graph_plan_of(f, x)
    leaf = (x + 0.3).requires_grad_()
    J = plan(leaf)
    same(J, oracle_jacobian(f)(leaf.detach()))
    (got,) = torch.autograd.grad(J.square().sum(), leaf)
    same(got, torch.func.grad(lambda x: torch.func.jacrev(f)(x).square().sum())(leaf.detach()))


def test_hooks_are_for_passes() -> None:
    """Hooks run in the second backward pass too."""

    def f(x: Tensor) -> Tensor:
        y = x.sin()
        y.register_hook(lambda gradient: 2 * gradient)
        return y * x

    with pytest.raises(PlanRefused, match="code of the user"):
        graph_plan_of(f, value(3))


def test_without_a_graph_to_keep() -> None:
    """If no input requires a gradient, the result of a plan does not either."""
    J = torchjac.jacobian(lambda x: x.sin() * x.sum(), create_graph=True)
    x = value(5)
    assert used(J, x)
    same(J(x), torch.func.jacrev(lambda x: x.sin() * x.sum())(x))


AUXILIARY: dict[str, Function] = {
    "layer norm": lambda x: torch.nn.functional.layer_norm(x, (4,)),
    "batch norm": lambda x: torch.nn.functional.batch_norm(
        x.reshape(4, 1), None, None, training=True
    ).flatten(),
    "solve": lambda x: torch.linalg.solve(x.outer(x) + torch.eye(4, dtype=x.dtype), x),
    # Its second derivative is by singular values, which must not be equal.
    "determinant": lambda x: torch.linalg.det(x.outer(x) + torch.arange(4.0).diag().to(x)) * x,
}


@pytest.mark.parametrize("name", AUXILIARY)
def test_what_does_not_matter_here_may_matter_elsewhere(name: str) -> None:
    """A gain of zero during planning hides all operations behind it from a comparison."""

    def f(x: Tensor, gain: Tensor) -> Tensor:
        return x * x.roll(1) + gain * AUXILIARY[name](x)

    J = torchjac.jacobian(f, create_graph=True)
    x, off = value(4).requires_grad_(), torch.zeros((), dtype=torch.float64)
    for _ in range(CALLS):
        J(x, off)
    (got,) = torch.autograd.grad(J(x, off + 1).cos().sum(), x)
    want = torch.func.grad(lambda x: torch.func.jacrev(f)(x, off + 1).cos().sum())(x.detach())
    same(got, want)


def test_results_may_be_written_to() -> None:
    """The tensor saved by the graph is not the result itself."""
    J = torchjac.jacobian(lambda x: x.exp().sum(), create_graph=True)
    x = value(3).requires_grad_()
    assert used(J, x)
    jacobian = J(x)
    jacobian.mul_(2)
    (got,) = torch.autograd.grad(jacobian.sum(), x)
    same(got, 2 * x.detach().exp())


def test_results_can_be_differentiated_whatever_the_input() -> None:
    """As by passes: also where no input requires a gradient."""
    J = torchjac.jacobian(lambda x: x * x, create_graph=True)
    x = value(3)
    first = J(x).requires_grad
    assert used(J, x)
    assert J(x).requires_grad == first
