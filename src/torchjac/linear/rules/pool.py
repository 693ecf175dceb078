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
from torchjac.linear.rules.convolve import gathered, same_for_all, windows
from torchjac.linear.rules.index import laned
from torchjac.linear.rules.places import along, put
from torchjac.linear.rules.probe import AxisMatrix, planes, probed, separable
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
        reach: Along each axis, how many elements a result of the forward operation sees.
    """
    operand, ndim = op.only(name), len(reach)
    dtype = operand.node.meta["val"].dtype
    matrices = []
    for axis in range(ndim):
        size = fine[len(fine) - ndim + axis]
        matrix = probed(partial(forward, axis), size, dtype, reach[axis])
        if matrix is None:
            return [(operand, planes(op.shape, operand.shape, ndim))]
        matrices.append(matrix.transposed() if name == "grad_output" else matrix)
    if "indices" not in op and not _agree(op, name, matrices):
        return [(operand, planes(op.shape, operand.shape, ndim))]
    return [(operand, separable(matrices, operand.shape))]


def _agree(op: Op, name: str, matrices: list[AxisMatrix]) -> bool:
    """Whether the operation on one plane of random numbers is what the matrices say."""
    ndim = len(matrices)
    given: dict[str, Any] = {}
    for argument, value in op.arguments.items():
        if isinstance(value, Operand):
            shape = (*[1] * (len(value.shape) - ndim), *value.shape[-ndim:])
            value = torch.zeros(shape, dtype=torch.float64)
            if argument == name:
                value = value.uniform_(1, 2, generator=torch.Generator().manual_seed(0))
        elif argument == "input_size":
            value = [1, 1, *value[2:]]
        given[argument] = value
    made = given[name]
    for i, matrix in enumerate(matrices):
        made = matrix.times(made, made.ndim - ndim + i)
    if bool(made.isnan().any()):
        return True  # a weight that depends on the dtype
    with real_values():
        return torch.allclose(op.target(**given), made, rtol=1e-9, atol=1e-9)


def _on_line(
    operation: Any, ndim: int, axis: int, t: Tensor, *args: Any, beside: int = 1
) -> Tensor:
    """Runs an operation on planes that are constant along all axes but one.

    Args:
        operation: Takes planes, and the other arguments.
        ndim: Number of axes of a plane.
        axis: The axis along which `t` is laid.
        t: Shape (vectors, size).
        *args: The other arguments.
        beside: Size of the other axes.
    """
    vectors = t.shape[0]
    line = t.reshape(vectors, 1, *(t.shape[1] if i == axis else 1 for i in range(ndim)))
    plane = line.expand(vectors, 1, *(t.shape[1] if i == axis else beside for i in range(ndim)))
    made: Tensor = operation(plane.contiguous(), *args)
    first = [slice(None) if i in (0, axis + 2) else 0 for i in range(ndim + 2)]
    return made[tuple(first)]


def _line(value: Any, axis: int, ndim: int, other: int) -> list[int]:
    """A parameter of a plane for a line: what it is along the axis, something neutral elsewhere."""
    given = same_for_all(value, ndim)
    return [given[i] if i == axis else other for i in range(ndim)]


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
    name, fine = _sides(op)
    override = op["divisor_override"]
    stride = op["stride"] or op["kernel_size"]

    def forward(axis: int, t: Tensor) -> Tensor:
        sizes = [
            _line(op["kernel_size"], axis, ndim, 1),
            _line(stride, axis, ndim, 1),
            _line(op["padding"], axis, ndim, 0),
        ]
        divisor = override if axis == 0 or override is None else 1
        rest = (op["ceil_mode"], op["count_include_pad"], divisor)
        return _on_line(operation, ndim, axis, t, *sizes, *rest)

    return _along_axes(op, name, fine, forward, same_for_all(op["kernel_size"], ndim))


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
    """Means of windows chosen by the size of the result."""
    operation, ndim = ADAPTIVE[op.target]
    name, fine = _sides(op)
    coarse = op.shape if name == "self" else op["grad_output"].shape
    return _adaptive(op, name, operation, fine[-ndim:], coarse[-ndim:])


def _adaptive(op: Op, name: str, operation: Any, fine: Shape, coarse: Shape) -> Local:
    ndim = len(fine)

    def forward(axis: int, t: Tensor) -> Tensor:
        return _on_line(operation, ndim, axis, t, _line(coarse, axis, ndim, 1))

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
    name, fine = _sides(op)
    padding = list(op["padding"])

    def forward(axis: int, t: Tensor) -> Tensor:
        last = 2 * (ndim - 1 - axis)  # the last axis comes first
        made: Tensor = operation(t[:, None], padding[last : last + 2])
        return made[:, 0]

    return _along_axes(op, name, fine, forward, [1] * ndim)


# Name, number of spatial axes, how many elements a result sees along each of them.
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
    ("_upsample_bilinear2d_aa", 2, 96),  # the more, the coarser the result
    ("_upsample_bicubic2d_aa", 2, 96),
    ("_upsample_lanczos2d_aa", 2, 96),
]
UPSAMPLES = known(
    {
        getattr(aten, name + suffix).default: (getattr(aten, name).default, [reach] * ndim)
        for name, ndim, reach in _UPSAMPLES
        for suffix in ("", "_backward")
        if hasattr(aten, name)  # not all of them are in every torch
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
        # Next to an axis of size 1 the antialiased kernels of torch 2.13 go astray.
        line = _line(sizes, axis, ndim, 2)
        return _on_line(operation, ndim, axis, t, line, *rest, *mine, beside=2)

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
    """The cotangent of a window goes to its largest element, whichever that is."""
    ndim, operand = MAXIMA[op.target], op.only("grad_output")
    known = op["indices"].constant
    if known is not None:
        return [(operand, _to_places(op.shape, operand.shape, ndim, known.cpu()))]
    if "dilation" in op:
        return [(operand, _to_windows(op, operand, ndim))]
    if "output_size" in op:  # where fractional windows lie is random
        return [(operand, planes(op.shape, operand.shape, ndim))]
    operation = aten._adaptive_avg_pool2d if ndim == 2 else aten._adaptive_avg_pool3d
    sizes = (op.shape[-ndim:], operand.shape[-ndim:])
    found = _adaptive(op, "grad_output", operation.default, *sizes)
    return [(o, product(diagonal(op.shape, UNKNOWN), map_)) for o, map_ in found]


def _to_places(shape: Shape, mine: Shape, ndim: int, known: Tensor) -> LinearMap:
    """Windows added to known places of their planes."""
    lanes = math.prod(mine[:-ndim])
    flat_in, flat_out = math.prod(mine[-ndim:]), math.prod(shape[-ndim:])
    p, order = laned(known.reshape(lanes, flat_in), (lanes, flat_out), (lanes, flat_in), 1)
    placed = put(p, tuple((lanes, flat_in)[i] for i in order))
    moved = index_map(lambda t: t.permute(order), placed.shape_in, (lanes, flat_in), False)
    return product(reshape(shape, placed.shape_out), placed, moved, reshape((lanes, flat_in), mine))


def _to_windows(op: Op, operand: Operand, ndim: int) -> LinearMap:
    """Windows to any of their elements."""
    stride = op["stride"] or op["kernel_size"]
    names = ("kernel_size", "padding", "dilation")
    taps, padding, dilation = (same_for_all(op[n], ndim) for n in names)
    steps = same_for_all(stride, ndim)
    first = len(op.shape) - ndim
    tables = [
        windows(
            operand.shape[first + i],
            op.shape[first + i],
            taps[i],
            steps[i],
            padding[i],
            dilation[i],
            from_fine=True,
        )
        for i in range(ndim)
    ]

    def run(t: Tensor) -> Tensor:
        for i, table in enumerate(tables):
            t = gathered(t, first + 2 * i, table)
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
    place = _columns(op, operand.shape[-2:])
    lanes = operand.shape[:-2]
    flat = (*lanes, math.prod(operand.shape[-2:]))
    taken = (*lanes, *place.shape)
    run = index_map(lambda t: gathered(t, len(lanes), place), taken, flat, True)
    return [(operand, product(reshape(op.shape, taken), run, reshape(flat, operand.shape)))]


@rule(aten.col2im.default)
def col2im(op: Op) -> Local:
    """Columns added up where the windows of a plane were."""
    operand = op.only("self")
    place = _columns(op, op.shape[-2:]).reshape(-1)
    lanes = op.shape[:-2]
    columns = (*lanes, len(place))
    kept = (place >= 0).nonzero().flatten()
    inside = (*lanes, len(kept))
    flat = (*lanes, math.prod(op.shape[-2:]))
    return [
        (
            operand,
            product(
                reshape(op.shape, flat),
                scatter(flat, inside, len(lanes), place[kept]),
                index_map(lambda t: along(t, len(lanes), kept), inside, columns, False),
                reshape(columns, operand.shape),
            ),
        )
    ]


def _columns(op: Op, plane: Sequence[int]) -> Tensor:
    """Position in the plane of each (tap, window); -1 outside."""
    size = math.prod(plane)
    numbers = torch.arange(1, size + 1, dtype=torch.float64).reshape(1, 1, *plane)
    names = ("kernel_size", "dilation", "padding", "stride")
    with real_values():
        made: Tensor = aten.im2col.default(numbers, *(op[n] for n in names))
    return made[0].to(torch.int64) - 1


def _sides(op: Op) -> tuple[str, Shape]:
    """The name of the linear operand, and the shape of the argument of the forward operation."""
    return ("grad_output" if "grad_output" in op else "self"), op["self"].shape
