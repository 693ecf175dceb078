"""Random small programs: a list of steps, each an op on tensors made so far.

Every op takes any shapes: it adapts its axes and sizes with two integer knobs, so that every list
of steps is a program. Values stay bounded, and away from the kinks where derivatives differ by
convention only (ties of max, zeros of abs are left to the OpInfo tests).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

LIMIT = 48  # a longer tensor is cut: the oracle pays a pass per element

Op = Callable[[Tensor, Tensor, int, int], Tensor]


def axis(x: Tensor, k: int) -> int:
    """Some axis of x (0 for a zero-dimensional one, which torch takes too)."""
    return k % max(x.dim(), 1)


def pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x and y in broadcastable shapes: y is summed where they are not."""
    try:
        torch.broadcast_shapes(x.shape, y.shape)
    except RuntimeError:
        return x, y.sum()
    return x, y


def matrix(x: Tensor) -> Tensor:
    """x as a matrix."""
    return x.reshape(x.shape[0], -1) if x.numel() and x.dim() else x.reshape(1, -1)


def positions(x: Tensor, a: int, b: int) -> Tensor:
    """A few positions along the first axis, with repeats."""
    size = max(x.shape[0], 1)
    return torch.tensor([(a + i * b) % size for i in range(3 if x.shape[0] else 0)]).long()


def first_axis(x: Tensor) -> Tensor:
    """x with at least one axis."""
    return x.reshape(1) if x.dim() == 0 else x


def in_place(x: Tensor, y: Tensor, a: int, b: int) -> Tensor:
    """Writes into a copy, in three ways."""
    out = first_axis(x).clone(memory_format=torch.contiguous_format)
    if out.numel():
        flat = out.view(-1)
        flat[a % flat.numel()] = y.sum().tanh()
        flat[b % flat.numel() :].mul_(1.5)
    return out.add_(x.sum().sin())


def constant_scale(x: Tensor, y: Tensor, a: int, b: int) -> Tensor:
    """A factor computed under no_grad, another one detached."""
    with torch.no_grad():
        scale = y.sum().cos()
    return x * scale * (1 + x.detach().tanh())


def pool(x: Tensor, y: Tensor, a: int, b: int) -> Tensor:
    """A one-dimensional convolution with a fixed kernel."""
    if not x.numel():
        return x
    kernel = torch.linspace(-1, 1, 2 + a % 2, dtype=x.dtype).reshape(1, 1, -1)
    return F.conv1d(x.reshape(1, 1, -1), kernel, padding=1 + b % 2)


OPS: dict[str, Op] = {
    "sin": lambda x, y, a, b: x.sin(),
    "tanh_square": lambda x, y, a, b: x.tanh().square(),
    "exp": lambda x, y, a, b: x.tanh().exp(),
    "sigmoid": lambda x, y, a, b: x.sigmoid(),
    "softplus": lambda x, y, a, b: F.softplus(x),
    "relu": lambda x, y, a, b: (x + 0.37).relu(),
    "scale": lambda x, y, a, b: x * (1 + a) - b,
    "add": lambda x, y, a, b: torch.add(*pair(x, y)),
    "mul": lambda x, y, a, b: torch.mul(*pair(x.tanh(), y.sin())),
    "div": lambda x, y, a, b: torch.div(*pair(x, 2 + y.sin())),
    "where": lambda x, y, a, b: torch.where(x > 0.1, x.sin(), y.sum().cos()),
    "transpose": lambda x, y, a, b: x.transpose(axis(x, a), axis(x, b)),
    "reshape": lambda x, y, a, b: x.reshape(-1, 1) if a % 2 else x.reshape(-1),
    "flip": lambda x, y, a, b: x.flip(axis(x, a)) if x.dim() else x,
    "roll": lambda x, y, a, b: x.roll(b, axis(x, a)) if x.dim() else x,
    "unsqueeze": lambda x, y, a, b: x.unsqueeze(a % (x.dim() + 1)),
    "squeeze": lambda x, y, a, b: x.squeeze(),
    "expand": lambda x, y, a, b: x.unsqueeze(0).expand(a % 3, *x.shape),
    "narrow": lambda x, y, a, b: first_axis(x)[a % 2 :],
    "stride": lambda x, y, a, b: first_axis(x)[..., a % 2 :: 1 + b % 2],
    "diagonal": lambda x, y, a, b: matrix(x).diagonal(),
    "index": lambda x, y, a, b: first_axis(x)[positions(first_axis(x), a, b)],
    "tril": lambda x, y, a, b: matrix(x).tril(a - 1),
    "pad": lambda x, y, a, b: F.pad(first_axis(x), (a % 2, b % 2)),
    "cumsum": lambda x, y, a, b: x.cumsum(axis(x, a)),
    "sum": lambda x, y, a, b: x.sum(axis(x, a), keepdim=bool(b % 2)),
    "sum_all": lambda x, y, a, b: x.sum(),
    "mean": lambda x, y, a, b: x.sum(axis(x, a)) / 3,
    "logsumexp": lambda x, y, a, b: (x * x + 1).sum().log(),
    "softmax": lambda x, y, a, b: x.softmax(axis(x, a)),
    "norm": lambda x, y, a, b: (x.square().sum() + 1).sqrt(),
    "matmul": lambda x, y, a, b: (matrix(x) @ matrix(x).T).tanh(),
    "outer": lambda x, y, a, b: x.reshape(-1)[:5, None] * y.reshape(-1)[:5].sin(),
    "cat": lambda x, y, a, b: torch.cat([x.reshape(-1), y.reshape(-1)]),
    "stack": lambda x, y, a, b: torch.stack(
        torch.broadcast_tensors(*pair(x, y)), a % (x.dim() + 1)
    ),
    "in_place": in_place,
    "constant_scale": constant_scale,
    "conv": pool,
    "constant": lambda x, y, a, b: torch.ones_like(x),
    "index_add": lambda x, y, a, b: torch.zeros(4, dtype=x.dtype).index_add(
        0, torch.arange(x.numel()) % 4, x.reshape(-1)
    ),
}


@dataclass(frozen=True)
class Step:
    """One op on two of the tensors made so far."""

    op: str
    x: int
    y: int
    a: int
    b: int


@dataclass(frozen=True)
class Program:
    """Input shapes, steps, and which of all tensors are the outputs."""

    shapes: tuple[tuple[int, ...], ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Runs the steps; outputs count from the last tensor made."""
        tensors = list(inputs)
        for step in self.steps:
            x, y = tensors[-1 - step.x % len(tensors)], tensors[-1 - step.y % len(tensors)]
            out = OPS[step.op](x, y, step.a, step.b)
            tensors.append(out.reshape(-1)[:LIMIT] if out.numel() > LIMIT else out)
        return tuple(tensors[-1 - k % len(tensors)] for k in self.outputs)

    def inputs(self) -> tuple[Tensor, ...]:
        """The same random values for the same shapes."""
        generator = torch.Generator().manual_seed(len(self.steps))
        return tuple(torch.randn(s, dtype=torch.float64, generator=generator) for s in self.shapes)


SMALL = st.integers(0, 4)
SHAPES = st.lists(st.sampled_from([0, 1, 1, 2, 3, 3]), max_size=3).map(tuple)
STEPS = st.builds(Step, st.sampled_from(sorted(OPS)), SMALL, SMALL, SMALL, SMALL)
PROGRAMS = st.builds(
    Program,
    st.lists(SHAPES, min_size=1, max_size=3).map(tuple),
    st.lists(STEPS, min_size=1, max_size=8).map(tuple),
    st.lists(SMALL, min_size=1, max_size=3).map(tuple),
)
