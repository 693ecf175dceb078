"""What is detected: problems with a time to reach, and small ones of every family.

A spec is a family call, as in `benchmarks.workloads`; two families more live here.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import conv1d

from benchmarks import workloads
from benchmarks.workloads.base import CONSTANTS_SEED, Workload, generator, normal


def heat(n: int = 200) -> Workload:
    """The heat equation on n points of a line, zero at both ends: three entries a row."""

    def f(u: Tensor) -> Tensor:
        first = u[1:2] - 2 * u[:1]
        inner = u[:-2] - 2 * u[1:-1] + u[2:]
        last = u[-2:-1] - 2 * u[-1:]
        return torch.cat([first, inner, last])

    return Workload(
        name=f"heat-{n}",
        stands_for="a stencil in one dimension",
        f=f,
        make=lambda seed: (normal(generator(seed), n),),
        m=n,
        n=n,
        sparse=True,
        port="heat",
    )


def convnet(n: int = 200) -> Workload:
    """Three convolutions with ReLU on a signal of n numbers: 1, 8, 4, 2 channels."""
    gen = generator(CONSTANTS_SEED)
    sizes = ((8, 1, 5), (4, 8, 3), (2, 4, 3))
    weights = [normal(gen, *s) / (s[1] * s[2]) ** 0.5 for s in sizes]

    def f(x: Tensor) -> Tensor:
        signal = x[None, None]
        for weight in weights:
            signal = torch.relu(conv1d(signal, weight, padding=weight.shape[-1] // 2))
        return signal.flatten()

    return Workload(
        name=f"convnet-{n}",
        stands_for="a convolutional network",
        f=f,
        make=lambda seed: (normal(generator(seed), n),),
        m=2 * n,
        n=n,
        sparse=True,
        port="convnet",
        constants={f"w{i}": w for i, w in enumerate(weights)},
    )


_FAMILIES: Mapping[str, Callable[..., Workload]] = MappingProxyType(
    {"heat": heat, "convnet": convnet}
)


@dataclass(frozen=True)
class Problem:
    """One function at one size.

    Attributes:
        spec: The call that builds it.
        timed: Whether its stages are timed, or its pattern compared only.
        peers: Whether asdex takes part.
        faster: How many times faster than asdex detection has to be.
        within: Seconds that detection may take.
    """

    spec: str
    timed: bool = True
    peers: bool = True
    faster: float | None = None
    within: float | None = None


TIMED = (
    Problem("brusselator(n=32)", within=5e-3),
    Problem("brusselator(n=128)", faster=10),
    Problem("heat(n=100_000)", faster=10),
    Problem("bundle_full(cameras=49, points=7776, observations=31_843)", faster=10),
    Problem("finite_volume(nx=150, ny=100)", faster=10),
    Problem("convnet(n=200)"),
    Problem("convnet(n=2000)"),
    Problem("heat(n=1_000_000)", peers=False),
)
"""The rows of the table."""

SMALL = tuple(
    Problem(spec, timed=False)
    for spec in (
        "forum(inputs=3)", "arm(joints=3)", "mlp(sizes=(3, 8, 5), batch=None)",
        "residuals(7, 2, 3, True)", "waist(6, 2, 5)", "nbody(bodies=3)", "brusselator(n=5)",
        "chemistry(species=7, reactions=9)", "finite_volume(nx=3, ny=4)",
        "bundle(observations=None)", "bundle_full(cameras=2, points=4, observations=7)",
        "heat(n=9)", "convnet(n=11)",
    )
)  # fmt: skip
"""One of each family: their patterns are compared entry by entry, with the numeric Jacobian too."""

QUICK = tuple(
    Problem(spec)
    for spec in ("brusselator(n=6)", "heat(n=100)", "finite_volume(nx=2, ny=3)", "convnet(n=20)")
)
"""What ``--quick`` times."""


def build(spec: str) -> Workload:
    """The workload of a family call.

    Raises:
        ValueError: If it is none, or an argument is not a literal.
    """
    try:
        call = ast.parse(spec, mode="eval").body
    except SyntaxError:
        call = None
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
        family = _FAMILIES.get(call.func.id)
        if family is not None:
            named = {kw.arg: ast.literal_eval(kw.value) for kw in call.keywords if kw.arg}
            return family(*map(ast.literal_eval, call.args), **named)
    return workloads.build(spec)
