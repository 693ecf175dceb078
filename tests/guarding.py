"""Jacobians through captures that are used again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from torchjac.call import Call
from torchjac.capture.linear_program import LinearProgram
from torchjac.capture.trace import trace_function
from torchjac.compiler.codegen.c.guard_reads import unchanged
from torchjac.guards.builder import Policy
from torchjac.guards.guard import Guard, Unguardable, build_guard
from torchjac.guards.rules import Mismatch
from torchjac.jit.cache import CaptureCache

D = torch.float64
X = torch.tensor([0.3, -0.7, 1.1], dtype=D)


def call(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Call:
    return Call(f, 0, False, args or (X,), kwargs)


class GuardOfCall:
    """The guard of a call, and its predicates, which pass no more than the guard."""

    def __init__(self, guard: Guard, c: Call):
        self._guard, self._call = guard, c
        self.size = guard.size
        self.predicate = guard.predicate(c)
        self._native = guard.predicate(c, unchanged=unchanged)  # settings from torch's library

    def mismatch(self, c: Call) -> Mismatch | None:
        mismatch, mine = self._guard.mismatch(c), self._call
        alike = (c.function, c.argnums, c.has_aux) == (mine.function, mine.argnums, mine.has_aux)
        for predicate in (self.predicate, self._native):
            if predicate is not None and alike and not c.kwargs:
                assert mismatch is None or not predicate(c.args), f"passed, but {mismatch.reason}"
        return mismatch

    def has_grown(self) -> bool:
        return self._guard.has_grown()


def bare(c: Call, policy: Policy = Policy()) -> Guard:  # noqa: B008
    guard = build_guard(c, policy)
    assert isinstance(guard, Guard), guard
    return guard


def guarded(c: Call, policy: Policy = Policy()) -> GuardOfCall:  # noqa: B008
    return GuardOfCall(bare(c, policy), c)


def reason(f: Callable[..., Any], *args: Any) -> str:
    refusal = build_guard(call(f, *args))
    assert isinstance(refusal, Unguardable), refusal
    return refusal.reason


def evaluated(derivative: LinearProgram, inputs: tuple[Tensor, ...]) -> Tensor:
    """J from a traced derivative of one output and one input, a row at a time."""
    (cotangent,), (gradient,) = derivative.cotangents, derivative.gradients
    rows = []
    for seed in torch.eye(derivative.m, dtype=D):

        class Seeded(fx.Interpreter):
            def run_node(self, node: fx.Node, seed: Tensor = seed) -> Any:
                if node is cotangent:
                    return seed.view(derivative.row_shapes[0])
                return super().run_node(node)

        row = Seeded(derivative.module).run(*inputs)[-1]
        rows.append(torch.zeros(derivative.n, dtype=D) if gradient is None else row.reshape(-1))
    return torch.stack(rows)


class Cached:
    """The Jacobian of a function through captures that are used again."""

    def __init__(self, f: Callable[..., Any]):
        self.f = f
        self.cache: CaptureCache[LinearProgram] = CaptureCache()
        self.traces = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        c = call(self.f, *args, **kwargs)
        derivative = self.cache.get_or_create(c, lambda: self.trace(c))
        floats = [a for a in c.args if isinstance(a, Tensor) and a.is_floating_point()]
        return evaluated(derivative, tuple(floats))

    def trace(self, c: Call) -> LinearProgram:
        self.traces += 1
        return trace_function(c, ())


def direct(f: Callable[..., Any], *args: Any) -> Tensor:
    return torch.autograd.functional.jacobian(f, args or (X,))[0]
