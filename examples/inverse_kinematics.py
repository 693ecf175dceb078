"""Inverse kinematics of a 7-joint arm for thousands of targets at once: damped least squares.

Every step needs the 3 x 7 Jacobian of the tip in every pose. The same loop runs with torchjac and
with torch's own Jacobians, and ends at the same angles.

Run: python examples/inverse_kinematics.py [--targets N] [--steps N]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor

import torchjac
from arm import chain, sample

DAMPING = 1e-2


def solve(
    tip: Callable[[Tensor], Tensor],
    jacobian: Callable[[Tensor], Tensor],
    targets: Tensor,
    start: Tensor,
    steps: int,
) -> tuple[Tensor, float]:
    """Angles that reach the targets, and the seconds of all Jacobians."""
    q, spent = start.clone(), 0.0
    eye = DAMPING * torch.eye(3, dtype=q.dtype)
    for _ in range(steps):
        error = (targets - tip(q))[..., None]
        begun = perf_counter()
        J = jacobian(q)
        spent += perf_counter() - begun
        # (J'J + d I)^-1 J' = J' (J J' + d I)^-1, of which the second inverse is 3 x 3.
        q = q + (J.mT @ torch.linalg.solve(J @ J.mT + eye, error))[..., 0]
    return q, spent


def main() -> None:
    """Solves with every kind of Jacobian, and compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()

    def tip(q: Tensor) -> Tensor:
        return chain(q)[0][-1]

    start = sample(arguments.targets)
    generator = torch.Generator().manual_seed(1)
    targets = tip(start + 0.3 * torch.randn(start.shape, dtype=start.dtype, generator=generator))
    ways = {
        "torchjac": torchjac.jacobian(tip, batched=True, compile=True),
        "vmap(jacrev)": torch.vmap(torch.func.jacrev(tip)),
        "vmap(jacfwd)": torch.vmap(torch.func.jacfwd(tip)),
    }
    solutions = {}
    for name, jacobian in ways.items():
        begun = perf_counter()
        jacobian(start)  # tracing and compiling
        first = perf_counter() - begun
        solutions[name], seconds = solve(tip, jacobian, targets, start, arguments.steps)
        missed = (tip(solutions[name]) - targets).norm(dim=-1)
        reached = float((missed < 1e-6).double().mean())
        print(
            f"{name:14} {1e3 * seconds / arguments.steps:8.2f} ms a step "
            f"(first call {first:.2f} s), {reached:.1%} of {arguments.targets} targets reached"
        )
    apart = max(float((q - solutions["torchjac"]).abs().max()) for q in solutions.values())
    print(f"angles differ by {apart:.1e} at most")


if __name__ == "__main__":
    main()
