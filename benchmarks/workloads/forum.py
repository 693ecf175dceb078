"""The question that torchjac began with: two inputs, four outputs, nothing but overhead."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.workloads.base import Workload, generator, uniform


def double_and_square(q: Tensor) -> Tensor:
    """Two diagonals stacked: rows 2 and 8 q."""
    return torch.cat([2 * q, 4 * q * q], -1)


def forum(inputs: int = 2, graph: bool = False) -> Workload:
    """The forum's example with `inputs` inputs (float32), from the function or from its graph."""

    def make(seed: int) -> tuple[Tensor, ...]:
        return (uniform(generator(seed), inputs, low=0.5, high=2.0, dtype=torch.float32),)

    return Workload(
        name="forum-graph" if graph else "forum",
        stands_for="the forum question" + (", outputs already computed" if graph else ""),
        f=double_and_square,
        make=make,
        m=2 * inputs,
        n=inputs,
        graph=graph,
        sparse=False,
        port=None if graph else "forum",
    )
