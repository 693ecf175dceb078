"""What a pattern says: entries, constants, blocks, lanes, blame, pictures, files."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor

import torchjac
from laws import oracle_jacobian, value


def heat(u: Tensor) -> Tensor:
    """A reaction on a line of cells."""
    padded = F.pad(u, (1, 1))
    return padded[2:] - 2 * u + padded[:-2] + u**3


def two_by_two(args: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Two outputs of two inputs, one block of which is empty."""
    return args["a"] * 2, args["a"].sum() * args["b"]


@pytest.fixture
def band() -> torchjac.Pattern:
    return torchjac.jacobian(heat).pattern(value(7))


class TestEntries:
    def test_counts(self, band: torchjac.Pattern) -> None:
        assert band.shape == (7, 7)
        assert band.nnz == 7 + 2 * 6
        assert band.density == pytest.approx(19 / 49)
        assert band.bandwidth == (1, 1)
        assert band.row_counts.tolist() == [2, 3, 3, 3, 3, 3, 2]
        assert band.column_counts.tolist() == [2, 3, 3, 3, 3, 3, 2]

    def test_constants_are_the_entries(self, band: torchjac.Pattern) -> None:
        numbers = oracle_jacobian(heat)(value(7, seed=5)).numpy()
        entries = numbers[band.rows, band.columns]
        assert (entries[band.constant] == band.values[band.constant]).all()
        assert band.constant.sum() == 12  # off the diagonal
        assert not band.constant[band.rows == band.columns].any()

    def test_linear_function_is_constant_throughout(self) -> None:
        matrix = value(3, 4)
        pattern = torchjac.jacobian(lambda x: matrix @ x).pattern(value(4))
        assert pattern.constant.all()
        assert np.array_equal(pattern.values.reshape(3, 4), matrix.numpy())

    def test_blocks_by_leaf(self) -> None:
        pattern = torchjac.jacobian(two_by_two).pattern({"a": value(3), "b": value(2)})
        assert pattern.blocks.tolist() == [[3, 0], [6, 2]]
        rows, columns, _ = pattern.block(1, 1)
        assert rows.tolist() == [0, 1]
        assert columns.tolist() == [0, 1]

    def test_scipy_and_dense_agree(self, band: torchjac.Pattern) -> None:
        assert isinstance(band.to_scipy(), scipy.sparse.csr_array)
        assert np.array_equal(band.to_scipy().toarray() != 0, band.to_dense().numpy())

    @pytest.mark.parametrize("shape", [(0,), (1,), (0, 3), ()])
    def test_small_shapes(self, shape: tuple[int, ...]) -> None:
        pattern = torchjac.jacobian(lambda x: x.sin()).pattern(torch.rand(shape))
        size = int(np.prod(shape))
        assert pattern.nnz == size
        assert pattern.shape == (size, size)
        assert str(pattern)

    def test_unused_and_detached_inputs_have_no_entries(self) -> None:
        pattern = torchjac.jacobian(lambda x, y: x.detach() * y, (0, 1)).pattern(value(3), value(3))
        assert pattern.blocks.tolist() == [[0, 3]]

    def test_integer_arguments_are_constants(self) -> None:
        index = torch.tensor([2, 0])
        pattern = torchjac.jacobian(lambda x, i: x[i]).pattern(value(3), index)
        assert pattern.to_dense().tolist() == [[False, False, True], [True, False, False]]

    def test_hessian(self) -> None:
        pattern = torchjac.hessian(lambda x: (x[1:] * x[:-1] ** 2).sum()).pattern(value(6))
        expected = torch.func.hessian(lambda x: (x[1:] * x[:-1] ** 2).sum())(value(6)) != 0
        assert torch.equal(pattern.to_dense(), expected)

    def test_long_recurrence(self) -> None:
        def f(x: Tensor) -> Tensor:
            h = x[0] * 0 + 1
            for i in range(400):
                h = torch.tanh(h * 0.5 + x[i % 4])
            return h

        assert torchjac.jacobian(f).pattern(value(4)).nnz == 4
        x = value(4).requires_grad_()
        assert torchjac.pattern(f(x), x).nnz == 4

    def test_millions_of_rows_cost_memory_of_their_entries(self) -> None:
        n = 10**6
        pattern = torchjac.jacobian(heat).pattern(torch.zeros(n, dtype=torch.float64))
        assert pattern.nnz == 3 * n - 2

    def test_a_dense_pattern_too_large_to_write_is_an_error(self) -> None:
        with pytest.raises(torchjac.PatternError, match="sum"):
            torchjac.jacobian(lambda x: x / x.sum()).pattern(torch.ones(40_000))


class TestScope:
    def test_branch_on_a_value_is_local_and_said(self) -> None:
        def f(x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x.flip(0)

        with pytest.warns(torchjac.LocalPatternWarning, match="these values only"):
            up = torchjac.jacobian(f).pattern(torch.ones(3))
        with pytest.warns(torchjac.LocalPatternWarning):
            down = torchjac.jacobian(f).pattern(-torch.ones(3))
        assert up.scope == down.scope == "local"
        assert up.reason
        assert not up.covers(down)

    def test_asking_leaves_no_trace(self) -> None:
        """Statistics, random numbers: as before."""
        norm = torch.nn.BatchNorm1d(3)
        state = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
        before = torch.random.get_rng_state()
        torchjac.jacobian(lambda x: F.dropout(norm(x))).pattern(value(4, 3).float())
        assert torch.equal(torch.random.get_rng_state(), before)
        for name, tensor in norm.state_dict().items():
            assert torch.equal(tensor, state[name])

    def test_cached_helpers_keep_real_tensors(self) -> None:
        @functools.cache
        def grid(n: int) -> Tensor:
            return torch.linspace(0, 1, n, dtype=torch.float64)

        torchjac.jacobian(lambda x: x * grid(5)).pattern(value(5))
        assert type(grid(5)) is Tensor
        assert grid(5)[4].item() == 1

    def test_data_written_behind_the_graph(self) -> None:
        """What `.data` changes leaves no trace: such a function is not taken to be known."""

        def f(x: Tensor) -> Tensor:
            z = torch.zeros(3, dtype=x.dtype)
            z.data = x.detach()
            return x * z

        with pytest.warns(torchjac.LocalPatternWarning, match="data"):
            pattern = torchjac.jacobian(f).pattern(value(3))
        assert pattern.nnz == 3

        flag = torch.zeros(1, dtype=torch.float64)

        def g(x: Tensor) -> Tensor:
            flag.data.copy_(x[:1])
            return x * 2 if flag.item() > 0 else x.flip(0)

        with pytest.warns(torchjac.LocalPatternWarning):
            assert torchjac.jacobian(g).pattern(-torch.ones(3).double()).values.max() == 1

    def test_numpy_in_a_backward_is_no_zero(self) -> None:
        class Doubled(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x * 2

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                return torch.from_numpy(grad.detach().numpy() * 2)

        x = value(3).requires_grad_()
        try:
            pattern = torchjac.pattern(Doubled.apply(x), x)
        except torchjac.CaptureRefused:
            return
        assert pattern.to_dense().diagonal().all()

    def test_an_operation_without_a_rule_is_reported(self) -> None:
        class Odd(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x * 1

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                return grad.cos()  # not linear in the cotangent

        pattern = torchjac.jacobian(Odd.apply).pattern(value(3))
        assert pattern.nnz == 9
        assert "cos" in pattern.assumed[0]

    def test_a_known_mask_is_no_branch(self) -> None:
        mask = torch.tensor([True, False, True])

        def f(x: Tensor) -> Tensor:
            y = x * 1
            y[mask] = 0
            return torch.cat([x[mask], y, x.expand(2, 3)[:, mask].reshape(-1)])

        pattern = torchjac.jacobian(f).pattern(value(3))
        assert pattern.scope == "global"
        assert torch.equal(pattern.to_dense(), oracle_jacobian(f)(value(3)) != 0)


class TestLanes:
    def test_batch_of_a_network(self) -> None:
        net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
        pattern = torchjac.jacobian(net).pattern(torch.rand(6, 3))
        assert pattern.batched
        assert [(k.output_axis, k.input_axis) for k in pattern.lanes] == [(0, 0)]

    def test_coupled_batch_is_none(self) -> None:
        pattern = torchjac.jacobian(lambda x: x - x.mean(0)).pattern(torch.rand(6, 3))
        assert not pattern.batched
        assert [(k.output_axis, k.input_axis) for k in pattern.lanes] == [(1, 1)]

    def test_axes_that_trade_places(self) -> None:
        pattern = torchjac.jacobian(lambda x: x.T.exp()).pattern(torch.rand(2, 3))
        assert {(k.output_axis, k.input_axis) for k in pattern.lanes} == {(0, 1), (1, 0)}

    def test_every_leaf_counts(self) -> None:
        def f(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x * y, x.flip(0)

        pattern = torchjac.jacobian(f, (0, 1)).pattern(torch.rand(4), torch.rand(4))
        assert not pattern.batched


class TestBlame:
    def test_names_the_line_where_it_becomes_dense(self) -> None:
        def f(x: Tensor) -> Tensor:
            y = x.sin()
            z = y / y.norm()
            return z * x

        worst = torchjac.jacobian(f).pattern(value(9)).blame[0]
        line = f.__code__.co_firstlineno + 2
        assert worst.where == f"{__file__}:{line}"
        assert worst.growth > 5

    def test_worst_first(self) -> None:
        def f(x: Tensor) -> Tensor:
            return x.reshape(2, 50).softmax(1) + x.reshape(50, 2).softmax(1).reshape(2, 50)

        growths = [s.growth for s in torchjac.jacobian(f).pattern(value(100)).blame]
        assert growths == sorted(growths, reverse=True)
        assert growths[0] > 10

    def test_diagonal_has_nobody_to_blame(self) -> None:
        assert torchjac.jacobian(lambda x: x.exp()).pattern(value(9)).blame == ()

    def test_a_graph_names_its_autograd_nodes(self) -> None:
        x = value(9).requires_grad_()
        assert "Softmax" in str(torchjac.pattern(x.softmax(0), x).blame[0])


class TestPictures:
    def test_terminal(self, band: torchjac.Pattern) -> None:
        text = str(band)
        assert "7 x 7, 19 nonzeros" in text
        dots = sum(bin(ord(c) - 0x2800).count("1") for c in text if 0x2800 <= ord(c) < 0x2900)
        assert dots == 19

    def test_a_large_one_fits_the_terminal(self) -> None:
        pattern = torchjac.jacobian(heat).pattern(torch.zeros(5000))
        assert max(map(len, str(pattern).split("\n"))) <= 100

    def test_plot_is_saved(self, band: torchjac.Pattern, tmp_path: Path) -> None:
        axes = band.spy(tmp_path / "spy.png")
        assert (tmp_path / "spy.png").stat().st_size > 1000
        assert {t.get_text() for t in axes.get_legend().get_texts()} == {
            "depends on the input",
            "constant",
        }

    def test_plot_of_many_entries(self, tmp_path: Path) -> None:
        torchjac.jacobian(heat).spy(torch.zeros(9000), path=tmp_path / "spy.png")
        assert (tmp_path / "spy.png").exists()


class TestFiles:
    def test_round_trip(self, band: torchjac.Pattern, tmp_path: Path) -> None:
        band.save(tmp_path / "p.npz")
        loaded = torchjac.Pattern.load(tmp_path / "p.npz")
        assert loaded.covers(band)
        assert band.covers(loaded)
        assert (loaded.lanes, loaded.spreads) == (band.lanes, band.spreads)
        assert np.array_equal(loaded.values, band.values, equal_nan=True)

    def test_of_another_function(self, band: torchjac.Pattern, tmp_path: Path) -> None:
        band.save(tmp_path / "p.npz")
        loaded = torchjac.Pattern.load(tmp_path / "p.npz")
        other = torchjac.jacobian(lambda x: x[:3], layout=torch.sparse_csr, pattern=loaded)
        with pytest.raises(torchjac.PatternError, match=r"\(7,\).*\(3,\)"):
            other(value(7))

    @pytest.mark.parametrize("content", [b"", b"not a zip", None])
    def test_something_else(self, tmp_path: Path, content: bytes | None) -> None:
        path = tmp_path / "p.npz"
        if content is None:
            with path.open("wb") as file:
                np.savez(file, starts=np.zeros(3))
        else:
            path.write_bytes(content)
        with pytest.raises(torchjac.PatternError, match="not a saved pattern"):
            torchjac.Pattern.load(path)

    def test_entries_out_of_range(self, band: torchjac.Pattern, tmp_path: Path) -> None:
        band.columns[-1] = 99
        band.save(tmp_path / "p.npz")
        with pytest.raises(torchjac.PatternError, match="do not fit"):
            torchjac.Pattern.load(tmp_path / "p.npz")


def test_mistakes_are_the_same_as_for_the_jacobian() -> None:
    with pytest.raises(torchjac.DtypeError):
        torchjac.jacobian(lambda x: x.long()).pattern(value(3))
    with pytest.raises(torchjac.ArgumentError):
        torchjac.jacobian(lambda x: "text").pattern(value(3))
    with pytest.raises(torchjac.ArgumentError):
        torchjac.pattern("text", value(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torchjac.jacobian(lambda x: torch.ones(2)).pattern(value(3)).nnz == 0
