"""Finite volumes on an unstructured mesh: gather, a small flux function, scatter."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.workloads.base import CONSTANTS_SEED, Workload, generator, uniform

GRAVITY = 9.81


def triangles(nx: int, ny: int) -> dict[str, Tensor]:
    """A shuffled triangle mesh: who is left and right of every edge, its normal and its length.

    Each square of an nx x ny grid with displaced corners is cut in two, and the cells are
    renumbered at random, so that no index arithmetic of the grid survives.
    """
    gen = generator(CONSTANTS_SEED)
    gx, gy = torch.meshgrid(torch.arange(nx + 1.0), torch.arange(ny + 1.0), indexing="ij")
    corners = torch.stack([gx, gy], -1).double() + uniform(gen, nx + 1, ny + 1, 2, low=0, high=0.3)
    place = corners.reshape(-1, 2)
    order = torch.randperm(2 * nx * ny, generator=gen)
    owners: dict[tuple[int, int], list[int]] = {}
    areas = torch.zeros(2 * nx * ny, dtype=torch.float64)
    for square in range(nx * ny):
        i, j = divmod(square, ny)
        a, b = i * (ny + 1) + j, (i + 1) * (ny + 1) + j
        for half, cell in enumerate(((a, b, b + 1), (a, b + 1, a + 1))):
            number = int(order[2 * square + half])
            p, q, r = place[list(cell)]
            areas[number] = 0.5 * ((q - p)[0] * (r - p)[1] - (q - p)[1] * (r - p)[0])
            for s, t in zip(cell, cell[1:] + cell[:1], strict=True):
                # Counter-clockwise: the cell lies left of the edge s -> t it came from first.
                owners.setdefault((min(s, t), max(s, t)), [s, t]).append(number)
    inner = [o for o in owners.values() if len(o) == 4]
    wall = [o for o in owners.values() if len(o) == 3]

    def outward(edges: list[list[int]]) -> Tensor:
        along = place[[e[1] for e in edges]] - place[[e[0] for e in edges]]
        return torch.stack([along[:, 1], -along[:, 0]], -1)

    return {
        "left": torch.tensor([e[2] for e in inner]),
        "right": torch.tensor([e[3] for e in inner]),
        "normal": outward(inner),
        "wall": torch.tensor([e[2] for e in wall]),
        "wall_normal": outward(wall),
        "areas": areas,
    }


def finite_volume(nx: int = 20, ny: int = 15) -> Workload:
    """Shallow water (depth, two momenta) on 2 nx ny triangles with a Rusanov flux.

    Inner edges exchange a flux between two cells, walls push back with the water's pressure.
    """
    mesh = triangles(nx, ny)
    left, right, wall, areas = mesh["left"], mesh["right"], mesh["wall"], mesh["areas"]
    length = mesh["normal"].norm(dim=-1, keepdim=True)
    normal = mesh["normal"] / length
    wall_normal = mesh["wall_normal"]
    cells = areas.numel()

    def flux(u: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
        depth, momentum = u[..., :1], u[..., 1:]
        speed = (momentum * along).sum(-1, keepdim=True) / depth
        pressure = 0.5 * GRAVITY * depth * depth
        fastest = speed.abs() + torch.sqrt(GRAVITY * depth)
        return torch.cat([depth * speed, momentum * speed + pressure * along], -1), fastest

    def f(state: Tensor) -> Tensor:
        u_left, u_right = state[..., left, :], state[..., right, :]
        flux_left, fastest_left = flux(u_left, normal)
        flux_right, fastest_right = flux(u_right, normal)
        fastest = torch.maximum(fastest_left, fastest_right)
        through = 0.5 * length * (flux_left + flux_right - fastest * (u_right - u_left))
        at_wall = 0.5 * GRAVITY * state[..., wall, :1] ** 2 * wall_normal
        push = torch.cat([torch.zeros_like(at_wall[..., :1]), at_wall], -1)
        change = torch.zeros_like(state)
        change = change.index_add(-2, left, -through).index_add(-2, right, through)
        return change.index_add(-2, wall, -push) / areas[:, None]

    def make(seed: int) -> tuple[Tensor, ...]:
        gen = generator(seed)
        depth = uniform(gen, cells, 1, low=1.0, high=2.0)
        return (torch.cat([depth, uniform(gen, cells, 2, low=-0.5, high=0.5)], -1),)

    return Workload(
        name=f"volumes-{cells}",
        stands_for="finite volumes, graph networks: gather and scatter, sparse J",
        f=f,
        make=make,
        m=3 * cells,
        n=3 * cells,
        sparse=True,
        port="finite_volume",
        constants={
            "left": left,
            "right": right,
            "normal": normal,
            "length": length,
            "wall": wall,
            "wall_normal": wall_normal,
            "areas": areas,
        },
    )
