"""Jacobians through captures that are used again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from torchjac.capture import Call
from torchjac.capture.cache import CaptureCache
from torchjac.capture.derivative import Derivative, trace_function
from torchjac.capture.guards import Fingerprint, Unguardable, fingerprint
from torchjac.capture.watch import Policy

D = torch.float64
X = torch.tensor([0.3, -0.7, 1.1], dtype=D)


def call(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Call:
    return Call(f, 0, False, args or (X,), kwargs)


def guarded(c: Call, policy: Policy | None = None) -> Fingerprint:
    found = fingerprint(c, policy) if policy is not None else fingerprint(c)
    assert isinstance(found, Fingerprint), found
    return found


def reason(f: Callable[..., Any], *args: Any) -> str:
    found = fingerprint(call(f, *args))
    assert isinstance(found, Unguardable), found
    return found.reason


def evaluated(derivative: Derivative, inputs: tuple[Tensor, ...]) -> Tensor:
    """J from a traced derivative of one output and one input, a row at a time."""
    (cotangent,), (gradient,) = derivative.cotangents, derivative.gradients
    rows = []
    for seed in torch.eye(derivative.m, dtype=D):

        class Seeded(fx.Interpreter):
            def run_node(self, node: fx.Node, seed: Tensor = seed) -> Any:
                if node is cotangent:
                    return seed.view(derivative.row_shapes[0])
                return super().run_node(node)

        made = Seeded(derivative.module).run(*inputs)[-1]
        rows.append(torch.zeros(derivative.n, dtype=D) if gradient is None else made.reshape(-1))
    return torch.stack(rows)


class Cached:
    """The Jacobian of a function through captures that are used again."""

    def __init__(self, f: Callable[..., Any]):
        self.f = f
        self.cache: CaptureCache[Derivative] = CaptureCache()
        self.traces = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        made = call(self.f, *args, **kwargs)
        derivative = self.cache.get_or_make(made, lambda: self.trace(made))
        floats = [a for a in made.args if isinstance(a, Tensor) and a.is_floating_point()]
        return evaluated(derivative, tuple(floats))

    def trace(self, made: Call) -> Derivative:
        self.traces += 1
        return trace_function(made, ())


def direct(f: Callable[..., Any], *args: Any) -> Tensor:
    return torch.autograd.functional.jacobian(f, args or (X,))[0]
