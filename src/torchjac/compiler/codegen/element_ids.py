"""Element ids: the expression of each element of a tensor, and the point of that expression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from torchjac._torch.trace.ir import Instruction, Value
from torchjac.compiler.codegen.expressions import Expressions
from torchjac.compiler.codegen.scalar_ir import Granularity, Indices
from torchjac.compiler.codegen.scalar_ops import DTYPES
from torchjac.errors import PlanRefused

# An element id: the number of the expression, then this many bits for the point.
BITS = 40
_POINT = (1 << BITS) - 1


class LoweringContext(Protocol):
    """The state that operations on element ids may read and extend.

    Attributes:
        expressions: All expressions so far.
        granularity: The elements that share an expression.
    """

    expressions: Expressions
    granularity: Granularity

    def ids(self, value: Value) -> Tensor:
        """The element ids of a tensor."""

    def matmul_ids(self, value: Value) -> Tensor:
        """The element ids of a factor: points of one expression where possible."""

    def cast(self, value: Value, dtype: str) -> Tensor:
        """The element ids of a tensor in another dtype."""

    def fixed_values(self, value: Value) -> Tensor:
        """The numbers of a tensor that does not vary."""

    def constant_id(self, number: float, dtype: str) -> int:
        """The element id of a number."""

    def apply(self, kind: str, dtype: str, operands: Sequence[Tensor]) -> Tensor:
        """The element ids of a scalar operation on broadcast operands."""


def dtype_of(value: Value | None) -> str:
    """The name of the dtype of a tensor.

    Raises:
        PlanRefused: Expressions cannot have the dtype.
    """
    assert value is not None
    name = str(value.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise PlanRefused(f"it computes in {name}")
    return name


def split_ids(ids: Indices) -> tuple[Indices, Indices]:
    """The expressions and the points of element ids."""
    return ids >> BITS, ids & _POINT


def group_by_expression(numbers: Sequence[Indices]) -> list[tuple[list[int], Indices | None]]:
    """The elements grouped by the expressions of their operands; None stands for all elements."""
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


def with_strides(ids: Tensor, like: Value) -> Tensor:
    """The element ids with the strides of a tensor, because views read memory."""
    if ids.shape != like.shape:
        ids = ids.view(like.shape)
    if ids.stride() == like.stride or not ids.numel():
        return ids
    copy = torch.empty_strided(like.shape, like.stride, dtype=torch.int64)
    once = tuple(slice(0, 1) if not step else slice(None) for step in like.stride)
    copy[once].copy_(ids[once])  # writes expanded elements once
    return copy


def comparison_dtype(call: Instruction) -> str:
    """The dtype in which the operands of a comparison are compared.

    Raises:
        PlanRefused: The operation compares bits, or expressions cannot have the dtype.
    """
    arguments: list[Any] = [
        torch.zeros((1,) * min(len(a.shape), 1), dtype=a.dtype) if isinstance(a, Value) else a
        for a in call.args
        if isinstance(a, (Value, int, float))
    ]
    met = torch.result_type(*arguments) if len(arguments) == 2 else arguments[0].dtype
    name = str(met).removeprefix("torch.")
    if "bitwise" in str(call.operation) and name != "bool":
        raise PlanRefused("bits of integers")
    if name == "bool":
        return "int64"  # True is greater than False.
    if name not in DTYPES:
        raise PlanRefused(f"it compares {name}")
    return name


def bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers: 0 and -0 differ."""
    of = {torch.float64: torch.int64, torch.float32: torch.int32}.get(tensor.dtype)
    return tensor if of is None else tensor.view(of)
