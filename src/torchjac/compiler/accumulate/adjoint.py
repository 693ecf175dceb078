"""What a gradient is of the cotangent, in numbers: the adjoint of one tensor.

A value of the linear graph is a linear function of the cotangent, which has an element for every
row of J. Its matrix is a sum of terms. A term is a loop over some axes; at each point of the loop
the product of its factors is the entry between one row of J and one element of the value. Rows and
elements are known beforehand, factors are tensors of the running program. What does not change
along an axis of the loop has stride 0 there and is neither stored nor computed twice.

The first axes of the loop are those of the value itself, unless `target` says where entries go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchjac._torch.modes import real_values
from torchjac.errors import PlanRefused
from torchjac.linear.maps import Shape
from torchjac.linear.maps.factors import map_unexpanded


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One loop over entries.

    Attributes:
        loop: Sizes of its axes: those of the value (if there is no target), then others.
        rows: Row of J at each point, int64; -1 where there is no entry. Not a running tensor.
        dtype: Of the cotangent that it belongs to.
        factors: Running tensors of the loop's shape; the entry is their product.
        scale: A number that it is multiplied by.
        target: Element of the value at each point; None if the first axes say it.
        table: A waist whose elements are meant by rows; None for rows of J.
    """

    loop: Shape
    rows: Tensor
    dtype: torch.dtype
    factors: tuple[Tensor, ...] = ()
    scale: float = 1.0
    target: Tensor | None = None
    table: Waist | None = None

    @property
    def support(self) -> frozenset[int]:
        """Axes along which a factor changes."""
        return frozenset().union(*map(changing, self.factors))

    @property
    def size(self) -> int:
        """Numbers that its product has."""
        return math.prod(self.loop[a] for a in self.support)


@dataclass(frozen=True, slots=True, eq=False)
class Adjoint:
    """A linear function of the cotangent.

    Attributes:
        shape: Shape of the value.
        terms: Added up.
    """

    shape: Shape
    terms: tuple[Term, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Waist:
    """A value whose elements take the place of rows.

    Attributes:
        number: Later ones have higher numbers.
        adjoint: Its own adjoint.
    """

    number: int
    adjoint: Adjoint


def even(places: Tensor) -> tuple[int, list[int]] | None:
    """The first of some numbers and the step along each axis, if they are evenly spaced."""
    start = int(places[(0,) * places.ndim])
    expected = torch.full((), start)
    steps = []
    for axis, size in enumerate(places.shape):
        step = 0
        if size > 1 and not is_free(places, axis):
            at = [0] * places.ndim
            at[axis] = 1
            step = int(places[tuple(at)]) - start
            line = [1] * places.ndim
            line[axis] = size
            expected = expected + (torch.arange(size) * step).reshape(line)
        steps.append(step)
    small = compact(places, [a for a in range(places.ndim) if is_free(places, a)])
    return (start, steps) if torch.equal(small, expected.expand(small.shape)) else None


def seed(shape: Shape, first: int, dtype: torch.dtype) -> Adjoint:
    """The cotangent of one output leaf, whose rows begin at `first`."""
    size = math.prod(shape)
    rows = torch.arange(first, first + size).reshape(shape)
    return Adjoint(shape, (Term(shape, rows, dtype),) if size else ())


def elements(term: Term, shape: Shape) -> Tensor:
    """Element of the value at each point of the loop; strides of 0 where it is the same."""
    if term.target is not None:
        return term.target.expand(term.loop)
    flat = torch.arange(math.prod(shape)).reshape(shape)
    return flat.reshape((*shape, *[1] * (len(term.loop) - len(shape)))).expand(term.loop)


def changing(tensor: Tensor) -> frozenset[int]:
    """Axes along which a tensor is not the same."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return frozenset(i for i, (size, step) in enumerate(sizes) if size > 1 and step)


def is_free(tensor: Tensor, axis: int) -> bool:
    """Whether a tensor is the same along an axis."""
    return tensor.shape[axis] == 1 or tensor.stride(axis) == 0


def compact(tensor: Tensor, axes: Sequence[int] | frozenset[int]) -> Tensor:
    """The first element along axes, which keep size 1."""
    for axis in axes:
        if tensor.shape[axis] > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def product(factors: Sequence[Tensor]) -> Tensor:
    """The product of factors of the same shape, computed once where nothing changes."""
    made = factors[0]
    for factor in factors[1:]:
        made = map_unexpanded(torch.mul, made, factor)
    return made


def entries(term: Term) -> Tensor:
    """The entries of a term, of the loop's shape."""
    if not term.factors:
        return torch.full((), term.scale, dtype=term.dtype).expand(term.loop)
    made = product(sorted(term.factors, key=lambda f: len(changing(f))))
    return made if term.scale == 1 else map_unexpanded(lambda t: t * term.scale, made)


def value(term: Term, like: Tensor) -> Tensor:
    """The entries of a term as part of the result.

    Args:
        term: The term.
        like: A tensor of the dtype of J.

    Raises:
        PlanRefused: They are complex.
    """
    made = entries(term)
    if made.is_complex() and not like.is_complex():
        raise PlanRefused("complex values are taken for real ones in a way that is not followed")
    return made if made.dtype == like.dtype else map_unexpanded(lambda t: t.to(like.dtype), made)


def scaled(term: Term, factor: Tensor) -> Term:
    """A term times a running tensor of the loop's shape.

    Factors are multiplied as long as that makes nothing larger: a small one may go with what is
    still to come.
    """
    axes = changing(factor)
    if not axes and not term.factors:
        return replace(term, factors=(factor,))
    for i, other in enumerate(term.factors):
        mine = changing(other)
        if mine == axes or (len(term.factors) > 1 and (mine >= axes or mine <= axes)):
            if mine < axes and _has_smaller_host(term, i, axes):
                continue
            made = map_unexpanded(torch.mul, other, factor)
            return replace(term, factors=(*term.factors[:i], made, *term.factors[i + 1 :]))
    return replace(term, factors=(*term.factors, factor))


def _has_smaller_host(term: Term, i: int, axes: frozenset[int]) -> bool:
    """Whether a factor can go with another one that is smaller than what changes along axes.

    A diagonal between two matrices goes with the smaller one when they are multiplied.
    """
    mine, size = changing(term.factors[i]), math.prod(term.loop[a] for a in axes)
    hosts = [changing(f) for k, f in enumerate(term.factors) if k != i]
    return any(
        mine <= host and not host <= axes and math.prod(term.loop[a] for a in host) < size
        for host in hosts
    )


def summed(term: Term, axes: Sequence[int]) -> Term:
    """The sum over axes of the loop along which rows are the same; they are gone from the loop.

    Where two factors change along them this is a matrix product.
    """
    count = math.prod(term.loop[a] for a in axes if all(is_free(f, a) for f in term.factors))
    wanted = frozenset(axes)
    outside = [f for f in term.factors if not changing(f) & wanted]
    inside = [f for f in term.factors if changing(f) & wanted]
    while len(inside) > 2:
        inside = _closest_multiplied(inside)
    inside, outside = _taken_in(inside, outside, wanted, term.loop)
    if inside:
        outside.append(_contracted(inside, wanted, term.loop))
    kept = [i for i in range(len(term.loop)) if i not in wanted]

    def without(t: Tensor) -> Tensor:
        for axis in sorted(wanted, reverse=True):
            t = t.select(axis, 0)
        return t

    loop = tuple(term.loop[i] for i in kept)
    target = None if term.target is None else without(term.target)
    made = Term(loop, without(term.rows), term.dtype, (), term.scale * count, target, term.table)
    for factor in outside:
        made = scaled(made, without(factor))
    return made


def _taken_in(
    inside: list[Tensor], outside: list[Tensor], axes: frozenset[int], loop: Shape
) -> tuple[list[Tensor], list[Tensor]]:
    """Factors that a sum leaves alone multiplied with those it does not, where these are smaller.

    Args:
        inside: Factors that change along the axes of the sum.
        outside: The others.
        axes: The axes.
        loop: Sizes of all axes.
    """
    remaining = frozenset().union(*map(changing, inside)) - axes
    result = math.prod(loop[a] for a in remaining)
    left = []
    for factor in outside:
        fits = [
            (math.prod(loop[a] for a in changing(f)), i)
            for i, f in enumerate(inside)
            if changing(factor) <= changing(f)
        ]
        if fits and min(fits)[0] <= result:
            i = min(fits)[1]
            inside = [*inside[:i], map_unexpanded(torch.mul, inside[i], factor), *inside[i + 1 :]]
        else:
            left.append(factor)
    return inside, left


def _closest_multiplied(factors: list[Tensor]) -> list[Tensor]:
    """The same with the two multiplied whose product is smallest."""
    shape = factors[0].shape
    pairs = [(i, j) for i in range(len(factors)) for j in range(i)]

    def size(pair: tuple[int, int]) -> int:
        axes = changing(factors[pair[0]]) | changing(factors[pair[1]])
        return math.prod(shape[a] for a in axes)

    i, j = min(pairs, key=size)
    rest = [f for k, f in enumerate(factors) if k not in (i, j)]
    return [*rest, map_unexpanded(torch.mul, factors[i], factors[j])]


def _contracted(factors: list[Tensor], axes: frozenset[int], loop: Shape) -> Tensor:
    """The sum of a product over axes, which keep size 1 (expanded back where others change)."""
    parts = []
    for factor in factors:
        others = frozenset().union(*(changing(f) for f in factors if f is not factor))
        alone = [a for a in axes & changing(factor) if a not in others]
        small = compact(factor, [a for a in range(len(loop)) if is_free(factor, a)])
        parts.append(small.sum(alone, keepdim=True) if alone else small)
    shape = [1 if i in axes else s for i, s in enumerate(loop)]
    if len(parts) == 1:
        return parts[0].expand(shape)
    shared = [a for a in axes if all(p.shape[a] > 1 for p in parts)]
    if not shared:
        return map_unexpanded(torch.mul, *(p.expand(shape) for p in parts))
    return _matmul(parts[0], parts[1], shared).expand(shape)


def _matmul(x: Tensor, y: Tensor, shared: Sequence[int]) -> Tensor:
    """The sum of x * y over axes that both have, by one (batched) matrix product.

    Axes are sorted into those of both that stay (batch), of x alone, of y alone, and shared.
    """
    if x.dtype != y.dtype:
        kind = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(kind), y.to(kind)
    ndim = x.ndim
    batch = [a for a in range(ndim) if x.shape[a] > 1 and y.shape[a] > 1 and a not in shared]
    left = [a for a in range(ndim) if x.shape[a] > 1 and y.shape[a] == 1]
    right = [a for a in range(ndim) if y.shape[a] > 1 and x.shape[a] == 1]
    ones = [a for a in range(ndim) if x.shape[a] == 1 and y.shape[a] == 1]
    sizes = [[t.shape[a] for a in axes] for t, axes in ((x, batch), (x, left), (y, right))]
    inner = math.prod(x.shape[a] for a in shared)
    b, m, n = map(math.prod, sizes)
    first = x.permute([*ones, *batch, *left, *right, *shared])
    second = y.permute([*ones, *batch, *left, *shared, *right])
    if batch:
        made = torch.bmm(first.reshape(b, m, inner), second.reshape(b, inner, n))
    else:
        made = torch.mm(first.reshape(m, inner), second.reshape(inner, n))
    order = [*ones, *batch, *left, *right, *shared]
    spread = [*[1] * len(ones), *sizes[0], *sizes[1], *sizes[2], *[1] * len(shared)]
    back = [order.index(i) for i in range(ndim)]
    return made.reshape(spread).permute(back)


def _gathered(run: Callable[[Tensor], Tensor], flat: Tensor, shape: Shape) -> Tensor:
    """What `run` makes of each column: it is run on positions, 0 where it fills in zeros."""
    sizes = flat.shape[:-1]
    with real_values():
        source = run(torch.arange(1, math.prod(sizes) + 1).reshape(sizes)).reshape(-1)
    padded = torch.cat([flat.new_zeros(1, flat.shape[-1]), flat.reshape(-1, flat.shape[-1])])
    return padded.index_select(0, source).reshape((*shape, flat.shape[-1]))


def moved(run: Callable[[Tensor], Tensor], tensor: Tensor, ndim: int, shape: Shape) -> Tensor:
    """Runs an operation that only moves elements on the first axes of a tensor.

    Args:
        run: The operation, from `ndim` axes to `shape`.
        tensor: What it is run on; it has axes behind those.
        ndim: Number of the axes that it acts on.
        shape: Sizes of its result.
    """
    rest = tuple(tensor.shape[ndim:])
    if not rest:
        return run(tensor)
    free = [a for a in range(ndim, tensor.ndim) if is_free(tensor, a)]
    bound = [a for a in range(ndim, tensor.ndim) if a not in free]
    small = tensor
    for axis in reversed(free):
        small = small.select(axis, 0)
    kept = [a - ndim for a in bound]
    if not bound:
        made = run(small)
    else:
        flat = small.flatten(ndim) if len(bound) > 1 else small
        try:
            made = torch.func.vmap(run, in_dims=-1, out_dims=-1)(flat)
        except RuntimeError:  # it has no batching rule: the same by positions
            made = _gathered(run, flat, shape)
        if len(bound) > 1:
            made = made.reshape((*made.shape[:-1], *(rest[a] for a in kept)))
    for axis in range(len(rest)):
        if axis not in kept:
            made = made.unsqueeze(len(shape) + axis)
    return made.expand((*shape, *rest))
