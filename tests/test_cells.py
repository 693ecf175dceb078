"""Which values one loop computes: laws of every way to divide a program into loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from accumulating import plan_of, run
from benchmarks.workloads import build
from laws import oracle_jacobian, quiet, same, value
from test_accumulate import PROBLEMS
from test_kernel import cache, kernel_of  # noqa: F401
from torchjac.compiler.codegen import build as source_build
from torchjac.compiler.codegen import schedule as loops
from torchjac.compiler.codegen.fusion import Edge, FusionGroups, FusionPolicy, number_rows
from torchjac.compiler.codegen.granularity import lower_program
from torchjac.compiler.codegen.scalar_ir import Deployment, Domain, IndexMap
from torchjac.compiler.native import jacobian_of
from torchjac.errors import PlanRefused

Function = Callable[..., Any]
MESHES = ["finite_volume(5, 4)", "finite_volume(7, 6)", "bundle_full(3, 7, 20)", "nbody(7)"]


def forced(monkeypatch: pytest.MonkeyPatch, ties: FusionPolicy) -> None:
    """Programs are divided in one way only, however many loops that makes."""
    monkeypatch.setattr(loops, "_MAX_KINDS", 10**6)
    monkeypatch.setattr(
        source_build, "schedule", lambda scalars: loops._Scheduler(scalars, ties).program()
    )


@pytest.mark.parametrize("ties", ["all", "even", "none"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_problems(monkeypatch: pytest.MonkeyPatch, name: str, ties: FusionPolicy) -> None:
    """What is computed together changes nothing of what it is."""
    forced(monkeypatch, ties)
    f, shape = PROBLEMS[name]
    try:
        plan, _ = plan_of(f, value(*shape))
        plan = kernel_of(plan, f, value(*shape))
    except PlanRefused:
        return  # it has no kernel in any way
    y = value(*shape, seed=1)
    with quiet():
        same(run(plan, f, y), oracle_jacobian(f)(y))


@pytest.mark.parametrize("ties", ["all", "even", "none"])
@pytest.mark.parametrize("name", MESHES)
def test_meshes(monkeypatch: pytest.MonkeyPatch, name: str, ties: FusionPolicy) -> None:
    forced(monkeypatch, ties)
    w = build(name)
    inputs = w.make(0)
    argnums = w.argnums
    plan, _ = plan_of(w.f, *inputs, argnums=argnums)
    plan = kernel_of(plan, w.f, *inputs)
    other = w.make(1)
    same(run(plan, w.f, *other, argnums=argnums), oracle_jacobian(w.f, argnums)(*other))


def test_faces_of_a_mesh() -> None:
    """Everything of a face is in one loop, for the block that it adds to J."""
    w = build("finite_volume(20, 15)")
    plan, _ = plan_of(w.f, *w.make(0), layout=torch.sparse_csr)
    loop_count = min(
        (
            len(loops.schedule(lower_program([jacobian_of(p)], None, Deployment.PROCESS)).loops)
            for p in plan.programs
        ),
    )
    assert loop_count < 30


def domain(count: int) -> Domain:
    return Domain(count)


class TestCells:
    """Lanes that are tied."""

    def test_even(self) -> None:
        """Three corners of each face, in whatever order."""
        faces, corners = domain(4), domain(12)
        cells = FusionGroups([faces, corners], "even")
        places = torch.arange(4).repeat(3).numpy()
        edge = Edge(corners, faces, IndexMap(places), {0})
        assert edge.is_even
        assert cells.fuse(edge)
        assert (cells.of(corners, torch.arange(12).numpy()) == cells.of(faces, places)).all()

    @pytest.mark.parametrize(
        ("places", "tied"),
        [([0, 1, 2, 3], True), ([3, 1, 0, 2], True), ([0, 0, 1, 2], False), ([0, 1, 2], False)],
        ids=str,
    )
    def test_what_is_not_even(self, places: list[int], tied: bool) -> None:
        """Lanes that are alone come to cells that get as many each; others stay apart."""
        faces, rest = domain(4), domain(len(places))
        cells = FusionGroups([faces, rest], "even")
        edge = Edge(rest, faces, IndexMap(torch.tensor(places).numpy()), {0})
        assert cells.fuse(edge) is tied

    def test_no_cells_are_merged(self) -> None:
        """An entry of J that two faces add to does not make one cell of them."""
        faces, corners, entries = domain(2), domain(4), domain(2)
        cells = FusionGroups([faces, corners, entries], "even")
        every: Callable[..., Any] = lambda *p: IndexMap(torch.tensor(p).numpy())  # noqa: E731
        assert cells.fuse(Edge(corners, faces, every(0, 0, 1, 1), {0}))
        assert cells.fuse(Edge(entries, faces, every(0, 1), {0}))
        assert not cells.fuse(Edge(entries, corners, every(2, 0), {0}))

    def test_too_large(self) -> None:
        """One value that everything takes is not computed with everything."""
        one, many = domain(2), domain(400)
        cells = FusionGroups([one, many], "all")
        places = torch.arange(400).remainder(2).numpy()
        assert not cells.fuse(Edge(many, one, IndexMap(places), {0}))


def test_a_value_of_other_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken from neighbours and from itself, kept or computed again."""
    forced(monkeypatch, "even")
    index = torch.tensor([1, 2, 3, 0, 2, 3, 0, 1])

    def f(x: Tensor) -> Tensor:
        y = (x.sin() * x.exp()).tanh()
        z = y[index].view(4, 2).prod(-1) * y
        return z + z.roll(1) * x

    plan, _ = plan_of(f, value(4))
    plan = kernel_of(plan, f, value(4))
    y = value(4, seed=2)
    same(run(plan, f, y), oracle_jacobian(f)(y))


def test_rows_whose_sums_collide() -> None:
    """Two rows with the same sum of products are still two."""
    a, b = (int(w) for w in np.random.default_rng(0).integers(1, 2**62, 2))
    rows = np.array([[b, 0], [0, a], [b, 0], [1, 1]])
    numbers = number_rows(rows)
    assert numbers[0] == numbers[2]
    assert len(set(numbers.tolist())) == 3
