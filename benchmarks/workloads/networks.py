"""Small neural networks: per-sample Jacobians, parameter Jacobians, PINNs, narrow waists."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.workloads.base import CONSTANTS_SEED, Workload, generator, lead, normal, uniform


def dense_layers(sizes: Sequence[int], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights ``w0, b0, w1, ...`` of a tanh network, scaled so that it does not saturate."""
    gen = generator(CONSTANTS_SEED)
    layers: dict[str, Tensor] = {}
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        layers[f"w{i}"] = normal(gen, fan_out, fan_in, dtype=dtype) / fan_in**0.5
        layers[f"b{i}"] = 0.1 * normal(gen, fan_out, dtype=dtype)
    return layers


def mlp(
    sizes: Sequence[int] = (3, 64, 64, 5),
    batch: int | None = 128,
    dtype: str = "float32",
    name: str | None = None,
    stands_for: str = "per-sample Jacobians of a small network",
) -> Workload:
    """A tanh network differentiated with respect to its input, sample by sample."""
    kind: torch.dtype = getattr(torch, dtype)
    layers = dense_layers(sizes, kind)
    depth = len(sizes) - 1

    def net(x: Tensor) -> Tensor:
        for i in range(depth):
            x = torch.nn.functional.linear(x, layers[f"w{i}"], layers[f"b{i}"])
            if i + 1 < depth:
                x = torch.tanh(x)
        return x

    def make(seed: int) -> tuple[Tensor, ...]:
        return (normal(generator(seed), *lead(batch), sizes[0], dtype=kind),)

    return Workload(
        name=name or "mlp-" + "-".join(map(str, sizes)),
        stands_for=stands_for,
        f=net,
        make=make,
        m=sizes[-1],
        n=sizes[0],
        batch=batch,
        port="mlp",
        constants=layers,
    )


def pinn(points: int = 1024, width: int = 64, depth: int = 4, fields: int = 4) -> Workload:
    """Fields of a physics-informed network by its three coordinates, at many points."""
    return mlp(
        sizes=(3, *[width] * depth, fields),
        batch=points,
        dtype="float64",
        name=f"pinn-x{points}",
        stands_for="physics-informed network: fields by coordinates",
    )


def residuals(
    samples: int = 576, inputs: int = 2, hidden: int = 21, bias: bool = False
) -> Workload:
    """Levenberg-Marquardt: one residual a sample, by the flat parameters of one hidden layer.

    The parameter count is ``(inputs + 2) * hidden``, one more with an output `bias`.
    """
    n = (inputs + 2) * hidden + int(bias)
    gen = generator(CONSTANTS_SEED)
    x = uniform(gen, samples, inputs)
    target = torch.sin(3 * x).prod(-1)

    def f(p: Tensor) -> Tensor:
        w0 = p[: inputs * hidden].view(hidden, inputs)
        b0 = p[inputs * hidden : (inputs + 1) * hidden]
        w1 = p[(inputs + 1) * hidden : (inputs + 2) * hidden]
        y = torch.tanh(x @ w0.mT + b0) @ w1
        if bias:
            y = y + p[-1]
        return y - target

    def make(seed: int) -> tuple[Tensor, ...]:
        return (0.5 * normal(generator(seed), n),)

    return Workload(
        name=f"residuals-{samples}x{n}",
        stands_for="Levenberg-Marquardt on network parameters: dense, tall",
        f=f,
        make=make,
        m=samples,
        n=n,
        port="residuals",
        constants={"x": x, "target": target, "hidden": torch.tensor(hidden)},
    )


def waist(n: int = 1000, middle: int = 20, m: int | None = None) -> Workload:
    """Wide in, wide out, `middle` numbers between: J is a product of two thin matrices."""
    out = n if m is None else m
    gen = generator(CONSTANTS_SEED)
    down, up = normal(gen, middle, n) / n**0.5, normal(gen, out, middle) / middle**0.5

    def f(x: Tensor) -> Tensor:
        code = torch.tanh(torch.sin(x) @ down.mT)
        return torch.tanh(code @ up.mT)

    def make(seed: int) -> tuple[Tensor, ...]:
        return (normal(generator(seed), n),)

    return Workload(
        name=f"waist-{n}-{middle}-{out}",
        stands_for="autoencoders, reduced-order models",
        f=f,
        make=make,
        m=out,
        n=n,
        port="waist",
        constants={"down": down, "up": up},
    )
