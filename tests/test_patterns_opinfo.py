"""Patterns of every differentiable op PyTorch describes, against numeric Jacobians.

Laws: a pattern contains every nonzero at several points, and an entry that it calls constant is
that number at all of them. How much more it has than it needs stands on the scoreboard
(`data/pattern_scoreboard.json`, and files of later versions of torch: see `versions.py`), which
fails when a pattern gets worse *and* when it gets better.
After a change that is meant to change it:

    OMP_NUM_THREADS=1 python tests/test_patterns_opinfo.py

An entry of the scoreboard: entries in the patterns of all samples, nonzeros seen at the points
(for information: where a maximum lies, say, is one place at a point and any place in a pattern
that holds for all inputs), the scopes of the patterns (`refused`: a sample cannot be captured,
`graph refused`: its graph cannot), and operations for which something had to be assumed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opinfo_exceptions import NO_ORACLE, RESEEDED_DIFFERS, TORCH_DISAGREES
from patterns import dense_pattern, numeric, numeric_of_graph
from test_opinfo import REAL, Case, cases
from torchjac.call import Call
from torchjac.capture.eager import capture_graph
from torchjac.capture.linear_program import LinearProgram
from torchjac.capture.trace import trace_function, trace_graph
from torchjac.errors import CaptureRefused
from torchjac.linear.rules import RULES
from torchjac.sparsity.interpret import interpret
from versions import board, write_board

SCOREBOARD = "pattern_scoreboard"
OPS = [n for n in REAL if n not in NO_ORACLE and n not in RESEEDED_DIFFERS]
SAMPLES = 3
POINTS = 2  # other than the one that the function is traced at
KEEP = frozenset(RULES)
Entry = dict[str, Any]


def realized(case: Case) -> Callable[..., list[Tensor]]:
    """The case with complex outputs as pairs of real numbers, so that complex ops count as well."""

    def run(*tensors: Tensor) -> list[Tensor]:
        outputs = case(*tensors)
        return [torch.view_as_real(o.resolve_conj()) if o.is_complex() else o for o in outputs]

    return run


def elsewhere(tensors: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    """Another point in the range of the first: every element moves towards another one."""
    generator = torch.Generator().manual_seed(seed)

    def another(x: Tensor) -> Tensor:
        x = x.detach()
        order = torch.randperm(x.numel(), generator=generator)
        weight = 0.4 * torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
        return torch.lerp(x, x.reshape(-1)[order].reshape(x.shape), weight).requires_grad_()

    return tuple(another(x) for x in tensors)


def traced_graph(
    function: Callable[..., Any], tensors: tuple[Tensor, ...]
) -> tuple[LinearProgram, np.ndarray]:
    """The derivative of the graph that a function records at a point, and its Jacobian."""
    outputs = function(*tensors)
    program = capture_graph(outputs, tensors, batched=False, retain_graph=True, create_graph=False)
    return trace_graph(program, KEEP), numeric_of_graph(outputs, tensors)


def jacobians(function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Iterator[np.ndarray]:
    """Numeric Jacobians at the tensors and at other points where the function is defined."""
    argnums = tuple(range(len(tensors)))
    yield numeric(function, *tensors, argnums=argnums)
    for k in range(POINTS):
        with contextlib.suppress(RuntimeError):  # not positive definite there, say
            yield numeric(function, *elsewhere(tensors, k), argnums=argnums)


def check(n: str, pattern: np.ndarray, jacobian: np.ndarray, single: bool) -> None:
    """Law: what is nonzero is in the pattern, and constants are what they say."""
    missed = np.isfinite(jacobian) & (jacobian != 0) & (pattern == 0)
    assert not missed.any(), f"not in the pattern: {np.argwhere(missed)[:5].tolist()}"
    known = ~np.isnan(pattern) & (pattern != 0) & np.isfinite(jacobian)
    if n in TORCH_DISAGREES:
        return  # its row loop gives zeros where the derivative is a constant
    tolerance = 1e-5 if single else 1e-9
    np.testing.assert_allclose(jacobian[known], pattern[known], rtol=tolerance, atol=tolerance)


def graph_is_sound(
    n: str, function: Callable[..., Any], tensors: tuple[Tensor, ...], single: bool
) -> set[str]:
    """Checks the pattern of a graph that exists; gives a scope if it cannot be traced."""
    try:
        derivative, jacobian = traced_graph(function, tensors)
    except CaptureRefused:
        return {"graph refused"}
    check(n, dense_pattern(derivative, interpret(derivative)), jacobian, single)
    return set()


def score(n: str) -> Entry:
    """Checks the patterns of an op and gives its entry on the scoreboard."""
    detected = seen = 0
    scopes: set[str] = set()
    assumed: set[str] = set()
    for position, case in enumerate(cases(n)[:SAMPLES]):
        function, tensors = realized(case), case.tensors
        single = any(t.dtype != torch.float64 for t in [*tensors, *function(*tensors)])
        argnums = tuple(range(len(tensors)))
        plain = tuple(t.detach() for t in tensors)
        numerics: Iterable[np.ndarray] = jacobians(function, tensors)
        try:
            try:
                derivative = trace_function(Call(function, argnums, False, plain, {}), KEEP)
            except CaptureRefused:
                derivative, at_point = traced_graph(function, tensors)
                numerics = [at_point]
        except CaptureRefused:
            scopes.add("refused")
            continue
        interpretation = interpret(derivative)
        pattern = dense_pattern(derivative, interpretation)
        somewhere = np.zeros(pattern.shape, dtype=bool)
        for jacobian in numerics:
            check(n, pattern, jacobian, single)
            size = np.abs(jacobian[np.isfinite(jacobian)]).max(initial=0.0)
            somewhere |= np.abs(jacobian) > 1e-12 * size  # rounding differs between machines
        if position == 0 and derivative.scope == "global":
            scopes |= graph_is_sound(n, function, tensors, single)
        detected += int((pattern != 0).sum())
        seen += int(somewhere.sum())
        scopes.add(derivative.scope)
        assumed.update(interpretation.assumed)
    return {
        "detected": detected,
        "seen": seen,
        "scopes": sorted(scopes),
        "assumed": sorted(assumed),
    }


@pytest.mark.parametrize("n", OPS)
def test_pattern_is_sound_and_as_sharp_as_it_was(n: str) -> None:
    """Both laws, and the scoreboard."""
    now, counted = score(n), board(SCOREBOARD)
    assert now["detected"] >= now["seen"]
    if counted is None:  # a version of torch that was not counted
        return
    before = counted[n]
    # A local pattern depends on values, and so on how this machine rounds.
    counted = ("detected",) if now["scopes"] == ["global"] else ()
    for key in (*counted, "scopes", "assumed"):
        assert now[key] == before[key], f"{key} was {before[key]} and is {now[key]}: see the top"


def test_scoreboard_has_every_op() -> None:
    """No op drops out of sight."""
    counted = board(SCOREBOARD)
    assert counted is None or sorted(counted) == sorted(OPS)


if __name__ == "__main__":
    write_board(SCOREBOARD, {n: score(n) for n in OPS}, lines=True)
