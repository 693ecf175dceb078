"""What people write every day is not refused."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import changes_detours as detours
from guarding import D, call, guarded
from torchjac.guards.bytecode import reads


class Act(enum.Enum):
    RELU = functools.partial(torch.relu)
    TANH = functools.partial(torch.tanh)


class Shade(enum.Flag):
    DARK = enum.auto()
    WARM = enum.auto()


class Order(enum.IntEnum):
    ONE = 1
    TWO = 2


class Word(str, enum.Enum):
    LONG = "long"


@dataclasses.dataclass(frozen=True)
class Options:
    act: Act = Act.TANH
    shade: Shade = Shade.DARK | Shade.WARM
    order: Order = Order.TWO
    word: Word = Word.LONG
    where: Path = Path("unread")
    load: float = 2.0
    path: str = "a"
    seed: int = 0


class Shape(detours.Abstract):
    def area(self) -> float:
        return 2.0


class Physics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.load, self.random, self.backends, self.seed = 2.0, 3.0, 1.0, 1.0
        self.options = Options()

    def forward(self, x: Tensor) -> Tensor:
        load = self.load * self.random * self.backends * self.seed * self.options.load
        load *= self.options.order * len(self.options.word) * self.options.shade.value
        return torch.tanh(x) * load * np.float64(math.pi)


@functools.lru_cache(maxsize=2)
def grid(n: int) -> Tensor:
    return torch.linspace(0, 1, n, dtype=D)


@contextlib.contextmanager
def around() -> Iterator[float]:
    yield 2.0


def with_a_context(x: Tensor) -> Tensor:
    with around() as scale:
        return x * scale


@torch.no_grad()
def frozen(x: Tensor) -> Tensor:
    return x * 2


def matched(x: Tensor, options: Options = Options()) -> Tensor:
    match options.act:
        case Act.TANH:
            return torch.tanh(x)
    return x


def tries(x: Tensor) -> Tensor:
    scale = getattr(x, "scale", 2.0)
    return F.softplus(x) * scale * detours.settings.k * torch.ops.aten.sin(x)


shapes: list[detours.Abstract] = [Shape()]
tagged = torch.ones(3)
tagged._unread_tag = True  # type: ignore[attr-defined]
ORDINARY: list[Callable[..., Any]] = [
    Physics(),
    lambda x: x * grid(3),
    lambda x: Options().act.value(x) * Options().shade.value,
    lambda x: x * len([s for s in shapes if isinstance(s, Shape)]),
    lambda x: x * Order.TWO * len(Word.LONG),
    lambda x: x * sys.float_info.eps * sys.maxsize,
    lambda x: x * sum(s.area() for s in shapes if isinstance(s, detours.Abstract)),
    lambda x: x * tagged,
    lambda x: x * (torch.finfo(x.dtype).eps + np.pi),
    lambda x: torch.nn.functional.gelu(x) + torch.special.expit(x),
    matched,
    tries,
    with_a_context,
    lambda x: frozen(x) * x,
    functools.partial(lambda x, c: x * c, c=[1.0]),
    nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
    nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()),
    torch.vmap(lambda x: x.sin()),
]


class TestOrdinary:
    @pytest.mark.parametrize("f", ORDINARY, ids=range(len(ORDINARY)))
    def test_is_not_refused(self, f: Callable[..., Any]) -> None:
        guard = guarded(call(f))
        assert guard.mismatch(call(f)) is None

    def test_names_that_are_those_of_a_module_too(self) -> None:
        """`self.load` is not `torch.load`."""
        used = reads(Physics.forward.__code__).used
        assert used["torch"] == {"tanh"}
        assert used["np"] == {"float64"}

    def test_a_module_that_is_handed_on_is_used_in_every_way(self) -> None:
        used = reads((lambda x: (torch, np.random.rand, torch.sin)).__code__).used
        assert used["torch"] == {"", "sin"}
        assert used["np"] == {"random.rand"}
