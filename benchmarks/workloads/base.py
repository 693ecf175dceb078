"""What a workload is, and the helpers that its families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

CONSTANTS_SEED = 20_240_101
"""Seed of everything a workload freezes (weights, link transforms, meshes): never of its inputs."""


@dataclass(frozen=True)
class Workload:
    """One function whose Jacobian is timed, at one size.

    Attributes:
        name: Unique in the registry; the row of the table.
        stands_for: The users' problem that this shape was taken from.
        f: The function. A batched workload's f takes a whole batch *and*, without the leading
            axis, a single sample, so that ``vmap(jacrev(f))`` needs no second version of it.
        make: Seed -> the tuple of arguments.
        m: Outputs (of one sample, if batched).
        n: Inputs differentiated (of one sample, if batched; summed over `argnums`).
        argnums: The arguments to differentiate.
        batch: Number of independent samples, None for a plain function.
        graph: The outputs exist before the Jacobian is asked for (`torchjac.jac` style).
        sparse: Most of J is structurally zero: sparse methods take part.
        port: Name of the same function in the peers' files, None if it was not ported.
        constants: What f closes over, handed to the ports.
    """

    name: str
    stands_for: str
    f: Callable[..., Tensor]
    make: Callable[[int], tuple[Tensor, ...]]
    m: int
    n: int
    argnums: int | tuple[int, ...] = 0
    batch: int | None = None
    graph: bool = False
    sparse: bool = False
    port: str | None = None
    constants: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def batched(self) -> bool:
        """Whether the leading axis of inputs and outputs is a batch of independent samples."""
        return self.batch is not None

    @property
    def positions(self) -> tuple[int, ...]:
        """`argnums` as a tuple."""
        return (self.argnums,) if isinstance(self.argnums, int) else self.argnums

    @property
    def shape(self) -> str:
        """The size of J for people, e.g. ``4096 x (12 x 7)``."""
        core = f"{self.m} x {self.n}"
        return core if self.batch is None else f"{self.batch} x ({core})"


def generator(seed: int) -> torch.Generator:
    """A CPU generator of its own, so that no workload depends on another's draws."""
    return torch.Generator().manual_seed(seed)


def uniform(
    gen: torch.Generator,
    *shape: int,
    low: float = -1.0,
    high: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Uniform numbers between `low` and `high`."""
    return low + (high - low) * torch.rand(*shape, generator=gen, dtype=dtype)


def normal(gen: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=gen, dtype=dtype)


def lead(batch: int | None) -> tuple[int, ...]:
    """The leading axes of the inputs: none for a plain function."""
    return () if batch is None else (batch,)
