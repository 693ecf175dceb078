"""Patterns checked against numbers: shared by the tests of the rules.

A pattern is a dense float64 matrix, a row per element of the outputs and a column per element of
the differentiated arguments: 0 is a structural zero, NaN an entry that is not known before the
function runs, any other number an entry that is that number whatever the input is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from laws import rows
from torchjac.call import Call
from torchjac.capture.eager import capture_graph
from torchjac.capture.linear_program import LinearProgram
from torchjac.capture.trace import trace_function, trace_graph
from torchjac.linear.rules import RULES
from torchjac.sparsity.dependence import matrix
from torchjac.sparsity.interpret import Interpretation, interpret

Scope = Literal["global", "local"]


def interpreted(
    f: Callable[..., Any],
    *args: Any,
    argnums: int | tuple[int, ...] = 0,
    scope: Scope = "global",
) -> tuple[LinearProgram, Interpretation]:
    """The traced derivative of a function (or of its graph at these arguments), interpreted."""
    if scope == "global":
        derivative = trace_function(Call(f, argnums, False, args, {}), frozenset(RULES))
    else:
        outputs, leaves = evaluated(f, args, argnums)
        program = capture_graph(
            outputs, leaves, batched=False, retain_graph=True, create_graph=False
        )
        derivative = trace_graph(program, frozenset(RULES))
    return derivative, interpret(derivative)


def pattern_of(
    f: Callable[..., Any],
    *args: Any,
    argnums: int | tuple[int, ...] = 0,
    scope: Scope = "global",
) -> np.ndarray:
    """The pattern as a dense matrix: NaN, 0, or the constant."""
    return dense_pattern(*interpreted(f, *args, argnums=argnums, scope=scope))


def dense_pattern(derivative: LinearProgram, interpretation: Interpretation) -> np.ndarray:
    """The matrix of an interpretation."""
    blocks = [np.zeros((0, derivative.m))]
    for gradient, shape in zip(interpretation.gradients, derivative.column_shapes, strict=True):
        empty = np.zeros((shape.numel(), derivative.m))
        blocks.append(empty if gradient is None else matrix(gradient).toarray())
    return np.concatenate(blocks).T


def numeric(f: Callable[..., Any], *args: Any, argnums: int | tuple[int, ...] = 0) -> np.ndarray:
    """The Jacobian, one plain backward pass for each element of the outputs."""
    return numeric_of_graph(*evaluated(f, args, argnums))


def numeric_of_graph(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> np.ndarray:
    """As `numeric`, of a graph that exists: evaluated again, it may round another way."""
    m, n = sum(o.numel() for o in outputs), sum(x.numel() for x in leaves)
    jacobian = np.zeros((m, n))
    first = 0
    for out in outputs:
        blocks = [
            b.reshape(out.numel(), x.numel())
            for b, x in zip(rows(out, leaves), leaves, strict=True)
        ]
        jacobian[first : first + out.numel()] = torch.cat(blocks, 1).numpy()
        first += out.numel()
    return jacobian


def evaluated(
    f: Callable[..., Any], args: tuple[Any, ...], argnums: int | tuple[int, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves of the outputs, and fresh leaves of the arguments behind them."""
    numbers = argnums if isinstance(argnums, tuple) else (argnums,)
    arguments = list(args)
    for k in numbers:
        arguments[k] = pytree.tree_map(lambda t: t.detach().clone().requires_grad_(), arguments[k])
    outputs = [o for o in pytree.tree_leaves(f(*arguments)) if isinstance(o, Tensor)]
    return outputs, [x for k in numbers for x in pytree.tree_leaves(arguments[k])]


def elsewhere(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Other floating-point arguments from the same range: shuffled, each element changed a bit."""

    def another(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        shuffled = t.reshape(-1)[torch.randperm(t.numel())].reshape(t.shape)
        return shuffled * (0.8 + 0.4 * torch.rand_like(t))

    return tuple(pytree.tree_map(another, a) for a in args)


def check(
    f: Callable[..., Any],
    *args: Any,
    argnums: int | tuple[int, ...] = 0,
    exact: bool = True,
    points: int = 3,
) -> np.ndarray:
    """Checks the patterns of a function and of its graph against Jacobians at several points.

    Sound: what is nonzero somewhere is in the pattern, and a constant is that number everywhere.
    Exact (if asked for): what is in the pattern is nonzero somewhere; no operation without rule.

    Args:
        f: The function; what it returns is differentiated.
        *args: Its arguments; float64 tensors among them are varied.
        argnums: Arguments to differentiate.
        exact: Whether the pattern must have nothing that is zero at all points.
        points: Number of points.

    Returns:
        The global pattern.
    """
    places = [args, *(elsewhere(args) for _ in range(points - 1))]
    jacobians = [numeric(f, *place, argnums=argnums) for place in places]
    derivative, interpretation = interpreted(f, *args, argnums=argnums)
    pattern = dense_pattern(derivative, interpretation)
    for jacobian in jacobians:
        agrees(pattern, jacobian)
    local = pattern_of(f, *args, argnums=argnums, scope="local")
    agrees(local, jacobians[0])
    if exact:
        assert not interpretation.assumed, interpretation.assumed
        somewhere = np.any([j != 0 for j in jacobians], axis=0)
        assert not ((pattern != 0) & ~somewhere).any(), excess(pattern, somewhere)
        assert not ((local != 0) & ~somewhere).any(), excess(local, somewhere)
    return pattern


def agrees(pattern: np.ndarray, jacobian: np.ndarray) -> None:
    """Law: structural zeros are zero, and constants are what they say."""
    assert pattern.shape == jacobian.shape, (pattern.shape, jacobian.shape)
    missed = (jacobian != 0) & (pattern == 0)
    assert not missed.any(), f"not in the pattern: {np.argwhere(missed)[:5].tolist()}"
    known = ~np.isnan(pattern)
    np.testing.assert_allclose(pattern[known], jacobian[known], rtol=1e-9, atol=1e-12)


def excess(pattern: np.ndarray, somewhere: np.ndarray) -> str:
    """Where a pattern has more than it needs."""
    more = (pattern != 0) & ~somewhere
    return f"over-dense: {int(more.sum())} entries, at {np.argwhere(more)[:5].tolist()}"


def known(pattern: np.ndarray) -> bool:
    """Whether every entry is a number."""
    return not np.isnan(pattern).any()
