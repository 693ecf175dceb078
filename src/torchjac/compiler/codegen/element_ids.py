"""Codes of elements: which expression each is, and which lane of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from torchjac._torch.trace.ir import Value
from torchjac.compiler.codegen.expressions import Expressions
from torchjac.compiler.codegen.scalar_ir import Granularity, Places
from torchjac.compiler.codegen.scalar_ops import DTYPES
from torchjac.errors import PlanRefused

# Codes: the expression, then this many bits for the lane.
BITS = 40
_LANE = (1 << BITS) - 1


class Expanding(Protocol):
    """What operations on codes may ask for.

    Attributes:
        expressions: What was made so far.
        granularity: Which elements share an expression.
    """

    expressions: Expressions
    granularity: Granularity

    def code(self, value: Value) -> Tensor:
        """The codes of a tensor."""

    def matrix(self, value: Value) -> Tensor:
        """The codes of a tensor that is multiplied: lanes of one expression where it may be."""

    def cast(self, value: Value, dtype: str) -> Tensor:
        """The same in another dtype."""

    def known(self, value: Value) -> Tensor:
        """The numbers of a tensor that does not vary."""

    def number(self, number: float, dtype: str) -> int:
        """The code of a number."""

    def apply(self, kind: str, dtype: str, operands: Sequence[Tensor]) -> Tensor:
        """The codes of a scalar operation on all elements of operands, which are broadcast."""


def dtype_of(value: Value | None) -> str:
    """The name of a dtype that expressions may have."""
    assert value is not None
    name = str(value.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise PlanRefused(f"it computes in {name}")
    return name


def apart(codes: Places) -> tuple[Places, Places]:
    """Expressions and lanes."""
    return codes >> BITS, codes & _LANE


def groups(numbers: Sequence[Places]) -> list[tuple[list[int], Places | None]]:
    """Elements whose operands are the same expressions; None stands for all of them."""
    if all(n[0] == n[-1] and (n == n[0]).all() for n in numbers):
        return [([int(n[0]) for n in numbers], None)]
    key = numbers[0]
    for more in numbers[1:]:
        _, key = np.unique(key, return_inverse=True)
        _, other = np.unique(more, return_inverse=True)
        key = key * (int(other.max()) + 1) + other
    order = np.argsort(key, kind="stable")
    cuts = np.flatnonzero(np.diff(key[order])) + 1
    parts = np.split(order, cuts)
    return [([int(n[part[0]]) for n in numbers], part) for part in parts]


def laid_out(made: Tensor, like: Value) -> Tensor:
    """The same codes, with the strides that the tensor has: views look at memory."""
    if made.shape != like.shape:
        made = made.view(like.shape)
    if made.stride() == like.stride or not made.numel():
        return made
    found = torch.empty_strided(like.shape, like.stride, dtype=torch.int64)
    once = tuple(slice(0, 1) if not step else slice(None) for step in like.stride)
    found[once].copy_(made[once])  # what is expanded is written once
    return found
