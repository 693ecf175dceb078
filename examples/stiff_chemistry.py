"""Stiff chemistry of polluted air: SciPy's implicit solvers ask for a 20 x 20 Jacobian many times.

The mechanism is POLLU: 25 reactions of 20 species, at rates over fifteen decades (J. G. Verwer,
SIAM J. Sci. Comput. 15(5), 1994; the Test Set for IVP Solvers publishes the numbers after an hour).
Boxes of air are followed for that hour, with `jac=` from torchjac, from torch, and with none: SciPy
then takes finite differences.

Run: python examples/stiff_chemistry.py [--boxes N] [--method BDF] [--rtol R]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from torch import Tensor

import torchjac

Array = NDArray[np.float64]

MINUTES = 60.0

# Species, the published concentration at the start, and that after an hour, in ppm.
AIR = """
    NO2   0      0.5646255480022769e-1
    NO    0.2    0.1342484130422339
    O3P   0      0.4139734331099427e-8
    O3    0.04   0.5523140207484359e-2
    HO2   0      0.2018977262302196e-6
    OH    0      0.1464541863493966e-6
    HCHO  0.1    0.7784249118997964e-1
    CO    0.3    0.3245075353396018
    ALD   0.01   0.7494013383880406e-2
    MEO2  0      0.1622293157301561e-7
    C2O3  0      0.1135863833257075e-7
    CO2   0      0.2230505975721359e-2
    PAN   0      0.2087162882798630e-3
    CH3O  0      0.1396921016840158e-4
    HNO3  0      0.8964884856898295e-2
    O1D   0      0.4352846369330103e-17
    SO2   0.007  0.6899219696263405e-2
    SO4   0      0.1007803037365946e-3
    NO3   0      0.1772146513969984e-5
    N2O5  0      0.5682943292316392e-4
"""
SPECIES = [line.split()[0] for line in AIR.strip().splitlines()]
START, END = np.array([line.split()[1:] for line in AIR.strip().splitlines()], dtype=float).T

# Rate constant (per minute, or per ppm and minute), consumed species, produced species.
REACTIONS = """
    0.35      NO2         -> NO + O3P
    26.6      NO + O3     -> NO2
    12300     HO2 + NO    -> NO2 + OH
    0.00086   HCHO        -> HO2 + HO2 + CO
    0.00082   HCHO        -> CO
    15000     HCHO + OH   -> HO2 + CO
    0.00013   ALD         -> MEO2 + HO2 + CO
    24000     ALD + OH    -> C2O3
    16500     C2O3 + NO   -> NO2 + MEO2 + CO2
    9000      C2O3 + NO2  -> PAN
    0.022     PAN         -> C2O3 + NO2
    12000     MEO2 + NO   -> CH3O + NO2
    1.88      CH3O        -> HCHO + HO2
    16300     NO2 + OH    -> HNO3
    4.8e6     O3P         -> O3
    0.00035   O3          -> O1D
    0.0175    O3          -> O3P
    1e8       O1D         -> OH + OH
    4.44e11   O1D         -> O3P
    1240      SO2 + OH    -> SO4 + HO2
    2.1       NO3         -> NO
    5.78      NO3         -> NO2 + O3P
    0.0474    NO2 + O3    -> NO3
    1780      NO3 + NO2   -> N2O5
    3.12      N2O5        -> NO3 + NO2
"""


def mechanism() -> Callable[[Tensor], Tensor]:
    """Change of the concentrations per minute, by reactions at rate x reactant (x reactant)."""
    lines = [line.split(maxsplit=1) for line in REACTIONS.strip().splitlines()]
    rates = torch.tensor([float(rate) for rate, _ in lines], dtype=torch.float64)
    change = torch.zeros(len(lines), len(SPECIES), dtype=torch.float64)
    reactants = []
    for number, (_, reaction) in enumerate(lines):
        used, products = (
            [SPECIES.index(name.strip()) for name in side.split("+")]
            for side in reaction.split("->")
        )
        for species in used:
            change[number, species] -= 1
        for species in products:
            change[number, species] += 1
        # A missing second reactant is the species after the last: its concentration is one.
        reactants.append([*used, len(SPECIES)][:2])
    first, second = torch.tensor(reactants).T

    def slope(c: Tensor) -> Tensor:
        padded = torch.cat([c, torch.ones_like(c[:1])])
        return (rates * padded[first] * padded[second]) @ change

    return slope


def air(boxes: int) -> Array:
    """The published start, and starts with up to three times more or less of each species."""
    spread = np.random.default_rng(0).uniform(-0.5, 0.5, (boxes, len(SPECIES)))
    spread[0] = 0
    concentrations: Array = START * 10**spread
    return concentrations


@dataclass
class Run:
    """Results and durations of following all boxes.

    Attributes:
        ends: Concentrations after the hour, `(boxes, species)`.
        seconds: Seconds of the whole run.
        in_jacobians: Seconds of every call of `jac`.
        jacobians: Number of Jacobians that the solver asked for.
        slopes: Number of calls of the right-hand side, with those for finite differences.
    """

    ends: Array
    seconds: float = 0.0
    in_jacobians: list[float] = field(default_factory=list)
    jacobians: int = 0
    slopes: int = 0


def follow(
    slope: Callable[[Tensor], Tensor],
    jacobian: Callable[[Tensor], Tensor] | None,
    starts: Array,
    method: str = "Radau",
    rtol: float = 1e-6,
) -> Run:
    """Follows every box for an hour."""
    run = Run(np.empty_like(starts))

    def fun(_: float, c: Array) -> Array:
        run.slopes += 1
        return slope(torch.from_numpy(c)).numpy()

    def jac(_: float, c: Array) -> Array:
        assert jacobian is not None
        begun = perf_counter()
        J = jacobian(torch.from_numpy(c)).numpy()
        run.in_jacobians.append(perf_counter() - begun)
        return J

    begun = perf_counter()
    for box, start in enumerate(starts):
        done = solve_ivp(
            fun,
            (0, MINUTES),
            start,
            method=method,
            rtol=rtol,
            atol=1e-6 * rtol,  # concentrations of radicals are tiny, and matter
            jac=None if jacobian is None else jac,
        )
        assert done.success, done.message
        run.ends[box] = done.y[:, -1]
        run.jacobians += done.njev
    run.seconds = perf_counter() - begun
    return run


def main() -> None:
    """Follows the same boxes with every kind of Jacobian, and compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--boxes", type=int, default=30)
    parser.add_argument("--method", choices=("BDF", "Radau"), default="Radau")
    parser.add_argument("--rtol", type=float, default=1e-6)
    arguments = parser.parse_args()

    slope, starts = mechanism(), air(arguments.boxes)
    # A small Jacobian, computed a thousand times: compiling pays from the first call.
    ways: dict[str, Callable[[Tensor], Tensor] | None] = {
        "torchjac": torchjac.jacobian(slope, compile=True),
        "jacrev": torch.func.jacrev(slope),
        "differences": None,
    }
    print(" " * 12 + " seconds  Jacobians  in these  median each  right-hand sides")
    runs: dict[str, Run] = {}
    for name, jacobian in ways.items():
        run = runs[name] = follow(slope, jacobian, starts, arguments.method, arguments.rtol)
        row = f"{name:12} {run.seconds:7.2f}  {run.jacobians:9}  "
        if run.in_jacobians:
            row += f"{sum(run.in_jacobians):8.2f}  {1e3 * median(run.in_jacobians):8.2f} ms"
        print(f"{row:55}{run.slopes:16}")
    ends = {name: run.ends for name, run in runs.items()}
    apart = max(np.abs(other / ends["torchjac"] - 1).max() for other in ends.values())
    print(f"concentrations differ by {apart:.1e} of themselves at most")
    off = np.abs(ends["torchjac"][0] / END - 1).max()
    print(f"the published start ends within {off:.1e} of the published numbers")


if __name__ == "__main__":
    main()
