"""Factors: the values of the entries of a map, as far as they are known before the program runs.

Factors are float64 numbers. NaN stands for a number that depends on the input, 0 for a structural
zero, and any other number is the entry for every input.

A structural zero must be proved, and a rounded number proves nothing: 1/41 times 41 is 1 in
float64, but not in float32. So a number is *exact* if float32 represents it, and arithmetic keeps
three rules. Exact numbers that cancel give a structural zero. Rounded numbers that cancel give an
unknown entry. A rounded result that float32 represents is moved by one unit in the last place, so
that no later step takes the number for exact. (In half precision rounding itself can make an entry
nonzero where exact arithmetic gives zero; `sparsity.precision` covers it.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor

Shape = tuple[int, ...]

UNKNOWN = math.nan

# Bit mask of a float64: the bits of the significand beyond those of float32.
BELOW_SINGLE = (1 << 29) - 1
# Sums of multiples of 1/grid are exact if the sum of absolute values is at most BITS / grid.
GRIDS = (1.0, 2.0**6)
# Integers up to here are exact in float32.
BITS = 2.0**24


class ComputedFactors:
    """Factors that the compiler computes while the program runs, evaluated lazily.

    Sparsity detection has no computed factors: there an unknown number is NaN.

    Args:
        shape: Shape of the factors.
        compute: Returns the factors; called once, at the first use.
    """

    def __init__(self, shape: Shape, compute: Callable[[], Tensor]):
        self.shape = tuple(shape)
        self._compute = compute
        self._value: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """The factors, a tensor of `shape`."""
        if self._value is None:
            self._value = self._compute()
        return self._value

    def move(self, run: Callable[[Tensor], Tensor], shape: Shape) -> ComputedFactors:
        """The factors moved by an index operation, into a tensor of another shape."""
        return ComputedFactors(shape, lambda: run(self.value))

    def expand(self, shape: Shape) -> ComputedFactors:
        """As `Tensor.expand`."""
        return self if self.shape == shape else self.move(lambda t: t.expand(shape), shape)

    def reshape(self, shape: Shape) -> ComputedFactors:
        """As `Tensor.reshape`."""
        return self if self.shape == shape else self.move(lambda t: t.reshape(shape), shape)

    def permute(self, order: list[int]) -> ComputedFactors:
        """As `Tensor.permute`."""
        return self.move(lambda t: t.permute(order), tuple(self.shape[i] for i in order))

    def unsqueeze(self, axis: int) -> ComputedFactors:
        """As `Tensor.unsqueeze`."""
        shape = [*self.shape]
        shape.insert(axis % (len(shape) + 1), 1)
        return self.move(lambda t: t.unsqueeze(axis), tuple(shape))


Known = float | Tensor
Factors = Known | ComputedFactors


def known(factors: Tensor | ComputedFactors) -> Tensor:
    """Factors of a map in sparsity detection, where none are computed."""
    assert isinstance(factors, Tensor), "computed factors in sparsity detection"
    return factors


def move_factors(
    factors: Tensor | ComputedFactors, run: Callable[[Tensor], Tensor], shape: Shape
) -> Tensor | ComputedFactors:
    """Factors moved by an index operation, into a tensor of another shape."""
    return factors.move(run, shape) if isinstance(factors, ComputedFactors) else run(factors)


@overload
def times(a: Known, b: Known) -> Known: ...
@overload
def times(a: Factors, b: Factors) -> Factors: ...
def times(a: Factors, b: Factors) -> Factors:
    """Product of factors; a structural zero times any number (NaN too) is a structural zero."""
    if isinstance(a, float) and isinstance(b, float):
        if a == 0 or b == 0:
            return 0.0
        if abs(a) == 1 or abs(b) == 1 or math.isnan(a * b):
            return a * b
        return float(_product(_number(a), _number(b)))
    if isinstance(a, ComputedFactors) or isinstance(b, ComputedFactors):
        return _computed(torch.mul, a, b)
    if isinstance(a, float):
        a, b = b, a
    assert isinstance(a, Tensor)
    if isinstance(b, float):
        if b == 1:
            return a
        if b == 0:
            return 0.0
        if b == -1:
            return map_unexpanded(torch.neg, a)
        if math.isnan(b):
            return map_unexpanded(lambda x: torch.where(x == 0, x, UNKNOWN), a)
        b = _number(b).expand(a.shape)
    return map_unexpanded(_product, a, b)


@overload
def plus(a: Known, b: Known) -> Known: ...
@overload
def plus(a: Factors, b: Factors) -> Factors: ...
def plus(a: Factors, b: Factors) -> Factors:
    """Sum of factors; a structural zero only where exact numbers cancel."""
    if isinstance(a, float) and isinstance(b, float):
        return float(_sum(_number(a), _number(b)))
    if isinstance(a, ComputedFactors) or isinstance(b, ComputedFactors):
        return _computed(torch.add, a, b)
    if isinstance(a, float):
        a, b = b, a
    assert isinstance(a, Tensor)
    if isinstance(b, float):
        b = _number(b).expand(a.shape)
    return map_unexpanded(_sum, a, b)


def _computed(function: Callable[..., Tensor], a: Factors, b: Factors) -> Factors:
    """A sum or product of two factors, at least one of them computed."""
    computed, operand = (a, b) if isinstance(a, ComputedFactors) else (b, a)
    if isinstance(operand, float):
        if operand == (1 if function is torch.mul else 0):
            return computed
        if operand == 0:
            return 0.0
    if not isinstance(operand, ComputedFactors) and is_unknown(operand):
        return UNKNOWN
    assert isinstance(computed, ComputedFactors)

    def compute() -> Tensor:
        x, other = (
            computed.value,
            operand.value if isinstance(operand, ComputedFactors) else operand,
        )
        if isinstance(other, float):
            return map_unexpanded(lambda t: function(t, other), x)
        return map_unexpanded(function, x, other.to(x.dtype) if other.dtype != x.dtype else other)

    return ComputedFactors(computed.shape, compute)


def is_unknown(factors: Known) -> bool:
    """Whether any of the factors is unknown."""
    if isinstance(factors, float):
        return math.isnan(factors)
    return bool(unexpanded(factors).isnan().any())


def expand_factors(factors: Known, shape: Shape) -> Tensor:
    """Factors as a tensor of a shape; a single number is expanded without memory."""
    if isinstance(factors, Tensor):
        return factors
    return torch.tensor(factors, dtype=torch.float64).expand(shape)


def map_unexpanded(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Applies an elementwise function once per stored element of expanded tensors."""
    shape = tensors[0].shape
    repeated = [
        i for i in range(len(shape)) if shape[i] > 1 and not any(t.stride(i) for t in tensors)
    ]
    if not repeated:
        return function(*tensors)
    collapsed = list(tensors)
    for axis in repeated:
        collapsed = [t.narrow(axis, 0, 1) for t in collapsed]
    return function(*collapsed).expand(shape)


def map_axis(function: Callable[[Tensor], Tensor], tensor: Tensor, axis: int) -> Tensor:
    """Applies a function along one axis, once per stored slice of an expanded tensor.

    Args:
        function: Acts along the axis, and may change its size.
        tensor: The argument.
        axis: The axis, not negative.
    """
    collapsed = tensor
    for i, (size, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if i != axis and size > 1 and not step:
            collapsed = collapsed.narrow(i, 0, 1)
    result = function(collapsed)
    shape = list(tensor.shape)
    shape[axis] = result.shape[axis]
    return result.expand(shape)


def unexpanded(tensor: Tensor) -> Tensor:
    """The tensor with every expanded axis (stride 0) narrowed to size 1."""
    for axis, (size, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and not step:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def is_float32(x: Tensor) -> Tensor:
    """Whether float32 represents each number exactly; true for NaN."""
    return (x.contiguous().view(torch.int64) & BELOW_SINGLE) == 0


def _number(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def _product(x: Tensor, y: Tensor) -> Tensor:
    product = x * y
    zero = (x == 0) | (y == 0)
    if not bool(product.isnan().all()):
        exact = is_float32(x) & is_float32(y)
        if not bool(exact.all()):
            rounded = is_float32(product) & ~exact & product.isfinite()
            rounded &= (x.abs() != 1) & (y.abs() != 1)
            product = torch.where(rounded, torch.nextafter(product, 2 * product), product)
        product = torch.where(product == 0, UNKNOWN, product)  # underflow is no structural zero
    return torch.where(zero, 0.0, product)


def _sum(x: Tensor, y: Tensor) -> Tensor:
    total = x + y
    unknown = total.isnan()
    if bool(unknown.all()):
        return total
    exact = (x == 0) | (y == 0) | unknown
    for grid in GRIDS:
        on_grid = [(t * grid == (t * grid).round()) for t in (x, y)]
        exact |= on_grid[0] & on_grid[1] & ((x.abs() + y.abs()) * grid <= BITS)
        if bool(exact.all()):
            return total
    inexact = torch.where(is_float32(total), torch.nextafter(total, 2 * total), total)
    return torch.where(exact, total, torch.where(total == 0, UNKNOWN, inexact))
