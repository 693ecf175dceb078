"""What depends on the values of the input is noticed when it is captured, never frozen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import torchjac
from captured import Case, captured, captured_of, evaluated, expected, values
from torchjac import CaptureRefused

X = values(4)
W = values(4, seed=3)


def tries(x: Tensor) -> Tensor:
    try:
        return x * 2 if x.sum() > 0 else x * 5
    except Exception:
        return x * 3


def tries_item(x: Tensor) -> Tensor:
    try:
        return x * x[0].item()
    except Exception:
        return x * 3


def halves(x: Tensor) -> Tensor:
    while x.norm() > 0.1:
        x = x / 2
    return x


def asserts(x: Tensor) -> Tensor:
    assert (x > 0).all()
    return x * 2


class Branches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2 if ctx.saved_tensors[0].sum() > 0 else g


class ThroughArrays(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(np.sin(x.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


DEPENDS_ON_VALUES: dict[str, Callable[[Tensor], Any]] = {
    "if": lambda x: x * 2 if x.sum() > 0 else x,
    "if_and": lambda x: x * 2 if (x > 0).all() and True else x,
    "while": halves,
    "assert": asserts,
    "item": lambda x: x * x.sum().item(),
    "tolist": lambda x: x * x.tolist()[0],
    "bool": lambda x: x * bool(x.sum() > 0),
    "float": lambda x: x * float(x[0]),
    "int": lambda x: x * int(x[0] * 3),
    "index": lambda x: x[int(x.argmax())],
    "math": lambda x: x * math.sin(x[0]),
    "numpy": lambda x: x * x.detach().numpy()[0],
    "asarray": lambda x: x * torch.from_numpy(np.asarray(x.detach())),
    "nonzero": lambda x: x[x.nonzero()[:, 0]],
    "mask": lambda x: x[x > 0.5],
    "masked_select": lambda x: x.masked_select(x > 0.3),
    "unique": lambda x: x * torch.unique(x.detach()).numel(),
    "repeat_interleave": lambda x: x.repeat_interleave((x * 3).long()),
    "max": lambda x: max(x),
    "sorted": lambda x: torch.stack(sorted(x)),
    "allclose": lambda x: x * 2 if torch.allclose(x, x * 2) else x,
    "equal": lambda x: x * 2 if torch.equal(x, x * 2) else x,
    "contains": lambda x: x * 2 if 3.0 in x else x,
    "is_nonzero": lambda x: x * 2 if x[0].is_nonzero() else x,
    "arange": lambda x: torch.arange(0, x[0].detach()) * x[0],
    "tensor_of_tensors": lambda x: torch.tensor([x[0], x[1]]) * x[0],
    "range": lambda x: x * len(range(x[0].long())),
    "caught": tries,
    "caught_item": tries_item,
    "in_backward": lambda x: Branches.apply(x),
    "arrays_in_custom_function": lambda x: ThroughArrays.apply(x),
    "in_vmap": lambda x: torch.vmap(lambda a: a * 2 if a > 0 else a)(x),
    "in_hook": lambda x: hooked(x),
    "in_jacobian": lambda x: torchjac.jacobian(lambda a: a * 2 if a.sum() > 0 else a)(x),
}


def hooked(x: Tensor) -> Tensor:
    y = x * 2
    y.register_hook(lambda g: g * 2 if g.sum() > 0 else g)
    return y


@pytest.mark.parametrize("name", DEPENDS_ON_VALUES)
def test_control_flow_by_values_is_noticed(name: str) -> None:
    with pytest.raises(CaptureRefused) as caught:
        captured_of(DEPENDS_ON_VALUES[name])
    assert str(caught.value)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x * W[0].item(),
        lambda x: x * 2 if W.sum() > 0 else x,
        lambda x: x[W > 0.5],
        lambda x: x[(W > 0.5).nonzero()[:, 0]],
    ],
    ids=["item", "if", "mask", "nonzero"],
)
def test_control_flow_by_closures_is_right_or_refused(f: Callable[..., Any]) -> None:
    case = Case(f, (X,))
    try:
        derivative = captured(case)
    except CaptureRefused:
        return
    assert torch.allclose(evaluated(derivative, [X + 1]), expected(case, (X + 1,)))
