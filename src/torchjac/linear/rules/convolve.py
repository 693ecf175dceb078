"""Convolution, forward and backward, in all its arguments.

A convolution and its derivatives are one trilinear form of a coarse tensor C (the result of a
convolution, the argument of a transposed one), a fine tensor F and a kernel W:

    sum of C[n, g, a, p] F[n, g, b, q(p, k)] W[g, a, b, k],    q = p stride - padding + k dilation

over samples n, groups g, channels a and b, positions p and q, taps k. Each result is the derivative
of the form by one tensor, and is linear in each of the other two tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchjac._torch.operators import aten
from torchjac.linear.maps import (
    LinearMap,
    Shape,
    axis_sum,
    broadcast,
    dense,
    diagonal,
    index_map,
    product,
    reshape,
)
from torchjac.linear.maps.factors import move_factors
from torchjac.linear.rules.advanced_index import index_select
from torchjac.linear.rules.registry import Local, NotLinear, Op, Operand, rule

# Products of a trilinear form (8 bytes each, for a moment): above this, samples are dense.
_MAX_PRODUCTS = 2**27

Lift = Callable[[Tensor], Tensor]


@rule(aten.convolution.default)
def convolution(op: Op) -> Local:
    """A convolution, transposed or not; a bias must be linear or zero."""
    form = _trilinear_form(op, op["input"].shape, op.shape, op["weight"].shape)
    image, result = ("coarse", "fine") if op["transposed"] else ("fine", "coarse")
    local: Local = []
    kernel_linear, image_linear = op["weight"].linear, op["input"].linear
    if kernel_linear and image_linear:
        raise NotLinear
    if kernel_linear:
        local += form.derivative(result, ("kernel", op["weight"]), (image, op["input"]))
    elif image_linear:
        local += form.derivative(result, (image, op["input"]), ("kernel", op["weight"]))
    elif not (op["input"].zero or op["weight"].zero):
        raise NotLinear
    bias = op["bias"]
    if isinstance(bias, Operand) and bias.linear:
        column = (*bias.shape, *[1] * (len(op.shape) - 2))
        broadcast_map = broadcast(op.shape, column)
        local.append((bias, product(broadcast_map, reshape(column, bias.shape))))
    elif isinstance(bias, Operand) and not bias.zero:
        raise NotLinear
    return local


@rule(aten.convolution_backward.default)
def convolution_backward(op: Op) -> tuple[Local, ...]:
    """Gradients with respect to the argument, the kernel and the bias."""
    gradient, image, kernel = op["grad_output"], op["input"], op["weight"]
    form = _trilinear_form(op, image.shape, gradient.shape, kernel.shape)
    image_role, gradient_role = ("coarse", "fine") if op["transposed"] else ("fine", "coarse")
    mask = op["output_mask"]
    locals_: list[Local] = [[], [], []]
    if mask[0]:
        locals_[0] = _bilinear(form, image_role, (gradient_role, gradient), ("kernel", kernel))
    if mask[1]:
        locals_[1] = _bilinear(form, "kernel", (gradient_role, gradient), (image_role, image))
    if mask[2]:
        if gradient.linear:
            axes = [i for i in range(len(gradient.shape)) if i != 1]
            locals_[2] = [(gradient, axis_sum(gradient.shape, axes))]
        elif not gradient.zero:
            raise NotLinear
    return tuple(locals_)


def _bilinear(
    form: TrilinearForm, result: str, one: tuple[str, Operand], other: tuple[str, Operand]
) -> Local:
    """The derivative of the form by one tensor, as a map of the linear one of two operands."""
    if one[1].linear and other[1].linear:
        raise NotLinear
    if one[1].linear:
        return form.derivative(result, one, other)
    if other[1].linear:
        return form.derivative(result, other, one)
    if one[1].zero or other[1].zero:
        return []
    raise NotLinear


def _trilinear_form(op: Op, image: Shape, result: Shape, kernel: Shape) -> TrilinearForm:
    coarse, fine = (image, result) if op["transposed"] else (result, image)
    groups = op["groups"]
    ndim = len(image) - 2
    names = ("stride", "padding", "dilation")
    steps = zip(*(per_axis(op[name], ndim) for name in names), strict=True)
    return TrilinearForm(
        image[0],
        groups,
        (coarse[1] // groups, fine[1] // groups),
        coarse[2:],
        fine[2:],
        kernel[2:],
        tuple(steps),
    )


@dataclass(frozen=True, slots=True)
class TrilinearForm:
    """The trilinear form.

    Attributes:
        samples: Size of the batch.
        groups: Number of groups.
        channels: Channels of one group, in the coarse and in the fine tensor.
        coarse: Spatial sizes of the coarse tensor.
        fine: Spatial sizes of the fine tensor.
        taps: Spatial sizes of the kernel.
        steps: Stride, padding, dilation of each spatial axis.
    """

    samples: int
    groups: int
    channels: tuple[int, int]
    coarse: Shape
    fine: Shape
    taps: Shape
    steps: tuple[tuple[int, int, int], ...]

    def derivative(
        self, result: str, linear: tuple[str, Operand], other: tuple[str, Operand]
    ) -> Local:
        """The derivative by one tensor, as a map of another tensor.

        Every product of two elements is an element of the full space (n, g, a, b, positions, taps).
        The map gathers the linear operand into the full space, scales the elements with the other
        operand, and sums them.
        """
        (role, operand), (known_role, known) = linear, other
        base = "fine" if result == "fine" else "coarse"
        full = self._full(base)
        shape = self._shape(result)
        if math.prod(full) > _MAX_PRODUCTS:
            return [(operand, self._dense_map(result, role, operand.shape))]
        lift = index_map(self._lift(role, base), full, operand.shape, role not in ("kernel", base))
        factors = move_factors(known.factors, self._lift(known_role, base), full)
        ndim = len(self.taps)
        summed = {
            "coarse": [3, *range(4 + ndim, 4 + 2 * ndim)],
            "fine": [2, *range(4 + ndim, 4 + 2 * ndim)],
            "kernel": [0, *range(4, 4 + ndim)],
        }[result]
        total = axis_sum(full, summed)
        return [
            (
                operand,
                product(reshape(shape, total.shape_out), total, diagonal(full, factors), lift),
            )
        ]

    def _full(self, base: str) -> Shape:
        positions = self.fine if base == "fine" else self.coarse
        return (self.samples, self.groups, *self.channels, *positions, *self.taps)

    def _shape(self, role: str) -> Shape:
        """Shape of the tensor of this role."""
        a, b = self.channels
        if role == "kernel":
            return (self.groups * a, b, *self.taps)
        channels, positions = (a, self.coarse) if role == "coarse" else (b, self.fine)
        return (self.samples, self.groups * channels, *positions)

    def _dense_map(self, result: str, role: str, shape: Shape) -> LinearMap:
        """A dense block per sample."""
        out = self._shape(result)
        if "kernel" in (result, role):
            return dense(out, shape)
        return dense(out, shape, range(1, len(out)), range(1, len(shape)))

    def _lift(self, role: str, base: str) -> Lift:
        """The gather of a tensor into the full space, with zeros outside of the tensor."""
        full, ndim = self._full(base), len(self.taps)
        a, b = self.channels
        if role == "kernel":
            ones = [1] * ndim
            return lambda t: t.reshape((1, self.groups, a, b, *ones, *self.taps)).expand(full)
        axis, channels = (3, a) if role == "coarse" else (2, b)
        if role == base:
            sizes = (self.samples, self.groups, channels, *self._shape(role)[2:], *[1] * ndim)
            return lambda t: t.reshape(sizes).unsqueeze(axis).expand(full)
        tables = [self._window_table(i, base) for i in range(ndim)]

        def lifted(t: Tensor) -> Tensor:
            t = t.reshape((self.samples, self.groups, channels, *t.shape[2:]))
            for i, table in enumerate(tables):  # each spatial axis becomes (position, tap)
                t = gather_or_zero(t, 3 + 2 * i, table)
            order = [*range(3), *range(3, 3 + 2 * ndim, 2), *range(4, 4 + 2 * ndim, 2)]
            return t.permute(order).unsqueeze(axis).expand(full)

        return lifted

    def _window_table(self, i: int, base: str) -> Tensor:
        """Along one axis: position in the other tensor for each position and each tap."""
        sizes = self.coarse[i], self.fine[i], self.taps[i]
        return window_table(*sizes, self.steps[i], from_fine=base == "fine")


def window_table(
    coarse: int,
    fine: int,
    taps: int,
    step: tuple[int, int, int],
    *,
    from_fine: bool = False,
) -> Tensor:
    """The partner of each position through each tap along one axis; -1 where none exists.

    Args:
        coarse: Number of windows.
        fine: Number of elements that the windows slide over.
        taps: Size of a window.
        step: Distance of windows, number of padded elements in front, distance of taps.
        from_fine: Whether positions are elements and partners are windows, not the reverse.

    Returns:
        Shape (positions, taps).
    """
    stride, padding, dilation = step
    tap = torch.arange(taps) * dilation
    if from_fine:
        ahead = torch.arange(fine)[:, None] + padding - tap
        partner = ahead.div(stride, rounding_mode="floor")
        valid = (ahead % stride == 0) & (partner >= 0) & (partner < coarse)
    else:
        partner = torch.arange(coarse)[:, None] * stride - padding + tap
        valid = (partner >= 0) & (partner < fine)
    return torch.where(valid, partner, -1)


def gather_or_zero(t: Tensor, axis: int, table: Tensor) -> Tensor:
    """Elements along an axis by a table of positions; zero where a position is -1."""
    if bool((table < 0).any()):
        zero = torch.zeros((), dtype=t.dtype)
        collapsed = t[
            tuple(slice(1) if i != axis and not s else slice(None) for i, s in _strides(t))
        ]
        shape = list(collapsed.shape)
        shape[axis] = 1
        size = t.shape[axis]
        collapsed = torch.cat([collapsed, zero.expand(shape)], axis)
        t = collapsed.expand((*t.shape[:axis], size + 1, *t.shape[axis + 1 :]))
        table = torch.where(table < 0, size, table)
    result = index_select(t, axis, table.reshape(-1))
    return result.reshape((*result.shape[:axis], *table.shape, *result.shape[axis + 1 :]))


def _strides(t: Tensor) -> list[tuple[int, int]]:
    return list(enumerate(t.stride()))


def per_axis(value: Any, ndim: int) -> list[int]:
    """A parameter as a list with one value per axis; a single value holds for all axes."""
    values = [value] if isinstance(value, int) else list(value)
    return values * ndim if len(values) == 1 else values
