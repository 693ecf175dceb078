"""Sparse results: rows and columns that share no entry share a pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torchjac
from laws import oracle, oracle_jacobian, same, value
from torchjac.passes.coloring import column_groups, row_groups
from torchjac.sparsity.pattern import user_pattern
from torchjac.testing import force_plan


def heat(u: Tensor) -> Tensor:
    """A reaction on a line of cells."""
    padded = F.pad(u, (1, 1))
    return padded[2:] - 2 * u + padded[:-2] + u**3


def wide(x: Tensor) -> Tensor:
    """One dense row beneath a diagonal: few columns share a pass."""
    return torch.cat([x.exp(), (x**2).sum()[None]])


def tall(x: Tensor) -> Tensor:
    """Many rows of few columns."""
    return (torch.linspace(0, 1, 200, dtype=x.dtype)[:, None] * x.sin()).reshape(-1)


def mixed(args: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Two outputs of two inputs, one block of which is empty."""
    return args["a"] * 2, args["a"].sum() * args["b"].sin()


CASES: dict[str, tuple[Callable[..., Any], Any]] = {
    "heat": (heat, value(40)),
    "wide": (wide, value(40)),
    "tall": (tall, value(3)),
    "mixed": (mixed, {"a": value(30), "b": value(20)}),
    "dense": (lambda x: x / x.norm(), value(20)),
    "empty rows": (lambda x: torch.cat([x[:3] * 2, x.detach()]), value(6)),
    "scalar": (lambda x: (x**2).sum(), value(6)),
    "matrix": (lambda x: x.softmax(1), value(8, 4)),
}
LAYOUTS = [torch.sparse_csr, torch.sparse_coo, scipy.sparse.csr_array, scipy.sparse.coo_array]


def dense(tree: Any) -> Any:
    """Every matrix as a dense tensor."""

    def convert(block: Any) -> Tensor:
        if isinstance(block, Tensor):
            return block.to_dense()
        return torch.from_numpy(block.toarray())

    if isinstance(tree, (tuple, list)):
        return type(tree)(dense(t) for t in tree)
    if isinstance(tree, dict):
        return {k: dense(t) for k, t in tree.items()}
    return convert(tree)


def flat(expected: Any, f: Callable[..., Any], x: Any) -> Any:
    """The oracle's blocks as matrices."""
    if isinstance(expected, dict):
        return {k: flat(v, f, x[k]) for k, v in expected.items()}
    if isinstance(expected, (tuple, list)):
        return type(expected)(flat(v, f, x) for v in expected)
    return expected.reshape(expected.numel() // max(x.numel(), 1), x.numel())


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda k: getattr(k, "__name__", str(k)))
@pytest.mark.parametrize("name", CASES)
def test_function(name: str, layout: Any) -> None:
    """Equal to the row loop; a second call, from what was remembered, as well."""
    f, x = CASES[name]
    expected = flat(oracle_jacobian(f)(x), f, x)
    jacobian = torchjac.jacobian(f, layout=layout)
    for _ in range(3):
        same(dense(jacobian(x)), expected)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("chunk", [1, 2, 1000])
@pytest.mark.parametrize("name", CASES)
def test_every_plan(name: str, mode: Any, chunk: int) -> None:
    f, x = CASES[name]
    with force_plan(mode, chunk):
        jacobian = torchjac.jacobian(f, layout=torch.sparse_csr)(x)
    same(dense(jacobian), flat(oracle_jacobian(f)(x), f, x))


def test_graph() -> None:
    x = value(3000).requires_grad_()
    y = heat(x)
    jacobian = torchjac.jac(y, x, layout=torch.sparse_csr)
    record = torchjac.last_run()
    assert record is not None
    assert record.engine == "color"
    assert record.pattern == f"{3 * 3000 - 2} nonzeros, local"
    assert record.passes == 1
    weights = value(3000, seed=4)
    same(jacobian @ weights, torch.func.jvp(heat, (x.detach(),), (weights,))[1])


def test_small_graphs_are_not_traced() -> None:
    x = value(4).requires_grad_()
    jacobian = torchjac.jac(heat(x), x, layout=torch.sparse_csr)
    record = torchjac.last_run()
    assert record is not None
    assert record.engine == "plain"
    same(jacobian.to_dense(), oracle(heat(x), x))


def test_the_same_entries_at_every_point() -> None:
    """Numeric zeros are stored: a solver's symbolic factorization can be kept."""
    jacobian = torchjac.jacobian(lambda x: x * x.flip(0), layout=torch.sparse_csr)
    zero, one = jacobian(torch.zeros(6)), jacobian(torch.ones(6))
    assert torch.equal(zero.col_indices(), one.col_indices())
    assert len(zero.values()) == 12


def test_passes_do_not_grow_with_the_size() -> None:
    for n in (50, 500):
        record = torchjac.jacobian(heat, layout=torch.sparse_csr).explain(value(n))
        assert record.engine == "color"
        assert record.passes == 1
        assert record.chunk == 3


def test_batch_is_block_diagonal() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh()).double()
    jacobian = torchjac.jacobian(net, batched=True, layout=torch.sparse_csr)
    result = jacobian(value(5, 3))
    blocks = torchjac.jacobian(net, batched=True)(value(5, 3))
    same(result.to_dense(), torch.block_diag(*blocks))
    assert torchjac.last_run() is not None


def test_coupled_batch_is_an_error() -> None:
    with pytest.raises(torchjac.CoupledBatchError):
        torchjac.jacobian(lambda x: x - x.mean(0), batched=True, layout=torch.sparse_csr)(
            value(5, 3)
        )


def test_control_flow_on_values() -> None:
    """What cannot be captured gives right results all the same."""

    def f(x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x.flip(0) ** 2

    jacobian = torchjac.jacobian(f, layout=torch.sparse_csr)
    for x in (value(5).abs(), -value(5).abs()):
        same(jacobian(x).to_dense(), oracle_jacobian(f)(x))


class TestUserPattern:
    def test_formats(self) -> None:
        x = value(12)
        full = torchjac.jacobian(heat).pattern(x)
        for known in (
            full,
            full.to_scipy(),
            full.to_scipy().tocoo(),
            full.to_dense(),
            full.to_dense().to_sparse_csr(),
            full.to_dense().numpy(),
        ):
            jacobian = torchjac.jacobian(heat, layout=torch.sparse_csr, pattern=known)
            same(jacobian(x).to_dense(), oracle_jacobian(heat)(x))

    def test_more_than_needed_is_fine(self) -> None:
        pattern = np.ones((12, 12))
        jacobian = torchjac.jacobian(heat, layout=torch.sparse_csr, pattern=pattern)
        same(jacobian(value(12)).to_dense(), oracle_jacobian(heat)(value(12)))

    @pytest.mark.parametrize("entry", [0, 7, 33])
    def test_a_missing_entry_is_detected(self, entry: int) -> None:
        table = torchjac.jacobian(heat).pattern(value(12)).to_scipy()
        table.data[entry] = 0
        table.eliminate_zeros()
        jacobian = torchjac.jacobian(heat, layout=torch.sparse_csr, pattern=table)
        with pytest.raises(torchjac.PatternMissed, match="misses a nonzero"):
            jacobian(value(12))

    def test_a_missing_entry_of_a_graph_is_detected(self) -> None:
        x = value(12).requires_grad_()
        with pytest.raises(torchjac.PatternMissed, match="inputs"):
            torchjac.jac(heat(x), x, layout=torch.sparse_csr, pattern=np.eye(12))

    def test_wrong_shape(self) -> None:
        jacobian = torchjac.jacobian(heat, layout=torch.sparse_csr, pattern=np.eye(3))
        with pytest.raises(torchjac.PatternError, match=r"expected shape \(12, 12\), got \(3, 3\)"):
            jacobian(value(12))

    def test_no_pattern_at_all(self) -> None:
        jacobian = torchjac.jacobian(heat, layout=torch.sparse_csr, pattern="banded")
        with pytest.raises(torchjac.ArgumentError, match="str"):
            jacobian(value(12))

    def test_dense_layout(self) -> None:
        with pytest.raises(torchjac.ArgumentError, match="sparse"):
            torchjac.jacobian(heat, pattern=np.eye(12))

    def test_half_precision_inside_is_no_missing_entry(self) -> None:
        """Rounding makes products differ; what reaches a column from outside does so exactly."""

        def f(x: Tensor) -> Tensor:
            return (x.half() * x.half().roll(1)).float().sin()

        x = torch.rand(9)
        pattern = torchjac.jacobian(f).pattern(x)
        for known in (pattern, pattern.to_scipy()):
            jacobian = torchjac.jacobian(f, layout=torch.sparse_csr, pattern=known)
            same(jacobian(x).to_dense(), oracle_jacobian(f)(x), rtol=1e-2, atol=1e-2)

    def test_a_clipped_gradient_is_no_missing_entry(self) -> None:
        """A backward that is not linear agrees with no product, yet its pattern may be right."""

        class Clipped(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x * 1

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                return grad.clamp(-1, 1)

        jacobian = torchjac.jacobian(Clipped.apply, layout=torch.sparse_csr, pattern=np.eye(4))
        with pytest.warns(torchjac.PatternWarning, match="not linear"):
            result = jacobian(value(4))
        same(result.to_dense(), torch.eye(4, dtype=torch.float64))

    def test_rows_that_change_each_other_are_evaluated_apart(self) -> None:
        class Normed(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x * 1

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                return grad / grad.norm().clamp(min=1)

        jacobian = torchjac.jacobian(Normed.apply, layout=torch.sparse_csr, pattern=np.eye(4))
        with pytest.warns(torchjac.PatternWarning):
            result = jacobian(value(4))
        same(result.to_dense(), torch.eye(4, dtype=torch.float64))

    def test_opaque_function(self) -> None:
        """A function that cannot be captured, and whose pattern the user knows."""

        def f(x: Tensor) -> Tensor:
            return heat(x) if float(x.detach().sum()) < 1e9 else x

        pattern = torchjac.jacobian(heat).pattern(value(30)).to_scipy()
        jacobian = torchjac.jacobian(f, layout=torch.sparse_csr, pattern=pattern)
        same(jacobian(value(30)).to_dense(), oracle_jacobian(heat)(value(30)))
        record = torchjac.last_run()
        assert record is not None
        assert record.passes == 1


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 12),
    st.integers(0, 12),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
def test_groups_are_structurally_orthogonal(m: int, n: int, density: float, seed: int) -> None:
    """No column has two entries of one group of rows; every row with an entry has a group."""
    table = np.random.default_rng(seed).random((m, n)) < density
    pattern = user_pattern(table, [(m,)], [(n,)])
    for groups, matrix in ((row_groups(pattern), table), (column_groups(pattern), table.T)):
        assert ((groups.group_of >= 0) == matrix.any(1)).all()
        for group in range(groups.count):
            assert (matrix[groups.group_of == group].sum(0) <= 1).all()
        assert groups.lower_bound <= groups.count or not matrix.any()
        assert groups.count == groups.group_of.max(initial=-1) + 1


def test_more_than_a_word_of_groups() -> None:
    """Colors beyond the first 64 need more room."""
    rng = np.random.default_rng(0)
    table = rng.random((400, 60)) < 0.25
    table[:, 0] = rng.random(400) < 0.4
    pattern = user_pattern(table, [(400,)], [(60,)])
    groups = row_groups(pattern)
    assert groups.count > 128
    for group in range(groups.count):
        assert (table[groups.group_of == group].sum(0) <= 1).all()


class TestCompiled:
    """Sparse results of compiled code, through the same assembler as those of passes."""

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_each_block_has_the_dtype_and_the_precision_of_its_input(self, layout: Any) -> None:
        def f(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a[:-1].double() * b[1:]).sin()

        a, b = value(6).float(), value(6)
        J = torchjac.jacobian(f, (0, 1), layout=layout, compile=True)
        want = torchjac.jacobian(f, (0, 1))(a, b)
        for _ in range(3):
            same(dense(J(a, b)), want)  # dtypes as well
        assert J.explain(a, b).engine == "accumulate"

    @pytest.mark.parametrize("layout", [scipy.sparse.csr_array, scipy.sparse.csc_matrix])
    def test_scipy_results_take_the_fast_path_and_share_no_memory(self, layout: Any) -> None:
        x = value(9)
        J = torchjac.jacobian(heat, layout=layout, compile=True)
        for _ in range(30):
            J(x)
        if J.explain(x).mode.endswith("kernel"):
            assert J._dispatcher.fast_path is not None
        first = J(x)
        assert type(first) is layout
        first.data[:] = 0
        first.indices[:] = 0
        first.indptr[:] = 0
        same(torch.as_tensor(J(x).toarray()), torchjac.jacobian(heat)(x))
