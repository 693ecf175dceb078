"""Serial arms: many tiny operations on 3x3 matrices, one pose or a batch of poses."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.workloads.base import CONSTANTS_SEED, Workload, generator, lead, normal, uniform


def skew(v: Tensor) -> Tensor:
    """The matrix K with ``K @ w == cross(v, w)``."""
    zero = torch.zeros_like(v[..., 0])
    x, y, z = v.unbind(-1)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))


def arm(joints: int = 7, poses: int | None = None) -> Workload:
    """Tip position and rotation (12 numbers) of a chain of revolute joints.

    Every joint has a fixed link transform (rotation, offset) and a unit axis; its own rotation is
    Rodrigues' formula ``I + sin(q) K + (1 - cos(q)) K^2``.
    """
    gen = generator(CONSTANTS_SEED)
    axes = torch.nn.functional.normalize(normal(gen, joints, 3), dim=-1)
    links = torch.linalg.matrix_exp(skew(uniform(gen, joints, 3)))
    offsets = uniform(gen, joints, 3, low=-0.4, high=0.4)
    hats = skew(axes)
    squares = hats @ hats
    eye = torch.eye(3, dtype=torch.float64)

    def tip(q: Tensor) -> Tensor:
        rotation, position = links[0], offsets[0]
        for i in range(joints):
            angle = q[..., i, None, None]
            turn = eye + torch.sin(angle) * hats[i] + (1 - torch.cos(angle)) * squares[i]
            rotation = rotation @ turn
            if i + 1 < joints:
                position = position + rotation @ offsets[i + 1]
                rotation = rotation @ links[i + 1]
            else:
                position = position + rotation[..., 0] * 0.1
        return torch.cat([position, rotation.flatten(-2)], -1)

    def make(seed: int) -> tuple[Tensor, ...]:
        return (uniform(generator(seed), *lead(poses), joints, low=-1.5, high=1.5),)

    return Workload(
        name=f"arm{joints}" + ("" if poses is None else f"-x{poses}"),
        stands_for="robot kinematics, one pose in a control loop"
        if poses is None
        else "robot kinematics, a batch of poses",
        f=tip,
        make=make,
        m=12,
        n=joints,
        batch=poses,
        port="arm",
        constants={"links": links, "offsets": offsets, "hats": hats, "squares": squares},
    )
