"""Where torch's batched machinery gives out, the answer still comes, and says how."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchjac
from graphs import ThroughNumpy
from laws import check_both, leaf, oracle, oracle_jacobian, quiet, same, value

# The name of an op, and a program whose backward runs it; torch 2.13 batches none of them well.
NO_BATCHING_RULE: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "_pdist_backward": (F.pdist, value(4, 2)),
    "multilabel_margin_loss_backward": (
        lambda x: F.multilabel_margin_loss(x, torch.tensor([[0, 1, -1]] * 3), reduction="none"),
        value(3, 3),
    ),
    "fractional_max_pool2d_backward": (
        lambda x: F.fractional_max_pool2d(
            x, 2, output_size=2, _random_samples=torch.full((1, 1, 2), 0.4).double()
        ),
        value(1, 1, 5, 5),
    ),
    # This one has a rule, which gives wrong values (torch 2.13, torch.func.jacrev included).
    "_cdist_backward": (lambda x: torch.cdist(x, x.sin()), value(3, 2)),
}


@pytest.mark.parametrize("op", NO_BATCHING_RULE)
def test_op_without_a_batching_rule_is_right(op: str) -> None:
    """Whatever is chosen, the values are the row loop's."""
    f, x = NO_BATCHING_RULE[op]
    check_both(f, x)


def in_a_new_process(code: str) -> str:
    """Standard output of a fresh interpreter: once-per-op memory is empty there."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_loop_warning_comes_once_per_op_and_names_it() -> None:
    """One LoopWarning for an op in a process, however often it is met."""
    out = in_a_new_process(
        """
import warnings, torch, torchjac
x = torch.randn(4, 2, dtype=torch.float64)
p = torch.randn(3, 3, dtype=torch.float64)
loss = torch.nn.functional.multilabel_margin_loss
places = torch.tensor([[0, 1, -1]] * 3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        with torchjac.testing.force_plan(mode="reverse"):
            torchjac.jacobian(torch.nn.functional.pdist)(x)
            torchjac.jacobian(lambda p: loss(p, places, reduction="none"))(p)
for w in caught:
    print(w.category.__name__, w.message)
""".replace("import warnings,", "import warnings, torchjac.testing,")
    )
    lines = out.strip().splitlines()
    assert len(lines) == 2, out
    assert all(line.startswith("LoopWarning") for line in lines)
    assert "aten::_pdist_backward" in lines[0]
    assert "aten::multilabel_margin_loss_backward" in lines[1]


def test_the_loop_is_in_the_record() -> None:
    """The record says loop and why, also when the warning has been given before."""
    f, x = NO_BATCHING_RULE["_pdist_backward"]
    for _ in range(2):
        leaf_x = x.clone().requires_grad_()
        with quiet():
            torchjac.jac(f(leaf_x), leaf_x)
        assert "_pdist_backward" in str(torchjac.last_run())


def test_output_of_a_compiled_function() -> None:
    """A graph made by torch.compile cannot be batched; the loop reads it."""
    f = torch.compile(lambda x: (x.sin() * x).cumsum(0), backend="aot_eager")
    x = leaf(4)
    with quiet():
        y = f(x)
        same(torchjac.jac(y, x), oracle(y, x))
        same(torchjac.jacobian(f)(x.detach()), oracle_jacobian(f)(x))


@pytest.mark.skipif(not (shutil.which("cc") or shutil.which("g++")), reason="no C compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own notes
def test_output_of_an_inductor_function() -> None:
    """The same with real kernels, which have no storage to read under vmap."""
    f = torch.compile(lambda x: (x.sin() * x).cumsum(0))
    x = leaf(4)
    with quiet():
        y = f(x)
        same(torchjac.jac(y, x), oracle(y, x))


@pytest.mark.parametrize("norm", ["layer", "group", "batch"])
def test_autocast_and_a_norm_layer(norm: str) -> None:
    """vmap(grad) mixes dtypes here; inside and outside of autocast the answer is the loop's."""
    torch.manual_seed(0)
    layers = {
        "layer": nn.LayerNorm(4),
        "group": nn.GroupNorm(2, 4),
        "batch": nn.BatchNorm1d(4).eval(),
    }
    net = nn.Sequential(nn.Linear(4, 4), layers[norm], nn.Linear(4, 2))
    x = leaf(3, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(x)
    expected = oracle(y, x)
    same(torchjac.jac(y, x), expected, rtol=2e-2, atol=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(torchjac.jac(y, x), expected, rtol=2e-2, atol=1e-2)
        same(torchjac.jacobian(net)(x.detach()), expected, rtol=2e-2, atol=1e-2)


def test_recurrent_nets() -> None:
    """GRU and LSTM of one sample and of a batch (vmap(jacrev) fails on them)."""
    torch.manual_seed(0)
    for kind in (nn.GRU, nn.LSTM):
        net = kind(2, 3, num_layers=2, batch_first=True).double()
        check_both(lambda x, net=net: net(x)[0], value(2, 3, 2))
        x = value(4, 3, 2)
        with quiet():
            got = torchjac.jacobian(lambda x, net=net: net(x)[0], batched=True)(x)
        same(got, oracle_jacobian(lambda x, net=net: net(x)[0], batched=True)(x))


def test_checkpoint_with_dropout_inside() -> None:
    """The recomputation in backward draws the mask of the forward, once per chunk."""

    def f(x: Tensor) -> Tensor:
        return checkpoint(lambda y: F.dropout(y.sin(), 0.5) * y, x, use_reentrant=False)

    check_both(f, value(8), seed=11)


def test_reentrant_checkpoint_is_an_error_in_words() -> None:
    """torch.autograd.grad cannot pass a reentrant checkpoint, nor can torchjac: never zeros."""
    x = leaf(3)
    y = checkpoint(torch.sin, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"reentrant|checkpoint"):
        torchjac.jac(y, x)


def test_error_in_the_users_forward_comes_through() -> None:
    """f's own exception is not swallowed by a fallback, nor turned into another."""

    class Mine(Exception):
        pass

    def f(x: Tensor) -> Tensor:
        raise Mine("from f")

    with pytest.raises(Mine, match="from f"):
        torchjac.jacobian(f)(value(3))


def test_error_in_the_users_backward_comes_through() -> None:
    """An exception that the row loop meets too reaches the user as it is."""

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise ZeroDivisionError("from backward")

    x = leaf(3)
    with quiet(), pytest.raises(ZeroDivisionError, match="from backward"):
        torchjac.jac(Broken.apply(x), x)


def test_value_and_runs_f_once() -> None:
    """A second run could draw other random numbers or write state twice."""
    calls = []

    def f(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return ThroughNumpy.apply(x)

    with quiet():
        torchjac.jacobian(f).value_and(value(3))
    assert len(calls) == 1


@pytest.mark.parametrize("shape", [(3, 3), (2, 3), (4, 3, 2), (1, 3, 3)])
def test_state_of_a_module_moves_once_per_call(shape: tuple[int, ...]) -> None:
    """Running statistics after k Jacobians are those after k training steps, whatever is tried."""
    ours, plain = (nn.BatchNorm1d(3).double().train() for _ in range(2))
    f = torchjac.jacobian(ours)
    for k in range(6):
        x = value(*shape, seed=k)
        same(f(x), oracle_jacobian(nn.BatchNorm1d(3).double().train())(x))
        plain(x)
    assert int(ours.num_batches_tracked) == 6
    same(ours.running_mean, plain.running_mean)
    same(ours.running_var, plain.running_var)


def test_random_numbers_move_once_per_call() -> None:
    """The caller's random state after a Jacobian is the one after one run of f."""

    def f(x: Tensor) -> Tensor:
        return F.dropout(x.sin(), 0.5)

    J = torchjac.jacobian(f)
    for k in range(6):
        torch.manual_seed(k)
        J(value(5))
        ours = torch.rand(1)
        torch.manual_seed(k)
        f(value(5))
        assert torch.equal(ours, torch.rand(1))


def test_pytrees_that_functional_jacobian_refuses() -> None:
    """Dicts and lists in and out."""

    def f(p: dict[str, Any]) -> dict[str, Any]:
        return {"y": [p["w"] @ p["x"][0], p["x"][1].sin()]}

    p = {"w": value(2, 3), "x": [value(3), value(1)]}
    with pytest.raises(TypeError, match="dict"):
        torch.autograd.functional.jacobian(f, p)
    same(torchjac.jacobian(f)(p), torch.func.jacrev(f)(p))
