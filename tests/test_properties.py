"""Random programs, random arguments, every plan and budget: J equals the row loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torchjac
from laws import PLAN_IDS, PLANS, oracle, oracle_jacobian, quiet, same, under_plan
from programs import OPS, PROGRAMS, Program, Step
from torchjac.testing import finite_differences
from torchjac.testing import oracle as shipped_oracle
from torchjac.testing import oracle_jacobian as shipped_oracle_jacobian

# Some laws are run on fewer programs; the profile (conftest) says how many that is.
HALF = settings(max_examples=settings().max_examples // 2)
BUDGETS = st.sampled_from([None, 1, 512, 4096, 1 << 20])


@st.composite
def calls(draw: st.DrawFn) -> tuple[Program, int | tuple[int, ...]]:
    """A program and some argnums that fit it."""
    program = draw(PROGRAMS)
    n = len(program.shapes)
    order = draw(st.permutations(range(n)))
    several = tuple(order[: draw(st.integers(1, n))])
    return program, draw(st.sampled_from([several, several[0], several[0] - n]))


@given(calls(), BUDGETS)
def test_jacobian_equals_the_row_loop(call: Any, budget: int | None) -> None:
    """The planner's own choice under any budget; the value comes from the same run."""
    program, argnums = call
    inputs = program.inputs()
    f = torchjac.jacobian(program, argnums, memory_budget=budget)
    with quiet():
        out, J = f.value_and(*inputs)
        # Later calls may try other plans: the planner measures what it predicted.
        again = [f(*inputs) for _ in range(3)]
    expected = oracle_jacobian(program, argnums)(*inputs)
    for got in (J, *again):
        same(got, expected)
    same(out, program(*inputs))


@given(calls(), BUDGETS, st.booleans())
def test_jac_equals_the_row_loop(call: Any, budget: int | None, create_graph: bool) -> None:
    """Of the graph, with the inputs in any order and number; intermediates are inputs too."""
    program, argnums = call
    leaves = [x.requires_grad_() for x in program.inputs()]
    nums = argnums if isinstance(argnums, tuple) else (argnums,)
    inputs = [leaves[i].sin() if k % 2 else leaves[i] for k, i in enumerate(nums)]
    for i, x in zip(nums, inputs, strict=True):
        leaves[i] = x
    outputs = program(*leaves)
    with quiet():
        got = torchjac.jac(
            outputs, inputs, allow_unused=True, create_graph=create_graph, memory_budget=budget
        )
    same(got, oracle(outputs, inputs))


@pytest.mark.parametrize(("mode", "chunk"), PLANS, ids=PLAN_IDS)
@HALF
@given(calls(), BUDGETS)
def test_every_plan_equals_the_row_loop(
    mode: str, chunk: int, call: Any, budget: int | None
) -> None:
    """A plan that runs gives the same J; one that cannot says why."""
    program, argnums = call
    inputs = program.inputs()
    f = torchjac.jacobian(program, argnums, memory_budget=budget)
    got = under_plan(mode, chunk, lambda: f(*inputs))
    if got is not None:
        same(got, oracle_jacobian(program, argnums)(*inputs))


@pytest.mark.parametrize(("mode", "chunk"), PLANS, ids=PLAN_IDS)
def test_every_plan_runs_where_nothing_hinders_it(mode: str, chunk: int) -> None:
    """Smooth code along the last axis: no plan has a reason to refuse."""

    def f(x: Tensor) -> Tensor:
        return x.sin().softmax(-1).cumsum(-1)

    x = torch.linspace(-1, 1, 3, dtype=torch.float64)
    got = under_plan(mode, chunk, lambda: torchjac.jacobian(f)(x))
    assert got is not None
    same(got, oracle_jacobian(f)(x))
    assert torchjac.last_run().mode == mode
    assert torchjac.last_run().chunk == min(chunk, 3)


@HALF
@given(calls(), st.sampled_from([torch.sparse_csr, torch.sparse_coo]), BUDGETS)
def test_sparse_layouts(call: Any, layout: torch.layout, budget: int | None) -> None:
    """The 2-D matrix of each block, equal to the dense one."""
    program, argnums = call
    inputs = program.inputs()
    with quiet():
        J = torchjac.jacobian(program, argnums, layout=layout, memory_budget=budget)(*inputs)
    blocks = pytree.tree_leaves(oracle_jacobian(program, argnums)(*inputs))
    outs = program(*inputs)
    per_out = len(blocks) // len(outs)
    for k, (got, want) in enumerate(zip(pytree.tree_leaves(J), blocks, strict=True)):
        rows = outs[k // per_out].numel()
        columns = want.numel() // rows if rows else got.shape[1]
        assert got.layout == layout
        same(got.to_dense(), want.reshape(rows, columns))


@HALF
@given(calls())
def test_second_derivatives(call: Any) -> None:
    """The gradient of a function of J equals the one through the row loop."""
    program, _ = call
    leaves = tuple(x.requires_grad_() for x in program.inputs())
    argnums = tuple(range(len(leaves)))

    def gradient(J: Any) -> list[Tensor]:
        loss = sum(
            (b.sin().sum() for b in pytree.tree_leaves(J)), torch.zeros((), dtype=torch.float64)
        )
        if not loss.requires_grad:
            return [torch.zeros_like(x) for x in leaves]
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]

    with quiet():
        got = torchjac.jacobian(program, argnums, create_graph=True)(*leaves)
    expected = oracle(program(*leaves), leaves, create_graph=True)
    same(gradient(got), gradient(expected))


@HALF
@given(calls())
def test_the_shipped_oracle_is_the_row_loop(call: Any) -> None:
    """torchjac.testing's oracle, written apart from the one in these tests, agrees with it."""
    program, argnums = call
    leaves = tuple(x.requires_grad_() for x in program.inputs())
    outputs = program(*leaves)
    same(shipped_oracle(outputs, leaves), oracle(outputs, leaves))
    same(
        shipped_oracle_jacobian(program, argnums)(*program.inputs()),
        oracle_jacobian(program, argnums)(*program.inputs()),
    )


@pytest.mark.parametrize("op", sorted(set(OPS) - {"constant_scale"}))
def test_the_oracle_against_finite_differences(op: str) -> None:
    """A sample of programs by numbers alone: the oracle itself is checked."""
    program = Program(((3, 2), (2,)), (Step("sin", 0, 1, 1, 2), Step(op, 0, 1, 1, 2)), (0,))
    inputs = program.inputs()
    for k in (0, 1):
        (want,) = oracle_jacobian(program, k)(*inputs)
        got = finite_differences(lambda *xs: program(*xs)[0], k)(*inputs)
        same(got, want, rtol=1e-4, atol=1e-5)
