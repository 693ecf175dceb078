"""Convolution, pooling, interpolation: sound and exact, weights known where they are constant."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from patterns import check, dense_pattern, interpreted, known, pattern_of
from torchjac.linear.rules.convolve import window_table
from torchjac.linear.rules.probe import probe_matrix

F = torch.nn.functional
aten = torch.ops.aten


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


# Function, shape of the argument, shape of the kernel, parameters.
CONVOLUTIONS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "1d": (F.conv1d, (2, 2, 6), (3, 2, 3), {}),
    "1d-stride": (F.conv1d, (1, 2, 7), (2, 2, 3), {"stride": 2, "padding": 1}),
    "1d-dilation": (F.conv1d, (2, 1, 8), (2, 1, 3), {"dilation": 3, "padding": 2}),
    "1d-groups": (F.conv1d, (2, 4, 5), (6, 2, 2), {"groups": 2}),
    "1d-depthwise": (F.conv1d, (1, 3, 5), (3, 1, 2), {"groups": 3}),
    "1d-unbatched": (F.conv1d, (2, 5), (2, 2, 2), {}),
    "1d-same": (F.conv1d, (1, 1, 5), (1, 1, 3), {"padding": "same"}),
    "1d-pointwise": (F.conv1d, (2, 3, 4), (2, 3, 1), {}),
    "1d-long": (F.conv1d, (1, 1, 2), (1, 1, 3), {"padding": 2, "stride": 3}),
    "2d": (F.conv2d, (2, 2, 4, 5), (2, 2, 3, 2), {"padding": (1, 0)}),
    "2d-stride": (F.conv2d, (1, 2, 5, 4), (2, 2, 2, 3), {"stride": (2, 1), "padding": (0, 1)}),
    "2d-dilation": (F.conv2d, (1, 1, 5, 6), (2, 1, 2, 2), {"dilation": (2, 3)}),
    "2d-groups": (F.conv2d, (1, 4, 3, 3), (2, 2, 2, 2), {"groups": 2}),
    "3d": (F.conv3d, (1, 2, 3, 2, 3), (1, 2, 2, 1, 2), {"padding": (0, 1, 1), "stride": (1, 2, 1)}),
    "t1d": (F.conv_transpose1d, (2, 2, 4), (2, 3, 3), {}),
    "t1d-stride": (
        F.conv_transpose1d,
        (1, 2, 3),
        (2, 1, 3),
        {"stride": 3, "padding": 1, "output_padding": 2},
    ),
    "t1d-groups": (F.conv_transpose1d, (1, 4, 3), (4, 2, 2), {"groups": 2, "dilation": 2}),
    "t2d": (
        F.conv_transpose2d,
        (1, 2, 3, 2),
        (2, 2, 2, 3),
        {"stride": (2, 1), "padding": (1, 0), "output_padding": (1, 0)},
    ),
    "t3d": (F.conv_transpose3d, (1, 1, 2, 2, 1), (1, 2, 2, 1, 2), {"padding": (1, 0, 0)}),
}


def case(name: str) -> tuple[Callable[..., Tensor], Tensor, Tensor, Tensor]:
    f, image, kernel, parameters = CONVOLUTIONS[name]
    width = kernel[1] * parameters.get("groups", 1) if "t" in name.split("-")[0] else kernel[0]
    bias = floats(width)
    return lambda x, w, b: f(x, w, b, **parameters), floats(*image), floats(*kernel), bias


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_by_its_argument(name: str) -> None:
    """The kernel is captured: every weight is known."""
    f, x, w, b = case(name)
    assert known(check(lambda t: f(t, w, b), x))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_by_everything(name: str) -> None:
    f, x, w, b = case(name)
    pattern = check(f, x, w, b, argnums=(0, 1, 2))
    bias = pattern[:, x.numel() + w.numel() :]
    assert known(bias)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_by_its_kernel(name: str) -> None:
    """The argument is captured: the image is the weight."""
    f, x, w, _ = case(name)
    assert known(check(lambda k: f(x, k, None), w))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_zero_taps_are_no_entries(name: str) -> None:
    f, x, w, _ = case(name)
    w = w.clone()
    w.view(-1)[::2] = 0
    check(lambda t: f(t, w, None), x)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_second_derivatives(name: str) -> None:
    """Argument and kernel are linear operands of the backward pass's backward pass."""
    f, x, w, _ = case(name)

    def gradients(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        x, w = (t if t.requires_grad else t.detach().requires_grad_() for t in (x, w))
        return torch.autograd.grad((f(x, w, None) ** 3).sum(), (x, w), create_graph=True)

    check(gradients, x, w, argnums=(0, 1))


def test_stencil_in_a_kernel() -> None:
    """A Laplacian written as a convolution has the pattern of a Laplacian."""
    stencil = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=torch.float64)[None, None]
    pattern = check(lambda x: F.conv2d(x[None, None], stencil, padding=1), floats(5, 6))
    assert np.count_nonzero(pattern) == 5 * 30 - 2 * (5 + 6)
    assert set(np.unique(pattern)) == {-4.0, 0.0, 1.0}


def test_samples_and_unused_rows_stay_apart() -> None:
    """A batch is lanes, whatever is done to it afterwards."""
    w = floats(3, 2, 2)
    pattern = pattern_of(lambda x: torch.tanh(F.conv1d(x, w)), floats(3, 2, 4))
    block = pattern.reshape(3, 9, 3, 8)
    for i in range(3):
        for j in range(3):
            assert (block[i, :, j] != 0).any() == (i == j)


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch: int) -> None:
    w = floats(2, 1, 2)
    check(lambda x: F.conv1d(x, w), floats(batch, 1, 3))


def test_large_convolutions_are_bounded() -> None:
    """Where the products do not fit, samples still stay apart."""
    w = floats(64, 64, 3, 3).float()
    x = torch.zeros(2, 64, 48, 48)
    _, interpretation = interpreted(lambda t: F.conv2d(t, w, padding=1), x)
    (gradient,) = interpretation.gradients
    assert gradient is not None
    assert sum(0 if t.table is None else t.table.nnz for t in gradient.terms) < 2**27


Case = tuple[Callable[[Tensor], Tensor], tuple[int, ...]]
# Weights that no input changes.
FIXED: dict[str, Case] = {
    "avg1": (lambda x: F.avg_pool1d(x, 3, 2, 1), (1, 2, 7)),
    "avg2": (lambda x: F.avg_pool2d(x, (2, 3)), (2, 1, 4, 6)),
    "avg2-overlap": (lambda x: F.avg_pool2d(x, 3, 1, 1), (1, 1, 4, 3)),
    "avg2-unbatched": (lambda x: F.avg_pool2d(x, 2), (2, 4, 4)),
    "avg2-without-pad": (
        lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
        (1, 1, 4, 6),
    ),
    "avg2-divisor": (lambda x: F.avg_pool2d(x, 2, divisor_override=7), (1, 1, 4, 5)),
    "avg3": (lambda x: F.avg_pool3d(x, (1, 2, 2), (1, 1, 2), (0, 1, 0)), (1, 1, 2, 3, 4)),
    "adaptive1": (lambda x: F.adaptive_avg_pool1d(x, 3), (1, 2, 7)),
    "adaptive2": (lambda x: F.adaptive_avg_pool2d(x, (3, 2)), (2, 1, 5, 4)),
    "adaptive2-one": (lambda x: F.adaptive_avg_pool2d(x, 1), (1, 2, 3, 4)),
    "adaptive3": (lambda x: F.adaptive_avg_pool3d(x, (2, 1, 3)), (1, 1, 3, 2, 5)),
    "nearest1": (lambda x: F.interpolate(x, 7), (1, 2, 3)),
    "nearest2": (lambda x: F.interpolate(x, scale_factor=(2.0, 1.5)), (1, 1, 3, 4)),
    "nearest3": (lambda x: F.interpolate(x, (3, 2, 1)), (1, 1, 2, 3, 2)),
    "exact1": (lambda x: F.interpolate(x, 5, mode="nearest-exact"), (1, 1, 3)),
    "exact2": (lambda x: F.interpolate(x, (5, 2), mode="nearest-exact"), (1, 2, 3, 3)),
    "exact3": (lambda x: F.interpolate(x, (2, 3, 1), mode="nearest-exact"), (1, 1, 3, 2, 2)),
    "linear": (lambda x: F.interpolate(x, 8, mode="linear"), (2, 1, 5)),
    "linear-corners": (lambda x: F.interpolate(x, 9, mode="linear", align_corners=True), (1, 1, 5)),
    "bilinear": (lambda x: F.interpolate(x, (5, 3), mode="bilinear"), (1, 2, 3, 4)),
    "bilinear-scale": (
        lambda x: F.interpolate(
            x, scale_factor=(1.7, 0.6), mode="bilinear", recompute_scale_factor=False
        ),
        (1, 1, 4, 5),
    ),
    "bilinear-smooth": (
        lambda x: F.interpolate(x, (2, 6), mode="bilinear", antialias=True),
        (1, 1, 5, 4),
    ),
    "bilinear-to-one": (
        lambda x: F.interpolate(x, (1, 3), mode="bilinear", antialias=True),
        (1, 1, 4, 3),
    ),
    "bicubic": (lambda x: F.interpolate(x, (5, 6), mode="bicubic"), (1, 1, 4, 3)),
    "bicubic-smooth": (
        lambda x: F.interpolate(x, (2, 6), mode="bicubic", antialias=True),
        (1, 1, 6, 4),
    ),
    "trilinear": (
        lambda x: F.interpolate(x, (3, 2, 3), mode="trilinear", align_corners=True),
        (1, 1, 2, 3, 2),
    ),
    "area": (lambda x: F.interpolate(x, (3, 2), mode="area"), (1, 1, 5, 4)),
}


@pytest.mark.parametrize("name", FIXED)
def test_weights_that_no_input_changes(name: str) -> None:
    f, shape = FIXED[name]
    assert known(check(f, floats(*shape)))


@pytest.mark.parametrize("name", FIXED)
def test_second_derivatives_of_fixed_weights(name: str) -> None:
    """The forward operation is in the linear part."""
    f, shape = FIXED[name]

    def gradient(x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        (g,) = torch.autograd.grad((f(x) ** 3).sum(), x, create_graph=True)
        return g

    check(gradient, floats(*shape))


@pytest.mark.parametrize("name", FIXED)
def test_weights_that_this_dtype_rounds_otherwise(name: str) -> None:
    """In float32 a weight may be nonzero that float64 has as zero."""
    f, shape = FIXED[name]
    x = floats(*shape).float()
    pattern = pattern_of(f, x)
    numbers = torch.autograd.functional.jacobian(f, x).reshape(pattern.shape).numpy()
    assert not ((numbers != 0) & (pattern == 0)).any()


# The largest element of a window is known at run time only.
MAXIMA: dict[str, tuple[Case, Callable[[Tensor], Tensor]]] = {
    "max1": ((lambda x: F.max_pool1d(x, 2, 1), (1, 2, 4)), lambda x: F.avg_pool1d(x, 2, 1)),
    "max2": ((lambda x: F.max_pool2d(x, 2), (2, 1, 4, 5)), lambda x: F.avg_pool2d(x, 2)),
    "max2-overlap": (
        (lambda x: F.max_pool2d(x, 3, 2, 1), (1, 2, 4, 5)),
        lambda x: F.avg_pool2d(x, 3, 2, 1),
    ),
    "max2-unbatched": ((lambda x: F.max_pool2d(x, 2), (2, 4, 2)), lambda x: F.avg_pool2d(x, 2)),
    "max2-dilation": (
        (lambda x: F.max_pool2d(x, 2, 1, 0, 2), (1, 1, 4, 3)),
        lambda x: F.conv2d(x, torch.ones(1, 1, 2, 2).double(), dilation=2),
    ),
    "max2-ceil": (
        (lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True), (1, 1, 3, 5)),
        lambda x: F.avg_pool2d(x, 2, 2, ceil_mode=True),
    ),
    "max3": (
        (lambda x: F.max_pool3d(x, (1, 2, 2)), (1, 1, 2, 4, 2)),
        lambda x: F.avg_pool3d(x, (1, 2, 2)),
    ),
    "adaptive1": (
        (lambda x: F.adaptive_max_pool1d(x, 3), (1, 1, 5)),
        lambda x: F.adaptive_avg_pool1d(x, 3),
    ),
    "adaptive2": (
        (lambda x: F.adaptive_max_pool2d(x, (2, 3)), (1, 2, 5, 4)),
        lambda x: F.adaptive_avg_pool2d(x, (2, 3)),
    ),
    "adaptive3": (
        (lambda x: F.adaptive_max_pool3d(x, (2, 1, 2)), (1, 1, 3, 2, 2)),
        lambda x: F.adaptive_avg_pool3d(x, (2, 1, 2)),
    ),
}


@pytest.mark.parametrize("name", MAXIMA)
def test_maxima_are_somewhere_in_their_window(name: str) -> None:
    """The pattern is that of a mean over the same windows."""
    (f, shape), mean = MAXIMA[name]
    x = floats(*shape)
    pattern = check(f, x, exact=False, points=5)
    assert ((pattern != 0) == (pattern_of(mean, x) != 0)).all()
    local = pattern_of(f, x, scope="local")
    numbers = torch.autograd.functional.jacobian(f, x).reshape(local.shape).numpy()
    assert ((local != 0) == (numbers != 0)).all()


def test_fractional_windows_stay_within_their_plane() -> None:
    samples = torch.rand(1, 2, 2, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return F.fractional_max_pool2d(x, 2, (2, 2), _random_samples=samples)

    pattern = check(f, floats(1, 2, 4, 4), exact=False).reshape(2, 4, 2, 16)
    assert not pattern[0, :, 1].any()
    assert np.isnan(pattern[0, :, 0]).all()


def test_an_average_of_long_lines_is_quick() -> None:
    """Nothing is written out that is as large as line times line."""
    x = torch.zeros(1, 1, 200_000, dtype=torch.float64)
    start = time.perf_counter()
    derivative, interpretation = interpreted(lambda t: F.avg_pool1d(t, 5, 1, 2), x)
    assert time.perf_counter() - start < 20
    assert not interpretation.assumed
    short = torch.zeros(1, 1, 30, dtype=torch.float64)
    pattern = dense_pattern(*interpreted(lambda t: F.avg_pool1d(t, 5, 1, 2), short))
    (gradient,) = interpretation.gradients
    assert gradient is not None
    assert derivative.m == 200_000
    assert sum(t.table.nnz for t in gradient.terms if t.table is not None) == 5 * 200_000 - 6
    assert np.count_nonzero(pattern) == 5 * 30 - 6


def test_a_probe_by_colors_finds_what_unit_vectors_find() -> None:
    """Long local operations; and none where a result sees more than a color can tell apart."""

    def mean(t: Tensor) -> Tensor:
        return F.avg_pool1d(t[:, None], 4, 3, 1)[:, 0]

    long = probe_matrix(mean, 6000)
    assert long is not None
    assert long.shape == (2000, 6000)
    middle = (long.rows == 700).nonzero().flatten()
    assert sorted(long.columns[middle].tolist()) == [2099, 2100, 2101, 2102]
    assert len(long.rows) == 4 * 2000 - 1
    assert (long.factors == 0.25).all()
    assert probe_matrix(lambda t: t.cumsum(1), 6000) is None


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_both_lists_of_windows_name_the_same_pairs(
    stride: int, padding: int, dilation: int
) -> None:
    """From windows to elements and from elements to windows."""
    coarse, fine, taps = 4, 9, 3
    step = stride, padding, dilation
    there = window_table(coarse, fine, taps, step)
    back = window_table(coarse, fine, taps, step, from_fine=True)
    pairs = {(p, k, int(q)) for p, row in enumerate(there) for k, q in enumerate(row) if q >= 0}
    assert pairs == {
        (int(p), k, q) for q, row in enumerate(back) for k, p in enumerate(row) if p >= 0
    }
    for p, k, q in pairs:
        assert q == p * stride - padding + k * dilation
