"""Particles, a stencil, stiff chemistry: right-hand sides for implicit time steps."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.workloads.base import CONSTANTS_SEED, Workload, generator, lead, normal, uniform


def nbody(bodies: int = 128) -> Workload:
    """Gravitational accelerations (softened) of `bodies` bodies in 3-D: dense J, cheap f."""
    masses = uniform(generator(CONSTANTS_SEED), bodies, low=0.5, high=2.0)

    def acceleration(x: Tensor) -> Tensor:
        apart = x[..., None, :, :] - x[..., :, None, :]
        squared = (apart * apart).sum(-1) + 1e-2
        pull = masses * squared**-1.5
        return (pull[..., None] * apart).sum(-2)

    def make(seed: int) -> tuple[Tensor, ...]:
        return (normal(generator(seed), bodies, 3),)

    return Workload(
        name=f"nbody-{bodies}",
        stands_for="particles, force fields: every pair interacts",
        f=acceleration,
        make=make,
        m=3 * bodies,
        n=3 * bodies,
        port="nbody",
        constants={"masses": masses},
    )


def brusselator(n: int = 32) -> Workload:
    """The 2-D reaction-diffusion system on an n x n periodic grid, two fields (2, n, n)."""
    grid = torch.linspace(0, 1, n, dtype=torch.float64)
    x, y = grid[None, :], grid[:, None]
    source = 5.0 * ((x - 0.3) ** 2 + (y - 0.6) ** 2 <= 0.1**2).to(torch.float64)
    a, b, diffusion = 3.4, 1.0, 10.0 * (n - 1) ** 2

    def laplacian(u: Tensor) -> Tensor:
        around = u.roll(1, -1) + u.roll(-1, -1) + u.roll(1, -2) + u.roll(-1, -2)
        return around - 4 * u

    def f(state: Tensor) -> Tensor:
        u, v = state.unbind(-3)
        reaction = u * u * v
        du = b + reaction - (a + 1) * u + diffusion * laplacian(u) + source
        dv = a * u - reaction + diffusion * laplacian(v)
        return torch.stack([du, dv], -3)

    def make(seed: int) -> tuple[Tensor, ...]:
        smooth = torch.stack(
            [(22 * (y * (1 - y)) ** 1.5).expand(n, n), (27 * (x * (1 - x)) ** 1.5).expand(n, n)]
        )
        return (smooth + uniform(generator(seed), 2, n, n, low=0.0, high=0.1),)

    return Workload(
        name=f"brusselator-{n}",
        stands_for="PDE residuals on a grid: a stencil, sparse J",
        f=f,
        make=make,
        m=2 * n * n,
        n=2 * n * n,
        sparse=True,
        port="brusselator",
        constants={"source": source},
    )


def reaction_network(species: int, reactions: int) -> dict[str, Tensor]:
    """A random mass-action network with stiff rates.

    Index `species` stands for "no second reactant" (a concentration of one). Rates spread over
    nine decades; every reaction consumes what it needs and makes one to three other species.
    """
    gen = generator(CONSTANTS_SEED)
    first = torch.randint(species, (reactions,), generator=gen)
    second = torch.randint(species, (reactions,), generator=gen)
    alone = torch.rand(reactions, generator=gen) < 0.4
    second = torch.where(alone, torch.full_like(second, species), second)
    change = torch.zeros(reactions, species + 1, dtype=torch.float64)
    rows = torch.arange(reactions)
    for reactant in (first, second):
        change[rows, reactant] -= 1
    for r in range(reactions):
        products = torch.randperm(species, generator=gen)[: 1 + r % 3]
        change[r, products] += 1
    rates = 10 ** uniform(gen, reactions, low=-4.0, high=5.0)
    return {"first": first, "second": second, "change": change[:, :species], "rates": rates}


def chemistry(species: int = 20, reactions: int = 30, batch: int | None = None) -> Workload:
    """Stiff kinetics: rate constants times concentrations, summed by stoichiometry."""
    net = reaction_network(species, reactions)
    first, second, change, rates = net["first"], net["second"], net["change"], net["rates"]

    def f(c: Tensor) -> Tensor:
        padded = torch.cat([c, torch.ones_like(c[..., :1])], -1)
        return (rates * padded[..., first] * padded[..., second]) @ change

    def make(seed: int) -> tuple[Tensor, ...]:
        return (10 ** uniform(generator(seed), *lead(batch), species, low=-3.0, high=0.0),)

    return Workload(
        name=f"chemistry-{species}" + ("" if batch is None else f"-x{batch}"),
        stands_for="stiff kinetics, one reactor" if batch is None else "stiff kinetics, many cells",
        f=f,
        make=make,
        m=species,
        n=species,
        batch=batch,
        sparse=batch is None,
        port="chemistry",
        constants=net,
    )
