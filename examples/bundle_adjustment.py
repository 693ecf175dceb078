"""Bundle adjustment: poses of cameras and positions of points, by Levenberg-Marquardt.

The cameras are those of ADBench, with 11 parameters each. A residual depends on one camera and one
point, so both Jacobians, by all cameras and by all points, are nearly empty: torchjac returns them
as sparse matrices of SciPy, and the points are eliminated from the normal equations (the Schur
complement). The same loop runs with torch's own Jacobians, which are dense, and ends at the same
cameras.

The scene is synthetic: cameras around a cloud of points, pixels with noise. The noise determines
the final residuals, and the loop has to end there.

Run: python examples/bundle_adjustment.py [--cameras N] [--points N] [--alone]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import bsr_array, csr_array
from scipy.spatial.transform import Rotation
from torch import Tensor

import torchjac

VIEWS = 5  # cameras that see a point
FREE = 7  # position, turn and size of the whole scene: no pixel depends on them

Array = NDArray[np.float64]
# A function from cameras and points to the Jacobians by each, in SciPy's form or dense.
Jacobians = Callable[[Tensor, Tensor], tuple[Any, Any]]


def project(camera: Tensor, point: Tensor) -> Tensor:
    """Pixels `(..., 2)`: turn into the camera's frame, divide by depth, distort, scale."""
    turn, center, focal, principal, radial = camera.split_with_sizes((3, 3, 1, 2, 2), -1)
    angle = (turn * turn).sum(-1, keepdim=True).sqrt()  # not zero: no camera here is unturned
    axis, ray = turn / angle, point - center
    along = axis * (axis * ray).sum(-1, keepdim=True)
    across = torch.linalg.cross(axis, ray)
    seen = ray * angle.cos() + across * angle.sin() + along * (1 - angle.cos())
    flat = seen[..., :2] / seen[..., 2:]
    r2 = (flat * flat).sum(-1, keepdim=True)
    bent: Tensor = flat * (1 + radial[..., :1] * r2 + radial[..., 1:] * r2 * r2)
    return principal + focal * bent


@dataclass(frozen=True)
class Scene:
    """The observations, and an initial guess.

    Attributes:
        which_camera: The camera of each observation.
        which_point: The point of each observation.
        pixels: Observed pixels, `(observations, 2)`.
        weights: One over the standard deviation of each observation, `(observations, 1)`.
        cameras: A first guess, `(cameras, 11)`.
        points: A first guess, `(points, 3)`.
    """

    which_camera: Tensor
    which_point: Tensor
    pixels: Tensor
    weights: Tensor
    cameras: Tensor
    points: Tensor

    def residuals(self, cameras: Tensor, points: Tensor) -> Tensor:
        """Error of every observation in standard deviations, `(observations, 2)`."""
        seen = project(cameras[self.which_camera], points[self.which_point])
        return self.weights * (seen - self.pixels)

    def spread(self, cost: float) -> float:
        """Standard deviation of the noise, as the residuals show it: 1 if the model is right."""
        unknowns = self.cameras.numel() + self.points.numel() - FREE
        return math.sqrt(cost / (self.pixels.numel() - unknowns))


def orientations(centers: Array, targets: Array) -> Array:
    """Axis times angle of cameras that stand at the centers and look at the targets."""
    forward = targets - centers
    forward /= np.linalg.norm(forward, axis=-1, keepdims=True)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right, axis=-1, keepdims=True)
    frames = np.stack([right, np.cross(forward, right), forward], -2)
    turns: Array = Rotation.from_matrix(frames).as_rotvec()
    return turns


def make(cameras: int, points: int) -> Scene:
    """A ring of cameras around a cloud; each point is seen by some of them, with noise."""
    random = np.random.default_rng(0)
    around = 2 * np.pi * np.arange(cameras) / cameras
    centers = 5 * np.stack([np.cos(around), np.sin(around), 0 * around], -1)
    centers += 0.5 * random.normal(size=(cameras, 3))
    turns = orientations(centers, 0.3 * random.normal(size=(cameras, 3)))
    # Focal length, principal point, radial distortion: mean and standard deviation.
    usual, vary = np.array([[600, 0, 0, -0.1, 0.02], [20, 5, 5, 0.02, 0.01]])
    lens = usual + vary * random.normal(size=(cameras, 5))
    true_cameras = torch.from_numpy(np.concatenate([turns, centers, lens], -1))
    true_points = torch.from_numpy(random.uniform(-1.5, 1.5, (points, 3)))

    # Cameras take turns, so that all see the same number of points.
    first = np.arange(points)[:, None] * VIEWS
    which_camera = torch.from_numpy((first + np.arange(min(VIEWS, cameras))).ravel() % cameras)
    which_point = torch.arange(points).repeat_interleave(min(VIEWS, cameras))
    deviation = torch.from_numpy(random.uniform(0.2, 1.0, (len(which_point), 1)))
    noise = deviation * torch.from_numpy(random.normal(size=(len(which_point), 2)))
    pixels = project(true_cameras[which_camera], true_points[which_point]) + noise

    off = np.array([*[0.02] * 3, *[0.1] * 3, 20, *[0] * 4])
    guess = true_cameras + torch.from_numpy(off * random.normal(size=(cameras, 11)))
    guess[:, 7:] = 0  # principal point and distortion start unknown
    cloud = true_points + torch.from_numpy(0.1 * random.normal(size=(points, 3)))
    return Scene(which_camera, which_point, pixels, 1 / deviation, guess, cloud)


def as_matrix(J: Any, columns: int) -> csr_array:
    """SciPy's form of a Jacobian that torch returned."""
    return csr_array(J.reshape(-1, columns).numpy()) if isinstance(J, Tensor) else J


def solve(
    by_camera: csr_array, by_point: csr_array, r: Array, damping: float
) -> tuple[Array, Array]:
    """Solves (J'J + damping diag(J'J)) s = -J'r for the steps of cameras and of points.

    Points meet only in cameras: their part of J'J is a 3 x 3 block for each. With these inverted,
    a small dense system for the cameras remains.
    """
    more = 1 + damping * np.eye(3)
    blocks = (by_point.T @ by_point).tobsr((3, 3))
    inverse = bsr_array((np.linalg.inv(more * blocks.data), blocks.indices, blocks.indptr))
    shared = by_camera.T @ by_point
    through = shared @ inverse
    cameras = (by_camera.T @ by_camera).toarray()
    cameras[np.diag_indices_from(cameras)] *= 1 + damping
    slope_camera, slope_point = by_camera.T @ r, by_point.T @ r
    left = cameras - (through @ shared.T).toarray()
    s = np.linalg.solve(left, through @ slope_point - slope_camera)
    return s, -(inverse @ (slope_point + shared.T @ s))


@dataclass
class Run:
    """Result and durations of an adjustment.

    Attributes:
        cameras: The last cameras.
        points: The last points.
        costs: Sum of squared residuals, before the first step and after each that lowered it.
        iterations: Number of steps, accepted and rejected.
        in_jacobians: Seconds of every Jacobian, one for each accepted step.
        seconds: Seconds of the whole adjustment.
    """

    cameras: Tensor
    points: Tensor
    costs: list[float]
    iterations: int = 0
    in_jacobians: list[float] = field(default_factory=list)
    seconds: float = 0.0


def adjust(scene: Scene, jacobians: Jacobians, most: int = 100) -> Run:
    """Levenberg-Marquardt, until a step lowers the cost by less than a billionth."""
    begun = perf_counter()
    r = scene.residuals(scene.cameras, scene.points)
    run = Run(scene.cameras, scene.points, [float(r.square().sum())])
    damping, moved = 1e-3, True
    for run.iterations in range(1, most + 1):
        if moved:
            before = perf_counter()
            J = jacobians(run.cameras, run.points)
            run.in_jacobians.append(perf_counter() - before)
            by_camera = as_matrix(J[0], run.cameras.numel())
            by_point = as_matrix(J[1], run.points.numel())
        steps = solve(by_camera, by_point, r.numpy().ravel(), damping)
        cameras, points = (
            x + torch.from_numpy(s).view_as(x)
            for x, s in zip((run.cameras, run.points), steps, strict=True)
        )
        tried = scene.residuals(cameras, points)
        cost, last = float(tried.square().sum()), run.costs[-1]
        moved = cost < last
        damping = damping / 5 if moved else damping * 4
        if moved:
            run.cameras, run.points, r = cameras, points, tried
            run.costs.append(cost)
        if abs(last - cost) < 1e-9 * last:
            break
    run.seconds = perf_counter() - begun
    return run


def main() -> None:
    """Adjusts with every kind of Jacobian, and compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cameras", type=int, default=6)
    parser.add_argument("--points", type=int, default=100)
    parser.add_argument("--alone", action="store_true", help="torchjac only: dense does not fit")
    arguments = parser.parse_args()

    scene = make(arguments.cameras, arguments.points)
    ways: dict[str, Jacobians] = {
        "torchjac": torchjac.jacobian(scene.residuals, argnums=(0, 1), layout=csr_array)
    }
    if not arguments.alone:
        ways["jacrev"] = torch.func.jacrev(scene.residuals, argnums=(0, 1))
        ways["jacfwd"] = torch.func.jacfwd(scene.residuals, argnums=(0, 1))
    print(" " * 8 + "  seconds  iterations  Jacobians  in these  median each  residuals / noise")
    runs: dict[str, Run] = {}
    for name, jacobians in ways.items():
        run = runs[name] = adjust(scene, jacobians)
        print(
            f"{name:8}  {run.seconds:7.2f}  {run.iterations:10}  {len(run.in_jacobians):9}  "
            f"{sum(run.in_jacobians):8.2f}  {1e3 * median(run.in_jacobians):8.2f} ms  "
            f"{scene.spread(run.costs[0]):8.1f} -> {scene.spread(run.costs[-1]):.3f}"
        )
    ends = [scene.residuals(run.cameras, run.points) for run in runs.values()]
    apart = max(float((end - ends[0]).abs().max()) for end in ends)
    print(f"residuals differ by {apart:.1e} of the noise at most")


if __name__ == "__main__":
    main()
