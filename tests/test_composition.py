"""Jacobians inside other transforms, under other modes, of each other, and with their own graph."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import scipy.sparse
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.func import hessian as func_hessian
from torch.utils.checkpoint import checkpoint

import torchjac
from graphs import OldStyle
from laws import leaf, oracle, oracle_jacobian, quiet, same, value


def f(x: Tensor) -> Tensor:
    """R^n -> R^(n+1), smooth, nothing special."""
    return torch.cat([x.sin() * x.flip(0), x.prod()[None]])


def scalar(x: Tensor) -> Tensor:
    """R^n -> R with a full Hessian."""
    return (x.sin() * x.cumsum(0)).sum().exp()


def test_vmap_over_jacobian() -> None:
    xs = value(4, 3)
    same(vmap(torchjac.jacobian(f))(xs), vmap(jacrev(f))(xs))


def test_vmap_over_jacobian_of_two_arguments() -> None:
    def g(x: Tensor, p: dict[str, Tensor]) -> Tensor:
        return p["w"] @ x.sin()

    xs, p = value(4, 3), {"w": value(2, 3)}
    ours, theirs = torchjac.jacobian(g, (0, 1)), jacrev(g, (0, 1))
    same(vmap(ours, (0, None))(xs, p), vmap(theirs, (0, None))(xs, p))
    same(vmap(ours, (1, None))(xs.t(), p), vmap(theirs, (0, None))(xs, p))


def test_vmap_over_value_and() -> None:
    xs = value(4, 3)
    out, J = vmap(torchjac.jacobian(f).value_and)(xs)
    same(out, vmap(f)(xs))
    same(J, vmap(jacrev(f))(xs))


def test_jacobian_of_vmap() -> None:
    xs = value(4, 3)
    same(torchjac.jacobian(vmap(f))(xs), jacrev(vmap(f))(xs))


def test_jacobian_of_jacobian() -> None:
    x = value(3)
    twice = torchjac.jacobian(torchjac.jacobian(f))
    same(twice(x), func_hessian(f)(x))
    same(torchjac.jacobian(twice)(x), jacrev(jacrev(jacrev(f)))(x))
    assert not twice(x).requires_grad


def test_jacobian_and_torch_func_nest_both_ways() -> None:
    x, expected = value(3), func_hessian(f)(value(3))
    same(jacrev(torchjac.jacobian(f))(x), expected)
    same(torchjac.jacobian(jacrev(f))(x), expected)
    same(torch.func.jacfwd(torchjac.jacobian(f))(x), expected)
    same(torchjac.jacobian(torch.func.jacfwd(f))(x), expected)


def test_func_grad_over_a_jacobian() -> None:
    x = value(3)

    def norm(x: Tensor) -> Tensor:
        return torchjac.jacobian(f)(x).square().sum()

    same(torch.func.grad(norm)(x), torch.func.grad(lambda x: jacrev(f)(x).square().sum())(x))


def test_func_grad_with_a_constant_inner_argument() -> None:
    """The inner Jacobian is of y, the outer gradient of x."""
    x, y = value(3), value(3, seed=1)

    def norm(jacobian: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        return lambda x: jacobian(lambda y: x * f(y)[:3])(y).square().sum()

    same(torch.func.grad(norm(torchjac.jacobian))(x), torch.func.grad(norm(jacrev))(x))


def test_jvp_and_vjp_through_a_jacobian() -> None:
    x, v = value(3), value(3, seed=1)
    ours, theirs = torchjac.jacobian(f), jacrev(f)
    same(torch.func.jvp(ours, (x,), (v,)), torch.func.jvp(theirs, (x,), (v,)))
    cotangent = value(4, 3)
    got = torch.func.vjp(ours, x)[1](cotangent)
    same(got, torch.func.vjp(theirs, x)[1](cotangent))


def test_unused_input_inside_a_transform() -> None:
    """Zeros inside vmap and grad as outside."""
    xs = value(4, 3)
    with quiet():
        got = vmap(torchjac.jacobian(lambda x: x.new_ones(2)))(xs)
    same(got, torch.zeros(4, 2, 3, dtype=torch.float64))


@pytest.mark.parametrize("entry", ["jac", "jacobian"])
def test_create_graph_then_backward(entry: str) -> None:
    """The gradient of a loss on J equals the one through the row loop."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = leaf(3)
    wanted = [x, *net.parameters()]
    expected_J = oracle(net(x), x, create_graph=True)
    expected = torch.autograd.grad(expected_J.square().sum(), wanted, allow_unused=True)
    if entry == "jac":
        J = torchjac.jac(net(x), x, create_graph=True)
    else:
        J = torchjac.jacobian(net, create_graph=True)(x)
    assert J.requires_grad
    got = torch.autograd.grad(J.square().sum(), wanted, allow_unused=True)
    for g, e in zip(got, expected, strict=True):
        assert (g is None) == (e is None) or not torch.as_tensor(g if e is None else e).any()
        if g is not None and e is not None:
            same(g, e)


@pytest.mark.parametrize(("n", "m"), [(1, 30), (30, 1), (3, 3)])
def test_create_graph_in_every_shape(n: int, m: int) -> None:
    """Forward mode or not: the graph is there, also on a second look."""
    x, weight = leaf(n), leaf(m, n, seed=1)
    J = torchjac.jacobian(lambda x: (weight @ x.sin()).tanh(), create_graph=True)(x)
    expected = oracle((weight @ x.sin()).tanh(), x, create_graph=True)
    same(J, expected)
    for w in (x, weight):
        (got,) = torch.autograd.grad(J.square().sum(), w, retain_graph=True)
        (want,) = torch.autograd.grad(expected.square().sum(), w, retain_graph=True)
        same(got, want)
    (double,) = torch.autograd.grad(J.exp().sum(), x, create_graph=True)
    assert double.requires_grad


def test_value_and_with_create_graph() -> None:
    x = leaf(3)
    out, J = torchjac.jacobian(f, create_graph=True).value_and(x)
    (got,) = torch.autograd.grad(out.sum() + J.sum(), x)
    expected = f(x).sum() + oracle(f(x), x, create_graph=True).sum()
    same(got, torch.autograd.grad(expected, x)[0])


def test_create_graph_false_is_detached_but_nesting_is_not() -> None:
    x = leaf(3)
    assert not torchjac.jacobian(f)(x).requires_grad
    assert not torchjac.jac(f(x), x).requires_grad
    assert torchjac.jacobian(f, create_graph=True)(x.detach()).shape == (4, 3)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "grad off": lambda: torch.set_grad_enabled(False),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "multithreading off": lambda: torch.autograd.set_multithreading_enabled(False),
    "default float32 device": lambda: torch.device("cpu"),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str) -> None:
    """The mode of the caller does not change J, and is back afterwards."""
    x = value(3)
    y = leaf(3, seed=2)
    out = f(y)
    with MODES[mode]():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        same(torchjac.jacobian(f)(x), jacrev(f)(value(3)))
        same(torchjac.jac(out, y), oracle(out, y))
        got, J = torchjac.jacobian(OldStyle.apply).value_and(x)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    same(J, torch.diag(value(3).cos()))
    same(got, value(3).sin())


def test_inference_tensors_as_inputs() -> None:
    """Tensors made in inference mode cannot be saved for backward; their Jacobian still comes."""
    with torch.inference_mode():
        x, w = value(3).clone(), value(2, 3).clone()
        assert x.is_inference()
        same(torchjac.jacobian(lambda x, w: w @ x.sin(), (0, 1))(x, w), jacrev_wx())
        same(torchjac.jacobian(lambda x, w: w @ x.sin())(x, w), jacrev_wx()[0])
    same(torchjac.jacobian(lambda x, w: w @ x.sin(), (0, 1))(x, w), jacrev_wx())


def jacrev_wx() -> Any:
    """The reference for inference tensors, made outside of inference mode."""
    with torch.inference_mode(False):
        return jacrev(lambda x, w: w @ x.sin(), (0, 1))(value(3), value(2, 3))


def test_module_in_inference_mode() -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 2).double()
    with torch.inference_mode():
        J = torchjac.jacobian(net)(value(3))
        same(J, net.weight.detach().clone())


def test_autocast_around_and_inside() -> None:
    """bf16 matmuls: the row loop under the same autocast is the answer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x = value(4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torchjac.jacobian(net)(x)
        got_params = torchjac.jacobian(lambda p: functional_call(net, p, (x,)))(
            dict(net.named_parameters())
        )
        y = net(leaf(4, dtype=torch.float32))
    assert y.dtype == torch.bfloat16
    assert got.dtype == torch.float32
    reference = oracle_jacobian(net)(x)
    same(got, reference, rtol=5e-2, atol=2e-2)
    exact = oracle_jacobian(lambda p: functional_call(net, p, (x,)))(dict(net.named_parameters()))
    same(got_params, exact, rtol=5e-2, atol=5e-2)


def test_compiled_jacobian() -> None:
    """torch.compile around a Jacobian gives the same values, or a clear error, never others."""
    x = value(3)
    compiled = torch.compile(torchjac.jacobian(f), backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # graph breaks are announced as warnings
        try:
            first, second = compiled(x), compiled(x * 2)
        except (RuntimeError, torch._dynamo.exc.Unsupported) as refusal:
            assert "torchjac" in str(refusal) or "compile" in str(refusal)  # noqa: PT017
            return
    same(first, jacrev(f)(x))
    same(second, jacrev(f)(x * 2))


def test_jacobian_of_a_compiled_function() -> None:
    x = value(3)
    with quiet():
        got = torchjac.jacobian(torch.compile(f, backend="aot_eager"))(x)
    same(got, jacrev(f)(x))


def test_jacobian_of_a_checkpointed_jacobian() -> None:
    """What torch.func refuses still nests here."""

    def g(x: Tensor) -> Tensor:
        return checkpoint(lambda y: y.sin() * y, x, use_reentrant=False)

    x = value(3)
    same(torchjac.jacobian(torchjac.jacobian(g))(x), func_hessian(lambda x: x.sin() * x)(x))


def test_inside_a_users_backward() -> None:
    """A Jacobian computed in a custom Function's backward, with its own inner graph."""

    class Implicit(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return f(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return grad @ torchjac.jacobian(f)(x)

    x = leaf(3)
    Implicit.apply(x).sum().backward()
    same(x.grad, jacrev(f)(x.detach()).sum(0))


def test_tensor_subclass_parameters() -> None:
    """nn.Parameter as argument: a plain tensor comes back."""
    p = nn.Parameter(value(3))
    J = torchjac.jacobian(f)(p)
    assert type(J) is Tensor
    same(J, jacrev(f)(p.detach()))


class TestCopies:
    """Jacobians are copied with the objects that hold them."""

    def test_deepcopy(self) -> None:
        J = torchjac.jacobian(torch.sin, layout=torch.sparse_csr)
        x = value(4)
        for _ in range(3):
            J(x)
        again = copy.deepcopy({"J": J})["J"]
        same(again(x).to_dense(), J(x).to_dense())
        assert repr(again) == repr(J)

    @pytest.mark.parametrize("layout", [torch.strided, torch.sparse_coo, scipy.sparse.csc_array])
    def test_options_are_copied(self, layout: Any) -> None:
        J = torchjac.jacobian(torch.sin, layout=layout, memory_budget=10**6, compile=True)
        again = pickle.loads(pickle.dumps(J))
        assert again._request == J._request
        assert type(again(value(4))) is type(J(value(4)))

    def test_a_pattern_is_copied(self) -> None:
        eye = scipy.sparse.eye(4)
        J = torchjac.jacobian(torch.sin, layout=torch.sparse_csr, pattern=eye)
        again = pickle.loads(pickle.dumps(J))
        same(again(value(4)).to_dense(), J(value(4)).to_dense())
        assert again.explain(value(4)).pattern == "4 nonzeros, given"

    def test_pickle(self) -> None:
        H = torchjac.jacobian(_energy)
        again = pickle.loads(pickle.dumps(H))
        same(again(value(4)), H(value(4)))
        assert type(again) is type(H)


def _energy(x: Tensor) -> Tensor:
    return (x.sin() * x.roll(1)).sum()
