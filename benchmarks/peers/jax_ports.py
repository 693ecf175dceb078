"""The workloads in JAX: ``port(constants) -> f`` of a single sample, NumPy constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

Constants = Mapping[str, "np.ndarray[Any, Any]"]
GRAVITY = 9.81


def forum(c: Constants) -> Callable[..., Any]:
    return lambda q: jnp.concatenate([2 * q, 4 * q * q], -1)


def arm(c: Constants) -> Callable[..., Any]:
    links, offsets, hats, squares = c["links"], c["offsets"], c["hats"], c["squares"]
    joints = len(hats)

    def f(q: Any) -> Any:
        rotation, position = links[0], offsets[0]
        for i in range(joints):
            turn = np.eye(3) + jnp.sin(q[i]) * hats[i] + (1 - jnp.cos(q[i])) * squares[i]
            rotation = rotation @ turn
            if i + 1 < joints:
                position = position + rotation @ offsets[i + 1]
                rotation = rotation @ links[i + 1]
            else:
                position = position + rotation[:, 0] * 0.1
        return jnp.concatenate([position, rotation.reshape(-1)])

    return f


def mlp(c: Constants) -> Callable[..., Any]:
    depth = len(c) // 2

    def f(x: Any) -> Any:
        for i in range(depth):
            x = c[f"w{i}"] @ x + c[f"b{i}"]
            if i + 1 < depth:
                x = jnp.tanh(x)
        return x

    return f


def residuals(c: Constants) -> Callable[..., Any]:
    x, target, hidden = c["x"], c["target"], int(c["hidden"])
    inputs = x.shape[1]

    def f(p: Any) -> Any:
        w0 = p[: inputs * hidden].reshape(hidden, inputs)
        b0 = p[inputs * hidden : (inputs + 1) * hidden]
        w1 = p[(inputs + 1) * hidden : (inputs + 2) * hidden]
        y = jnp.tanh(x @ w0.T + b0) @ w1
        if p.shape[0] > (inputs + 2) * hidden:
            y = y + p[-1]
        return y - target

    return f


def waist(c: Constants) -> Callable[..., Any]:
    return lambda x: jnp.tanh(c["up"] @ jnp.tanh(c["down"] @ jnp.sin(x)))


def nbody(c: Constants) -> Callable[..., Any]:
    def f(x: Any) -> Any:
        apart = x[None, :, :] - x[:, None, :]
        squared = (apart * apart).sum(-1) + 1e-2
        pull = c["masses"] * squared**-1.5
        return (pull[..., None] * apart).sum(-2)

    return f


def brusselator(c: Constants) -> Callable[..., Any]:
    n = c["source"].shape[0]
    a, b, diffusion = 3.4, 1.0, 10.0 * (n - 1) ** 2

    def laplacian(u: Any) -> Any:
        around = jnp.roll(u, 1, -1) + jnp.roll(u, -1, -1) + jnp.roll(u, 1, -2) + jnp.roll(u, -1, -2)
        return around - 4 * u

    def f(state: Any) -> Any:
        u, v = state
        reaction = u * u * v
        du = b + reaction - (a + 1) * u + diffusion * laplacian(u) + c["source"]
        dv = a * u - reaction + diffusion * laplacian(v)
        return jnp.stack([du, dv])

    return f


def chemistry(c: Constants) -> Callable[..., Any]:
    def f(x: Any) -> Any:
        padded = jnp.concatenate([x, jnp.ones(1)])
        return (c["rates"] * padded[c["first"]] * padded[c["second"]]) @ c["change"]

    return f


def finite_volume(c: Constants) -> Callable[..., Any]:
    left, right, wall, length = c["left"], c["right"], c["wall"], c["length"]

    def flux(u: Any, along: Any) -> tuple[Any, Any]:
        depth, momentum = u[:, :1], u[:, 1:]
        speed = (momentum * along).sum(-1, keepdims=True) / depth
        pressure = 0.5 * GRAVITY * depth * depth
        fastest = jnp.abs(speed) + jnp.sqrt(GRAVITY * depth)
        return jnp.concatenate([depth * speed, momentum * speed + pressure * along], -1), fastest

    def f(state: Any) -> Any:
        u_left, u_right = state[left], state[right]
        flux_left, fastest_left = flux(u_left, c["normal"])
        flux_right, fastest_right = flux(u_right, c["normal"])
        fastest = jnp.maximum(fastest_left, fastest_right)
        through = 0.5 * length * (flux_left + flux_right - fastest * (u_right - u_left))
        at_wall = 0.5 * GRAVITY * state[wall, :1] ** 2 * c["wall_normal"]
        push = jnp.concatenate([jnp.zeros_like(at_wall[:, :1]), at_wall], -1)
        change = jnp.zeros_like(state).at[left].add(-through).at[right].add(through)
        return change.at[wall].add(-push) / c["areas"][:, None]

    return f


def project(camera: Any, point: Any) -> Any:
    turn, center = camera[..., 0:3], camera[..., 3:6]
    focal, principal, radial = camera[..., 6:7], camera[..., 7:9], camera[..., 9:11]
    angle = jnp.sqrt((turn * turn).sum(-1, keepdims=True))
    axis, ray = turn / angle, point - center
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    along = (axis * ray).sum(-1, keepdims=True) * (1 - cos)
    seen = ray * cos + jnp.cross(axis, ray) * sin + axis * along
    flat = seen[..., :2] / seen[..., 2:3]
    r2 = (flat * flat).sum(-1, keepdims=True)
    return principal + focal * flat * (1 + radial[..., :1] * r2 + radial[..., 1:] * r2 * r2)


def bundle(c: Constants) -> Callable[..., Any]:
    return lambda camera, point, weight: weight * (project(camera, point) - c["feature"])


def bundle_full(c: Constants) -> Callable[..., Any]:
    which_camera, which_point = c["which_camera"], c["which_point"]

    def f(camera: Any, point: Any, weight: Any) -> Any:
        pixels = weight * (project(camera[which_camera], point[which_point]) - c["feature"])
        return jnp.concatenate([pixels, 1 - weight * weight], -1)

    return f


PORTS: Mapping[str, Callable[[Constants], Callable[..., Any]]] = {
    port.__name__: port
    for port in (
        forum, arm, mlp, residuals, waist, nbody, brusselator, chemistry, finite_volume,
        bundle, bundle_full,
    )
}  # fmt: skip
