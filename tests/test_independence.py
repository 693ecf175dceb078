"""Batches whose independence is proved are not tested on every call; others still are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchjac
from laws import oracle_jacobian, same, value
from torchjac.jit import patterns as remembered


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proofs are tried from the second call on."""
    monkeypatch.setattr(remembered, "_PROOF_SECONDS", 0.0)


def independence(jacobian: Any, *args: Any, calls: int = 3) -> str | None:
    """How the last of a few calls knew that samples are independent."""
    for _ in range(calls):
        jacobian(*args)
    record = torchjac.last_run()
    assert record is not None
    return record.independence


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 2)).double()


def attention(x: Tensor) -> Tensor:
    """Over the tokens of a sample, not over the batch."""
    return torch.softmax(x @ x.mT, -1) @ x


PROVED: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "network": (network(), (5, 3)),
    "attention": (attention, (4, 3, 2)),
    "solve": (lambda x: torch.linalg.solve(x @ x.mT + torch.eye(3, dtype=x.dtype), x), (4, 3, 3)),
    "gather": (lambda x: x[:, torch.tensor([1, 0, 0])] * 2, (5, 3)),
    "norm": (lambda x: x / x.norm(dim=-1, keepdim=True), (5, 3)),
}


@pytest.mark.parametrize("name", PROVED)
def test_proved(name: str) -> None:
    f, shape = PROVED[name]
    jacobian = torchjac.jacobian(f, batched=True)
    assert independence(jacobian, value(*shape)) == "proved"
    same(jacobian(value(*shape, seed=1)), oracle_jacobian(f, batched=True)(value(*shape, seed=1)))


def test_the_first_call_is_tested() -> None:
    jacobian = torchjac.jacobian(network(), batched=True)
    assert independence(jacobian, value(5, 3), calls=1) == "tested"


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x - x.mean(0),
        lambda x: x.sort(0).values,
        lambda x: x * x.flip(0),
        lambda x: torch.softmax(x @ x.T, -1) @ x,
    ],
    ids=["mean", "sort", "flip", "attention over the batch"],
)
def test_coupled(f: Callable[[Tensor], Tensor]) -> None:
    jacobian = torchjac.jacobian(f, batched=True)
    for _ in range(3):
        with pytest.raises(torchjac.CoupledBatchError):
            jacobian(value(5, 3))


def test_a_branch_on_values_is_tested() -> None:
    def f(x: Tensor) -> Tensor:
        return x * 2 if x.sum() > -1e9 else x.flip(0)

    assert independence(torchjac.jacobian(f, batched=True), value(5, 3)) == "tested"


def test_a_function_that_becomes_coupled_is_detected() -> None:
    """What the proof was made for has changed: a global variable, a mode, a permutation."""
    state = {"order": torch.arange(5)}
    jacobian = torchjac.jacobian(lambda x: x + x[state["order"]], batched=True)
    assert independence(jacobian, value(5, 3)) == "proved"
    state["order"] = torch.tensor([1, 0, 2, 3, 4])
    with pytest.raises(torchjac.CoupledBatchError):
        jacobian(value(5, 3))


def test_a_permutation_written_in_place_is_detected() -> None:
    order = torch.arange(5)
    jacobian = torchjac.jacobian(lambda x: x + x[order], batched=True)
    assert independence(jacobian, value(5, 3)) == "proved"
    order[:2] = torch.tensor([1, 0])
    with pytest.raises(torchjac.CoupledBatchError):
        jacobian(value(5, 3))


def test_training_mode_is_detected() -> None:
    norm = nn.BatchNorm1d(3).double().eval()
    jacobian = torchjac.jacobian(norm, batched=True)
    assert independence(jacobian, value(5, 3)) == "proved"
    norm.train()
    with pytest.raises(torchjac.CoupledBatchError):
        jacobian(value(5, 3))


def test_training_steps_keep_the_proof() -> None:
    """Parameters count by their shape: an optimizer's step does not ask for a new proof."""
    net = network()
    jacobian = torchjac.jacobian(net, batched=True)
    assert independence(jacobian, value(5, 3)) == "proved"
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1)
    assert independence(jacobian, value(5, 3), calls=1) == "proved"
    same(jacobian(value(5, 3)), oracle_jacobian(net, batched=True)(value(5, 3)))


def test_a_function_that_changes_all_the_time_is_left_alone() -> None:
    calls = {"count": 0}

    def f(x: Tensor) -> Tensor:
        calls["count"] += 1
        return x * calls["count"]

    jacobian = torchjac.jacobian(f, batched=True)
    for _ in range(12):
        jacobian(value(5, 3))
    assert calls["count"] < 12 + 6  # traced a few times, then no more
    record = torchjac.last_run()
    assert record is not None
    assert record.independence == "tested"


def test_settled_batch_of_one_row_takes_one_pass() -> None:
    """Nothing is evaluated beside it for a test that is not needed."""
    jacobian = torchjac.jacobian(lambda x: (x**2).sum(-1), batched=True)
    assert independence(jacobian, value(50, 4)) == "proved"
    record = torchjac.last_run()
    assert record is not None
    assert record.passes == 1
