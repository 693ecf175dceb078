"""Bundle adjustment as in ADBench: a camera sees a point, the residual is two pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.workloads.base import CONSTANTS_SEED, Workload, generator, lead, uniform

# One camera, point, weight and feature, replicated by ADBench's files to any size.
CAMERA = (
    *(-0.758453, -1.109613, -0.845551),  # axis times angle
    *(34.556073, 39.676747, 53.881673),  # center
    419.194514,  # focal length
    *(5.864426, -8.518870),  # principal point
    *(0.087812, 0.002739),  # radial distortion
)
POINT = (7.203245, 0.001144, 3.023326)
WEIGHT = (0.417022,)
FEATURE = (271.760969, 834.209256)


def project(camera: Tensor, point: Tensor) -> Tensor:
    """Rotate into the camera's frame, divide by depth, distort, scale to pixels."""
    turn, center = camera[..., 0:3], camera[..., 3:6]
    focal, principal, radial = camera[..., 6:7], camera[..., 7:9], camera[..., 9:11]
    angle = (turn * turn).sum(-1, keepdim=True).sqrt()
    axis, ray = turn / angle, point - center
    cos, sin = torch.cos(angle), torch.sin(angle)
    along = (axis * ray).sum(-1, keepdim=True) * (1 - cos)
    seen = ray * cos + torch.linalg.cross(axis, ray) * sin + axis * along
    flat = seen[..., :2] / seen[..., 2:3]
    r2 = (flat * flat).sum(-1, keepdim=True)
    return principal + focal * flat * (1 + radial[..., :1] * r2 + radial[..., 1:] * r2 * r2)


def replicate(values: tuple[float, ...], seed: int, *shape: int) -> Tensor:
    """`values` at every place of `shape`, each off by up to a tenth of a percent.

    Exact copies would hide a method that mixes up observations.
    """
    base = torch.tensor(values, dtype=torch.float64)
    return base * (1 + 1e-3 * uniform(generator(seed), *shape, len(values)))


def bundle(observations: int | None = 31_843) -> Workload:
    """Residual of every observation by its own camera (11), point (3) and weight (1)."""
    feature = torch.tensor(FEATURE, dtype=torch.float64)

    def f(camera: Tensor, point: Tensor, weight: Tensor) -> Tensor:
        return weight * (project(camera, point) - feature)

    def make(seed: int) -> tuple[Tensor, ...]:
        shape = lead(observations)
        parts = (CAMERA, POINT, WEIGHT)
        return tuple(replicate(v, 3 * seed + i, *shape) for i, v in enumerate(parts))

    return Workload(
        name="bundle" if observations is None else f"bundle-x{observations}",
        stands_for="bundle adjustment: one small block an observation",
        f=f,
        make=make,
        m=2,
        n=15,
        argnums=(0, 1, 2),
        batch=observations,
        port="bundle",
        constants={"feature": feature},
    )


def bundle_full(cameras: int = 5, points: int = 60, observations: int = 200) -> Workload:
    """The whole problem: cameras and points shared by observations, plus ``1 - w^2`` each."""
    gen = generator(CONSTANTS_SEED)
    which_camera = torch.randint(cameras, (observations,), generator=gen)
    which_point = torch.randint(points, (observations,), generator=gen)
    # Every camera and every point is seen at least once, as in a real problem.
    which_camera[:cameras] = torch.arange(cameras)
    which_point[:points] = torch.arange(points)
    feature = torch.tensor(FEATURE, dtype=torch.float64)

    def f(camera: Tensor, point: Tensor, weight: Tensor) -> Tensor:
        pixels = weight * (project(camera[which_camera], point[which_point]) - feature)
        return torch.cat([pixels, 1 - weight * weight], -1)

    def make(seed: int) -> tuple[Tensor, ...]:
        return (
            replicate(CAMERA, 3 * seed, cameras),
            replicate(POINT, 3 * seed + 1, points),
            replicate(WEIGHT, 3 * seed + 2, observations),
        )

    return Workload(
        name=f"bundle-full-{cameras}-{points}-{observations}",
        stands_for="bundle adjustment, one system: shared cameras, sparse J",
        f=f,
        make=make,
        m=3 * observations,
        n=11 * cameras + 3 * points + observations,
        argnums=(0, 1, 2),
        sparse=True,
        port="bundle_full",
        constants={"feature": feature, "which_camera": which_camera, "which_point": which_point},
    )
