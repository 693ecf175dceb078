"""The parts of an output, from the adjoints of the inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, product

import torch
from torch import Tensor

from torchjac.capture.linear_program import LinearProgram
from torchjac.compiler.accumulate import scatter_entries as write
from torchjac.compiler.accumulate.addresses import Block, Slots
from torchjac.compiler.accumulate.adjoint import Adjoint
from torchjac.request import Mode, Output, Sparse
from torchjac.sparsity.pattern import Pattern


@dataclass(frozen=True, slots=True)
class Goal:
    """What is accumulated, and from which side.

    Attributes:
        output: What of the Jacobian is wanted, with its pattern if it has one.
        batched: Whether leading axes are a batch of independent samples.
        mode: Whether the linear program is that of J (`reverse`) or that of J' (`forward`).
    """

    output: Output
    batched: bool = False
    mode: Mode = "reverse"


def parts(
    goal: Goal,
    derivative: LinearProgram,
    adjoints: Sequence[Adjoint | None],
    inputs: Sequence[Tensor],
    varies: Callable[[Tensor], bool],
) -> list[Tensor]:
    """The parts of an output, as `layout.assemble` takes them.

    Args:
        goal: What is accumulated.
        derivative: The linear program.
        adjoints: The adjoint of each differentiated leaf; None is zero.
        inputs: Tensors of the dtypes and the device of the leaves.
        varies: Whether a tensor depends on the inputs.
    """
    match goal.output:
        case Sparse(pattern=Pattern() as pattern):
            return [
                _values(pattern, goal.mode, derivative, adjoints, _widest(inputs, pattern), varies)
            ]
        case _:
            return _blocks(goal, derivative, adjoints, inputs)


def _widest(inputs: Sequence[Tensor], pattern: Pattern) -> Tensor:
    """An empty tensor in the dtype that holds the entries of all differentiated leaves."""
    dtypes = [x.dtype for x in inputs[: len(pattern.column_shapes)]]
    return inputs[0].new_empty(0, dtype=reduce(torch.promote_types, dtypes))


def _values(
    pattern: Pattern,
    mode: Mode,
    derivative: LinearProgram,
    adjoints: Sequence[Adjoint | None],
    like: Tensor,
    varies: Callable[[Tensor], bool],
) -> Tensor:
    """The values of a pattern."""
    starts = [0, *accumulate(math.prod(s) for s in derivative.column_shapes)]
    present = [(g, k) for g, k in zip(adjoints, starts, strict=False) if g is not None]
    return write.sparse(present, Slots.of(pattern, mode), like, varies)


def _blocks(
    goal: Goal,
    derivative: LinearProgram,
    adjoints: Sequence[Adjoint | None],
    inputs: Sequence[Tensor],
) -> list[Tensor]:
    """Every block, row by row."""
    elements = [tuple(s) for s in derivative.column_shapes]
    seeds = [tuple(s) for s in derivative.row_shapes]
    starts = [0, *accumulate(math.prod(s) for s in seeds)]
    rows, columns = (seeds, elements) if goal.mode == "reverse" else (elements, seeds)
    blocks = []
    for i, j in product(range(len(rows)), range(len(columns))):
        source, leaf = (i, j) if goal.mode == "reverse" else (j, i)
        samples = rows[i][0] if goal.batched else None
        block = Block(starts[source], math.prod(seeds[source]), elements[leaf], samples, goal.mode)
        outer = (*rows[i], *(columns[j] if samples is None else columns[j][1:]))
        blocks.append(write.dense(adjoints[leaf], block, inputs[j]).view(outer))
    return blocks
