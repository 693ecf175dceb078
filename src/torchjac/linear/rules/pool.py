"""Pooling, interpolation and padding, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchjac._torch.modes import real_values
from torchjac._torch.operators import aten, known
from torchjac.linear.maps import (
    UNKNOWN,
    LinearMap,
    Shape,
    axis_sum,
    diagonal,
    index_map,
    product,
    reshape,
    scatter,
)
from torchjac.linear.rules.advanced_index import index_select, scatter_map
from torchjac.linear.rules.convolve import gather_or_zero, per_axis, window_table
from torchjac.linear.rules.index import index_along_axis
from torchjac.linear.rules.probe import AxisMatrix, dense_planes, probe_matrix, separable
from torchjac.linear.rules.registry import Local, Op, Operand, rule

Forward = Callable[[int, Tensor], Tensor]


def _along_axes(op: Op, name: str, fine: Shape, forward: Forward, reach: Sequence[int]) -> Local:
    """A forward operation on planes, or its backward.

    Args:
        op: The operation.
        name: Its linear operand: `grad_output` for a backward operation.
        fine: Shape of the argument of the forward operation.
        forward: Runs the forward operation along one axis of a plane: takes the axis and float64
            of shape (vectors, size).
        reach: For each axis, the number of elements that one result of the forward operation reads.
    """
    operand, ndim = op.only(name), len(reach)
    dtype = operand.node.meta["val"].dtype
    matrices = []
    for axis in range(ndim):
        size = fine[len(fine) - ndim + axis]
        matrix = probe_matrix(partial(forward, axis), size, dtype, reach[axis])
        if matrix is None:
            return [(operand, dense_planes(op.shape, operand.shape, ndim))]
        matrices.append(matrix.transposed() if name == "grad_output" else matrix)
    if "indices" not in op and not _matrices_agree(op, name, matrices):
        return [(operand, dense_planes(op.shape, operand.shape, ndim))]
    return [(operand, separable(matrices, operand.shape))]


def _matrices_agree(op: Op, name: str, matrices: list[AxisMatrix]) -> bool:
    """Whether the matrices reproduce the operation on one plane of random numbers."""
    ndim = len(matrices)
    arguments: dict[str, Any] = {}
    for argument, value in op.arguments.items():
        if isinstance(value, Operand):
            shape = (*[1] * (len(value.shape) - ndim), *value.shape[-ndim:])
            value = torch.zeros(shape, dtype=torch.float64)
            if argument == name:
                value = value.uniform_(1, 2, generator=torch.Generator().manual_seed(0))
        elif argument == "input_size":
            value = [1, 1, *value[2:]]
        arguments[argument] = value
    expected = arguments[name]
    for i, matrix in enumerate(matrices):
        expected = matrix.times(expected, expected.ndim - ndim + i)
    if bool(expected.isnan().any()):
        return True  # a weight that depends on the dtype
    with real_values():
        return torch.allclose(op.target(**arguments), expected, rtol=1e-9, atol=1e-9)


def _run_on_line(
    operation: Any, ndim: int, axis: int, t: Tensor, *args: Any, cross_size: int = 1
) -> Tensor:
    """Runs an operation on planes that are constant along all axes but one.

    Args:
        operation: Takes planes, then `args`.
        ndim: Number of axes of a plane.
        axis: The axis of the plane on which the vectors lie.
        t: The vectors, shape (vectors, size).
        *args: The remaining arguments of the operation.
        cross_size: Size of all other axes of the plane.
    """
    vectors = t.shape[0]
    line = t.reshape(vectors, 1, *(t.shape[1] if i == axis else 1 for i in range(ndim)))
    plane = line.expand(vectors, 1, *(t.shape[1] if i == axis else cross_size for i in range(ndim)))
    result: Tensor = operation(plane.contiguous(), *args)
    first = [slice(None) if i in (0, axis + 2) else 0 for i in range(ndim + 2)]
    return result[tuple(first)]


def _line_parameter(value: Any, axis: int, ndim: int, neutral: int) -> list[int]:
    """A parameter per axis of a plane, neutral on all axes but one."""
    values = per_axis(value, ndim)
    return [values[i] if i == axis else neutral for i in range(ndim)]


AVERAGES = known(
    {
        aten.avg_pool2d.default: (aten.avg_pool2d.default, 2),
        aten.avg_pool3d.default: (aten.avg_pool3d.default, 3),
        aten.avg_pool2d_backward.default: (aten.avg_pool2d.default, 2),
        aten.avg_pool3d_backward.default: (aten.avg_pool3d.default, 3),
    }
)


@rule(*AVERAGES)
def avg_pool(op: Op) -> Local:
    """Means of windows."""
    operation, ndim = AVERAGES[op.target]
    name, fine = _linear_operand(op)
    override = op["divisor_override"]
    stride = op["stride"] or op["kernel_size"]

    def forward(axis: int, t: Tensor) -> Tensor:
        sizes = [
            _line_parameter(op["kernel_size"], axis, ndim, 1),
            _line_parameter(stride, axis, ndim, 1),
            _line_parameter(op["padding"], axis, ndim, 0),
        ]
        divisor = override if axis == 0 or override is None else 1
        rest = (op["ceil_mode"], op["count_include_pad"], divisor)
        return _run_on_line(operation, ndim, axis, t, *sizes, *rest)

    return _along_axes(op, name, fine, forward, per_axis(op["kernel_size"], ndim))


ADAPTIVE = known(
    {
        aten._adaptive_avg_pool2d.default: (aten._adaptive_avg_pool2d.default, 2),
        aten._adaptive_avg_pool3d.default: (aten._adaptive_avg_pool3d.default, 3),
        aten._adaptive_avg_pool2d_backward.default: (aten._adaptive_avg_pool2d.default, 2),
        aten._adaptive_avg_pool3d_backward.default: (aten._adaptive_avg_pool3d.default, 3),
    }
)


@rule(*ADAPTIVE)
def adaptive_avg_pool(op: Op) -> Local:
    """Means of windows whose sizes follow from the size of the result."""
    operation, ndim = ADAPTIVE[op.target]
    name, fine = _linear_operand(op)
    coarse = op.shape if name == "self" else op["grad_output"].shape
    return _adaptive(op, name, operation, fine[-ndim:], coarse[-ndim:])


def _adaptive(op: Op, name: str, operation: Any, fine: Shape, coarse: Shape) -> Local:
    ndim = len(fine)

    def forward(axis: int, t: Tensor) -> Tensor:
        return _run_on_line(operation, ndim, axis, t, _line_parameter(coarse, axis, ndim, 1))

    reach = [f // max(c, 1) + 2 for f, c in zip(fine, coarse, strict=True)]
    return _along_axes(op, name, fine, forward, reach)


PADS = known(
    {
        getattr(aten, f"{kind}_pad{ndim}d{suffix}").default: (getattr(aten, f"{kind}_pad1d"), ndim)
        for kind in ("reflection", "replication")
        for ndim in (1, 2, 3)
        for suffix in ("", "_backward")
    }
)


@rule(*PADS)
def pad(op: Op) -> Local:
    """Mirrored or repeated elements at the border."""
    operation, ndim = PADS[op.target]
    name, fine = _linear_operand(op)
    padding = list(op["padding"])

    def forward(axis: int, t: Tensor) -> Tensor:
        last = 2 * (ndim - 1 - axis)  # the last axis comes first
        result: Tensor = operation(t[:, None], padding[last : last + 2])
        return result[:, 0]

    return _along_axes(op, name, fine, forward, [1] * ndim)


# Name, number of spatial axes, elements that one result reads along each of the axes.
_UPSAMPLES = [
    ("upsample_linear1d", 1, 2),
    ("upsample_bilinear2d", 2, 2),
    ("upsample_trilinear3d", 3, 2),
    ("upsample_bicubic2d", 2, 4),
    ("upsample_nearest1d", 1, 1),
    ("upsample_nearest2d", 2, 1),
    ("upsample_nearest3d", 3, 1),
    ("_upsample_nearest_exact1d", 1, 1),
    ("_upsample_nearest_exact2d", 2, 1),
    ("_upsample_nearest_exact3d", 3, 1),
    ("_upsample_bilinear2d_aa", 2, 96),  # grows as the result gets coarser
    ("_upsample_bicubic2d_aa", 2, 96),
    ("_upsample_lanczos2d_aa", 2, 96),
]
UPSAMPLES = known(
    {
        getattr(aten, name + suffix).default: (getattr(aten, name).default, [reach] * ndim)
        for name, ndim, reach in _UPSAMPLES
        for suffix in ("", "_backward")
        if hasattr(aten, name)  # some versions of torch lack some of them
    }
)


@rule(*UPSAMPLES)
def upsample(op: Op) -> Local:
    """Interpolation on a grid."""
    operation, reach = UPSAMPLES[op.target]
    ndim = len(reach)
    backward = "grad_output" in op
    name = "grad_output" if backward else "self"
    fine = tuple(op["input_size"]) if backward else op["self"].shape
    sizes = list(op["output_size"])
    scales = [op[n] for n in ("scales", "scales_d", "scales_h", "scales_w") if n in op]

    def forward(axis: int, t: Tensor) -> Tensor:
        mine = [s if i == axis else None for i, s in enumerate(scales)]
        rest = [op["align_corners"]] if "align_corners" in op else []
        # The antialiased kernels of torch 2.13 are wrong on planes with an axis of size 1.
        line = _line_parameter(sizes, axis, ndim, 2)
        return _run_on_line(operation, ndim, axis, t, line, *rest, *mine, cross_size=2)

    return _along_axes(op, name, fine, forward, reach)


MAXIMA = known(
    {
        aten.max_pool2d_with_indices_backward.default: 2,
        aten.max_pool3d_with_indices_backward.default: 3,
        aten.adaptive_max_pool2d_backward.default: 2,
        aten.adaptive_max_pool3d_backward.default: 3,
        aten.fractional_max_pool2d_backward.default: 2,
        aten.fractional_max_pool3d_backward.default: 3,
    }
)


@rule(*MAXIMA)
def max_pool_backward(op: Op) -> Local:
    """The cotangent of a window goes to the largest element of the window."""
    ndim, operand = MAXIMA[op.target], op.only("grad_output")
    known = op["indices"].constant
    if known is not None:
        return [(operand, _scatter_to_known(op.shape, operand.shape, ndim, known.cpu()))]
    if "dilation" in op:
        return [(operand, _dense_in_windows(op, operand, ndim))]
    if "output_size" in op:  # fractional windows lie at random positions
        return [(operand, dense_planes(op.shape, operand.shape, ndim))]
    operation = aten._adaptive_avg_pool2d if ndim == 2 else aten._adaptive_avg_pool3d
    sizes = (op.shape[-ndim:], operand.shape[-ndim:])
    local = _adaptive(op, "grad_output", operation.default, *sizes)
    return [(o, product(diagonal(op.shape, UNKNOWN), map_)) for o, map_ in local]


def _scatter_to_known(shape: Shape, mine: Shape, ndim: int, known: Tensor) -> LinearMap:
    """Windows added to known positions of their planes."""
    lanes = math.prod(mine[:-ndim])
    flat_in, flat_out = math.prod(mine[-ndim:]), math.prod(shape[-ndim:])
    p, order = index_along_axis(
        known.reshape(lanes, flat_in), (lanes, flat_out), (lanes, flat_in), 1
    )
    placed = scatter_map(p, tuple((lanes, flat_in)[i] for i in order))
    moved = index_map(lambda t: t.permute(order), placed.shape_in, (lanes, flat_in), False)
    return product(reshape(shape, placed.shape_out), placed, moved, reshape((lanes, flat_in), mine))


def _dense_in_windows(op: Op, operand: Operand, ndim: int) -> LinearMap:
    """All pairs of a window and an element in the window."""
    stride = op["stride"] or op["kernel_size"]
    names = ("kernel_size", "padding", "dilation")
    taps, padding, dilation = (per_axis(op[n], ndim) for n in names)
    strides = per_axis(stride, ndim)
    first = len(op.shape) - ndim
    tables = [
        window_table(
            operand.shape[first + i],
            op.shape[first + i],
            taps[i],
            (strides[i], padding[i], dilation[i]),
            from_fine=True,
        )
        for i in range(ndim)
    ]

    def run(t: Tensor) -> Tensor:
        for i, table in enumerate(tables):
            t = gather_or_zero(t, first + 2 * i, table)
        return t

    sizes = [s for table in tables for s in table.shape]
    full = (*op.shape[:first], *sizes)
    lift = index_map(run, full, operand.shape, True)
    total = axis_sum(full, range(first + 1, first + 2 * ndim, 2))
    return product(total, diagonal(full, UNKNOWN), lift)


@rule(aten.im2col.default)
def im2col(op: Op) -> Local:
    """Windows of a plane as columns."""
    operand = op.only("self")
    positions = _window_positions(op, operand.shape[-2:])
    lanes = operand.shape[:-2]
    flat = (*lanes, math.prod(operand.shape[-2:]))
    windows_shape = (*lanes, *positions.shape)
    run = index_map(lambda t: gather_or_zero(t, len(lanes), positions), windows_shape, flat, True)
    return [(operand, product(reshape(op.shape, windows_shape), run, reshape(flat, operand.shape)))]


@rule(aten.col2im.default)
def col2im(op: Op) -> Local:
    """Columns added to the positions of their windows in a plane."""
    operand = op.only("self")
    positions = _window_positions(op, op.shape[-2:]).reshape(-1)
    lanes = op.shape[:-2]
    columns = (*lanes, len(positions))
    inside = (positions >= 0).nonzero().flatten()
    entries = (*lanes, len(inside))
    flat = (*lanes, math.prod(op.shape[-2:]))
    return [
        (
            operand,
            product(
                reshape(op.shape, flat),
                scatter(flat, entries, len(lanes), positions[inside]),
                index_map(lambda t: index_select(t, len(lanes), inside), entries, columns, False),
                reshape(columns, operand.shape),
            ),
        )
    ]


def _window_positions(op: Op, plane: Sequence[int]) -> Tensor:
    """Position in the plane of each (tap, window); -1 outside."""
    size = math.prod(plane)
    numbers = torch.arange(1, size + 1, dtype=torch.float64).reshape(1, 1, *plane)
    names = ("kernel_size", "dilation", "padding", "stride")
    with real_values():
        columns: Tensor = aten.im2col.default(numbers, *(op[n] for n in names))
    return columns[0].to(torch.int64) - 1


def _linear_operand(op: Op) -> tuple[str, Shape]:
    """The name of the linear operand, and the shape of the argument of the forward operation."""
    return ("grad_output" if "grad_output" in op else "self"), op["self"].shape
