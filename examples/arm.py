"""A seven-joint robot arm: real geometry, written as a plain batched PyTorch function.

The numbers are the Denavit–Hartenberg parameters (Craig's convention) and the joint limits that
Franka Robotics publishes for the Franka Emika Panda in the documentation of its control interface
(section "Robot and interface specifications").
"""

from __future__ import annotations

import torch
from torch import Tensor

# One line a joint: offset a along x [m], twist alpha about x, offset d along z [m]. The twists are
# multiples of 90 degrees and stand here in quarter turns: turning by one only swaps two axes.
LINKS = (
    (0.0, 0, 0.333),
    (0.0, -1, 0.0),
    (0.0, 1, 0.316),
    (0.0825, 1, 0.0),
    (-0.0825, -1, 0.384),
    (0.0, 1, 0.0),
    (0.088, 1, 0.0),
)
FLANGE = 0.107  # from the last joint to the flange, along z [m]

LOWER = torch.tensor([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973])
UPPER = torch.tensor([2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973])


def sample(poses: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Joint angles drawn evenly between the limits, `(poses, 7)`."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(poses, len(LINKS), generator=generator, dtype=dtype)
    return LOWER.to(dtype) + u * (UPPER - LOWER).to(dtype)


def chain(q: Tensor) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Origins of all frames, base to flange, and the three axes of the flange; each `(..., 3)`.

    With fewer than seven angles: the chain that ends after that many joints.
    """
    eye = torch.eye(3, dtype=q.dtype, device=q.device)
    x, y, z = (axis.expand(*q.shape[:-1], 3) for axis in eye)
    origins = [torch.zeros_like(x)]
    for (a, twist, d), angle in zip(LINKS, q.unbind(-1), strict=False):
        origin = origins[-1] + a * x
        if twist:
            y, z = (z, -y) if twist > 0 else (-z, y)
        c, s = angle.cos().unsqueeze(-1), angle.sin().unsqueeze(-1)
        x, y = c * x + s * y, c * y - s * x
        origins.append(origin + d * z)
    origins.append(origins[-1] + FLANGE * z)
    return origins, (x, y, z)


def flange(q: Tensor) -> Tensor:
    """The flange's pose, `(..., 7) -> (..., 12)`: position, then the three axes of its frame."""
    origins, axes = chain(q)
    return torch.cat([origins[-1], *axes], -1)


def geometric(pose: Tensor, J: Tensor) -> Tensor:
    """The 6×7 Jacobian of robotics, linear over angular velocity, from the 12×7 one of `flange`.

    An axis u of a turning frame moves with du = ω × u, so ω = ½ Σ u × du over the three axes.
    """
    axes, moves = pose[..., 3:].unflatten(-1, (3, 3)), J[..., 3:, :].unflatten(-2, (3, 3))
    angular = torch.linalg.cross(axes.unsqueeze(-1).expand_as(moves), moves, dim=-2).sum(-3) / 2
    return torch.cat([J[..., :3, :], angular], -2)


def manipulability(pose: Tensor, J: Tensor) -> Tensor:
    """Yoshikawa's measure sqrt(det(J Jᵀ)): how freely the hand can move; 0 if singular."""
    J = geometric(pose, J)
    return torch.linalg.det(J @ J.mT).clamp_min(0).sqrt()
