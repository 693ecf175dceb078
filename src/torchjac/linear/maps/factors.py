"""What is known of the entries of a map before the program runs.

Factors are float64 numbers: NaN stands for a number that is not known before the program runs, 0
for an entry that is structurally zero, and anything else is that number, whatever the input.

A structural zero must be proved, and a number that was rounded proves nothing: 1/41 times 41 is 1
in float64 and not in float32. So a number is *exact* if float32 holds it, and arithmetic keeps to
three rules: exact numbers that cancel give a structural zero; rounded numbers that cancel give an
unknown one; and a result of rounding that looks exact is moved by one unit in the last place, so
that nothing downstream takes it for one. (Below float32 rounding itself can make an entry nonzero
that exact arithmetic says is none.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor

Shape = tuple[int, ...]

UNKNOWN = math.nan

# Significands of float32 leave these bits of a float64 free.
BELOW_SINGLE = (1 << 29) - 1
# Sums of multiples of 1/grid are exact as long as grid times their absolute values, added up,
# stays within 24 bits.
GRIDS = (1.0, 2.0**6)
BITS = 2.0**24


class Numbers:
    """Factors that an engine computes: nothing is known of them beforehand.

    The structure stage has none of these: there a number that is not known is NaN.

    Args:
        shape: Their shape.
        make: Gives them; called once, when they are needed.
    """

    def __init__(self, shape: Shape, make: Callable[[], Tensor]):
        self.shape = tuple(shape)
        self._make = make
        self._value: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """The numbers, of that shape."""
        if self._value is None:
            self._value = self._make()
        return self._value

    def moved(self, run: Callable[[Tensor], Tensor], shape: Shape) -> Numbers:
        """The same numbers in other places."""
        return Numbers(shape, lambda: run(self.value))

    def expand(self, shape: Shape) -> Numbers:
        """As `Tensor.expand`."""
        return self if self.shape == shape else self.moved(lambda t: t.expand(shape), shape)

    def reshape(self, shape: Shape) -> Numbers:
        """As `Tensor.reshape`."""
        return self if self.shape == shape else self.moved(lambda t: t.reshape(shape), shape)

    def permute(self, order: list[int]) -> Numbers:
        """As `Tensor.permute`."""
        return self.moved(lambda t: t.permute(order), tuple(self.shape[i] for i in order))

    def unsqueeze(self, axis: int) -> Numbers:
        """As `Tensor.unsqueeze`."""
        shape = [*self.shape]
        shape.insert(axis % (len(shape) + 1), 1)
        return self.moved(lambda t: t.unsqueeze(axis), tuple(shape))


Known = float | Tensor
Factors = Known | Numbers


def known(factors: Tensor | Numbers) -> Tensor:
    """Factors of a map of the structure stage, where engines have computed none."""
    assert isinstance(factors, Tensor), "numbers of an engine in the structure stage"
    return factors


def moved(
    factors: Tensor | Numbers, run: Callable[[Tensor], Tensor], shape: Shape
) -> Tensor | Numbers:
    """Factors in other places, of another shape."""
    return factors.moved(run, shape) if isinstance(factors, Numbers) else run(factors)


@overload
def times(a: Known, b: Known) -> Known: ...
@overload
def times(a: Factors, b: Factors) -> Factors: ...
def times(a: Factors, b: Factors) -> Factors:
    """Product of factors, in which a structural zero stays zero whatever it meets."""
    if isinstance(a, float) and isinstance(b, float):
        if a == 0 or b == 0:
            return 0.0
        if abs(a) == 1 or abs(b) == 1 or math.isnan(a * b):
            return a * b
        return float(_product(_number(a), _number(b)))
    if isinstance(a, Numbers) or isinstance(b, Numbers):
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
            return on_support(torch.neg, a)
        if math.isnan(b):
            return on_support(lambda x: torch.where(x == 0, x, UNKNOWN), a)
        b = _number(b).expand(a.shape)
    return on_support(_product, a, b)


@overload
def plus(a: Known, b: Known) -> Known: ...
@overload
def plus(a: Factors, b: Factors) -> Factors: ...
def plus(a: Factors, b: Factors) -> Factors:
    """Sum of factors: zero only where exact numbers cancel."""
    if isinstance(a, float) and isinstance(b, float):
        return float(_sum(_number(a), _number(b)))
    if isinstance(a, Numbers) or isinstance(b, Numbers):
        return _computed(torch.add, a, b)
    if isinstance(a, float):
        a, b = b, a
    assert isinstance(a, Tensor)
    if isinstance(b, float):
        b = _number(b).expand(a.shape)
    return on_support(_sum, a, b)


def _computed(function: Callable[..., Tensor], a: Factors, b: Factors) -> Factors:
    """A sum or product with numbers that an engine computes."""
    one, neutral = (a, b) if isinstance(a, Numbers) else (b, a)
    if isinstance(neutral, float):
        if neutral == (1 if function is torch.mul else 0):
            return one
        if neutral == 0:
            return 0.0
    if not isinstance(neutral, Numbers) and is_unknown(neutral):
        return UNKNOWN
    assert isinstance(one, Numbers)

    def made() -> Tensor:
        x, other = one.value, neutral.value if isinstance(neutral, Numbers) else neutral
        if isinstance(other, float):
            return on_support(lambda t: function(t, other), x)
        return on_support(function, x, other.to(x.dtype) if other.dtype != x.dtype else other)

    return Numbers(one.shape, made)


def is_unknown(factors: Known) -> bool:
    """Whether a number among them is not known."""
    if isinstance(factors, float):
        return math.isnan(factors)
    return bool(stored(factors).isnan().any())


def spread(factors: Known, shape: Shape) -> Tensor:
    """Factors as a tensor of a shape, without memory for one number."""
    if isinstance(factors, Tensor):
        return factors
    return torch.tensor(factors, dtype=torch.float64).expand(shape)


def on_support(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Runs an elementwise function once for all elements that only repeat along an axis."""
    shape = tensors[0].shape
    repeated = [
        i for i in range(len(shape)) if shape[i] > 1 and not any(t.stride(i) for t in tensors)
    ]
    if not repeated:
        return function(*tensors)
    small = list(tensors)
    for axis in repeated:
        small = [t.narrow(axis, 0, 1) for t in small]
    return function(*small).expand(shape)


def on_axis(function: Callable[[Tensor], Tensor], tensor: Tensor, axis: int) -> Tensor:
    """Runs a function that acts along one axis once for all slices that only repeat.

    Args:
        function: Changes the size of that axis at most.
        tensor: What it is run on.
        axis: The axis, not negative.
    """
    small = tensor
    for i, (size, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if i != axis and size > 1 and not step:
            small = small.narrow(i, 0, 1)
    made = function(small)
    shape = list(tensor.shape)
    shape[axis] = made.shape[axis]
    return made.expand(shape)


def stored(tensor: Tensor) -> Tensor:
    """The elements that are stored for themselves: axes along which nothing changes have size 1."""
    for axis, (size, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and not step:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def is_single(x: Tensor) -> Tensor:
    """Whether float32 holds a number; also true of NaN."""
    return (x.contiguous().view(torch.int64) & BELOW_SINGLE) == 0


def _number(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def _product(x: Tensor, y: Tensor) -> Tensor:
    made = x * y
    zero = (x == 0) | (y == 0)
    if not bool(made.isnan().all()):
        exact = is_single(x) & is_single(y)
        if not bool(exact.all()):
            rounded = is_single(made) & ~exact & made.isfinite()
            rounded &= (x.abs() != 1) & (y.abs() != 1)
            made = torch.where(rounded, torch.nextafter(made, 2 * made), made)
        made = torch.where(made == 0, UNKNOWN, made)  # it was too small for float64
    return torch.where(zero, 0.0, made)


def _sum(x: Tensor, y: Tensor) -> Tensor:
    made = x + y
    unknown = made.isnan()
    if bool(unknown.all()):
        return made
    exact = (x == 0) | (y == 0) | unknown
    for grid in GRIDS:
        fine = [(t * grid == (t * grid).round()) for t in (x, y)]
        exact |= fine[0] & fine[1] & ((x.abs() + y.abs()) * grid <= BITS)
        if bool(exact.all()):
            return made
    moved = torch.where(is_single(made), torch.nextafter(made, 2 * made), made)
    return torch.where(exact, made, torch.where(made == 0, UNKNOWN, moved))
