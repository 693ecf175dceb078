"""The workloads in CasADi: ``port(constants, sizes) -> ([inputs], output)`` of a single sample.

Symbols are column vectors of the flattened (row-major) PyTorch argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import casadi as ca
import numpy as np

Constants = Mapping[str, "np.ndarray[Any, Any]"]
Ported = tuple[list[Any], Any]


def forum(c: Constants, sizes: list[int]) -> Ported:
    q = ca.SX.sym("q", sizes[0])
    return [q], ca.vertcat(2 * q, 4 * q * q)


def arm(c: Constants, sizes: list[int]) -> Ported:
    q = ca.SX.sym("q", sizes[0])
    links, offsets, hats, squares = c["links"], c["offsets"], c["hats"], c["squares"]
    rotation, position = ca.SX(links[0]), ca.SX(offsets[0])
    for i in range(sizes[0]):
        turn = np.eye(3) + ca.sin(q[i]) * hats[i] + (1 - ca.cos(q[i])) * squares[i]
        rotation = rotation @ turn
        if i + 1 < sizes[0]:
            position = position + rotation @ ca.SX(offsets[i + 1])
            rotation = rotation @ links[i + 1]
        else:
            position = position + rotation[:, 0] * 0.1
    return [q], ca.vertcat(position, ca.vec(rotation.T))  # row-major, as PyTorch flattens


def brusselator(c: Constants, sizes: list[int]) -> Ported:
    n = c["source"].shape[0]
    a, b, diffusion = 3.4, 1.0, 10.0 * (n - 1) ** 2
    state = ca.SX.sym("state", 2 * n * n)
    u, v = state[: n * n], state[n * n :]
    place = np.arange(n * n).reshape(n, n)
    around = [np.roll(place, s, axis).ravel().tolist() for s in (1, -1) for axis in (0, 1)]

    def laplacian(x: Any) -> Any:
        return sum((x[p] for p in around), -4 * x)

    reaction = u * u * v
    du = b + reaction - (a + 1) * u + diffusion * laplacian(u) + c["source"].ravel()
    dv = a * u - reaction + diffusion * laplacian(v)
    return [state], ca.vertcat(du, dv)


def chemistry(c: Constants, sizes: list[int]) -> Ported:
    x = ca.SX.sym("c", sizes[0])
    padded = ca.vertcat(x, 1)
    speed = c["rates"] * padded[c["first"].tolist()] * padded[c["second"].tolist()]
    return [x], ca.sparsify(ca.DM(c["change"].T)) @ speed


def bundle(c: Constants, sizes: list[int]) -> Ported:
    camera, point, weight = ca.SX.sym("camera", 11), ca.SX.sym("point", 3), ca.SX.sym("weight")
    turn, ray = camera[0:3], point - camera[3:6]
    angle = ca.sqrt(ca.sumsqr(turn))
    axis = turn / angle
    along = ca.dot(axis, ray) * (1 - ca.cos(angle))
    seen = ray * ca.cos(angle) + ca.cross(axis, ray) * ca.sin(angle) + axis * along
    flat = seen[:2] / seen[2]
    r2 = ca.sumsqr(flat)
    bent = flat * (1 + camera[9] * r2 + camera[10] * r2 * r2)
    return [camera, point, weight], weight * (camera[7:9] + camera[6] * bent - c["feature"])


PORTS: Mapping[str, Callable[[Constants, list[int]], Ported]] = {
    port.__name__: port for port in (forum, arm, brusselator, chemistry, bundle)
}
