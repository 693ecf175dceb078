"""Waves of the Brusselator, a chemical clock that diffuses: implicit Euler steps, solved by SciPy.

Two concentrations on a periodic N x N grid. Every Newton iteration needs the Jacobian of 2 N²
rates, six entries in a row: torchjac returns it as the SciPy matrix that `splu` takes. The same
steps with torch's own Jacobians, which are dense, end at the same concentrations.

Run: python examples/brusselator.py [--size N] [--steps N] [--alone]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

import torch
from scipy.sparse import csc_array, eye_array
from scipy.sparse.linalg import splu
from torch import Tensor

import torchjac

A, B = 3.4, 1.0  # above A = 1 + B² the clock ticks
DIFFUSION = 0.1
STEP = 0.05
TOLERANCE = 1e-10  # largest change in the last Newton step, about the square of the one before
ITERATIONS = 20

# A function from concentrations to their Jacobian, in SciPy's form or dense.
Jacobian = Callable[[Tensor], Any]


def axes(size: int) -> tuple[Tensor, Tensor]:
    """Coordinates of the grid's points on the unit square."""
    points = torch.arange(size, dtype=torch.float64) / size
    return points[None, :], points[:, None]


def fed(size: int) -> Tensor:
    """Inflow of the first concentration: a disk."""
    x, y = axes(size)
    return 5.0 * ((x - 0.3) ** 2 + (y - 0.6) ** 2 <= 0.1**2).to(torch.float64)


def rates(size: int) -> Callable[[Tensor], Tensor]:
    """Rate of change of the concentrations; both are `(2, size, size)`."""
    source, spread = fed(size), DIFFUSION * size**2

    def diffused(u: Tensor) -> Tensor:
        around = u.roll(1, -1) + u.roll(-1, -1) + u.roll(1, -2) + u.roll(-1, -2)
        return spread * (around - 4 * u)

    def f(state: Tensor) -> Tensor:
        u, v = state
        reaction = u * u * v
        du = B + reaction - (A + 1) * u + diffused(u) + source
        return torch.stack([du, A * u - reaction + diffused(v)])

    return f


def start(size: int) -> Tensor:
    """Smooth humps across the square, the first concentration's along y, the second's along x."""
    x, y = axes(size)
    u, v = 22 * (y * (1 - y)) ** 1.5, 27 * (x * (1 - x)) ** 1.5
    return torch.stack([u.expand(size, size), v.expand(size, size)])


@dataclass
class Run:
    """States and durations of a simulation.

    Attributes:
        states: Concentrations before the first step and after each.
        in_jacobians: Seconds of every Jacobian, one for each Newton iteration.
        seconds: Seconds of the whole simulation.
    """

    states: list[Tensor]
    in_jacobians: list[float] = field(default_factory=list)
    seconds: float = 0.0


def as_matrix(J: Any, unknowns: int) -> csc_array:
    """SciPy's form of a Jacobian that torch returned."""
    return csc_array(J.reshape(unknowns, unknowns).numpy()) if isinstance(J, Tensor) else J


def walk(
    f: Callable[[Tensor], Tensor], jacobian: Jacobian, state: Tensor, steps: int, step: float = STEP
) -> Run:
    """Implicit Euler: every step solves new - step f(new) = old by Newton's method."""
    run, begun = Run([state]), perf_counter()
    eye = eye_array(state.numel(), format="csc")
    for _ in range(steps):
        old = new = run.states[-1]
        for _ in range(ITERATIONS):
            before = perf_counter()
            J = jacobian(new)
            run.in_jacobians.append(perf_counter() - before)
            missing = old + step * f(new) - new
            newton = splu(eye - step * as_matrix(J, state.numel()))
            change = torch.from_numpy(newton.solve(missing.flatten().numpy())).view_as(old)
            new = new + change
            if change.abs().max() < TOLERANCE:
                break
        else:
            raise ArithmeticError("Newton's method did not converge: take smaller steps")
        run.states.append(new)
    run.seconds = perf_counter() - begun
    return run


def imbalance(states: list[Tensor], step: float = STEP) -> float:
    """Largest error of the mass balance in a step, relative to the mass.

    Reaction and diffusion only move mass: u + v grows by the inflow and shrinks by u, and implicit
    Euler conserves this balance exactly.
    """
    worst = 0.0
    for old, new in pairwise(states):
        entered = step * (B + fed(new.shape[-1]) - new[0]).sum()
        worst = max(worst, float(((new - old).sum() - entered).abs() / new.sum()))
    return worst


def main() -> None:
    """Takes the same steps with every kind of Jacobian, and compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=24)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--alone", action="store_true", help="torchjac only: dense does not fit")
    arguments = parser.parse_args()

    f, state = rates(arguments.size), start(arguments.size)
    ways: dict[str, Jacobian] = {"torchjac": torchjac.jacobian(f, layout=csc_array)}
    if not arguments.alone:
        ways |= {"jacrev": torch.func.jacrev(f), "jacfwd": torch.func.jacfwd(f)}
    print(" " * 8 + "  seconds  Jacobians  in these  median each")
    runs: dict[str, Run] = {}
    for name, jacobian in ways.items():
        run = runs[name] = walk(f, jacobian, state, arguments.steps)
        print(
            f"{name:8}  {run.seconds:7.2f}  {len(run.in_jacobians):9}  "
            f"{sum(run.in_jacobians):8.2f}  {1e3 * median(run.in_jacobians):8.2f} ms"
        )
    ends = {name: run.states[-1] for name, run in runs.items()}
    apart = max(float((end - ends["torchjac"]).abs().max()) for end in ends.values())
    print(f"concentrations differ by {apart:.1e} at most")
    print(f"balance of what is fed and used: off by {imbalance(runs['torchjac'].states):.1e}")


if __name__ == "__main__":
    main()
