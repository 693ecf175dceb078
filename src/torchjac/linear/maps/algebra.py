"""Products, sums and transposes of maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import singledispatch
from itertools import pairwise

import torch
from torch import Tensor

from torchjac.linear.maps.build import (
    axis_sum,
    diagonal,
    gather,
    identity,
    index_map,
    reshape,
    scatter,
)
from torchjac.linear.maps.factors import ComputedFactors, Factors, plus, times, unexpanded
from torchjac.linear.maps.kinds import (
    AxisSum,
    Dense,
    Diagonal,
    IndexMap,
    LinearMap,
    Product,
    Scaled,
    Scatter,
    Sum,
    Zero,
)


def product(*maps: LinearMap) -> LinearMap:
    """The product; the last map acts first. Adjacent factors are fused where that is exact."""
    factors: list[LinearMap] = []
    for map_ in maps:
        factors.extend(map_.factors if isinstance(map_, Product) else (map_,))
    for left, right in pairwise(factors):
        assert left.shape_in == right.shape_out, f"{left.shape_in} meets {right.shape_out}"
    out, in_ = factors[0].shape_out, factors[-1].shape_in
    fused: list[LinearMap] = []
    for factor in factors:
        candidate: LinearMap | None = factor
        while candidate is not None:
            factor_or_product = candidate
            if isinstance(factor_or_product, Zero):
                return Zero(out, in_)
            candidate = _fuse(fused[-1], factor_or_product) if fused else None
            if candidate is not None:
                fused.pop()
        if not (isinstance(factor_or_product, Scaled) and factor_or_product.factor == 1):
            fused.append(factor_or_product)
    if not fused:
        return identity(in_)
    return fused[0] if len(fused) == 1 else Product(out, in_, tuple(fused))


def _fuse(left: LinearMap, right: LinearMap) -> LinearMap | None:
    """The product of two adjacent factors as one map, or None if it takes two."""
    if isinstance(left, (Scaled, Diagonal)) and isinstance(right, (Scaled, Diagonal)):
        return diagonal(left.shape_out, times(_factors(left), _factors(right)))
    if isinstance(left, IndexMap) and isinstance(right, IndexMap):
        first, second = right.run, left.run
        return IndexMap(
            left.shape_out, right.shape_in, lambda t: second(first(t)), left.fills or right.fills
        )
    if isinstance(left, AxisSum) and isinstance(right, AxisSum):
        remaining = [i for i in range(len(right.shape_in)) if i not in right.axes]
        return axis_sum(right.shape_in, [*right.axes, *(remaining[a] for a in left.axes)])
    if isinstance(left, Dense) and isinstance(right, Dense):
        if left.axes_in != right.axes_out:
            return None
        if math.prod(left.shape_in[a] for a in left.axes_in) == 0:
            return Zero(left.shape_out, right.shape_in)
        return Dense(left.shape_out, right.shape_in, left.axes_out, right.axes_in)
    if isinstance(left, Dense) and _is_nonzero_diagonal(right):
        return left
    return right if isinstance(right, Dense) and _is_nonzero_diagonal(left) else None


def _is_nonzero_diagonal(map_: LinearMap) -> bool:
    """Whether a map is diagonal without structural zeros, so that a `Dense` map absorbs it."""
    if isinstance(map_, Diagonal):
        factors = map_.factors
        return isinstance(factors, ComputedFactors) or bool(unexpanded(factors).all())
    return isinstance(map_, Scaled) and map_.factor != 0


def _factors(map_: Scaled | Diagonal) -> Factors:
    return map_.factor if isinstance(map_, Scaled) else map_.factors


def add(*maps: LinearMap) -> LinearMap:
    """The sum of maps between the same tensors. Diagonal parts become one."""
    shapes = maps[0].shape_out, maps[0].shape_in
    assert all((m.shape_out, m.shape_in) == shapes for m in maps), "the maps have other shapes"
    parts: list[LinearMap] = []
    factors: Factors = 0.0
    for map_ in maps:
        for part in map_.parts if isinstance(map_, Sum) else (map_,):
            if isinstance(part, (Scaled, Diagonal)):
                factors = plus(factors, _factors(part))
            elif not isinstance(part, Zero):
                parts.append(part)
    if isinstance(factors, Tensor) or factors != 0:
        parts.append(diagonal(shapes[0], factors))
    if not parts:
        return Zero(*shapes)
    return parts[0] if len(parts) == 1 else Sum(*shapes, tuple(parts))


@singledispatch
def transpose(map_: LinearMap) -> LinearMap:
    """The transposed map."""
    raise NotImplementedError(f"no transpose of {type(map_).__name__}")


@transpose.register(Zero)
def _(map_: Zero) -> LinearMap:
    return Zero(map_.shape_in, map_.shape_out)


@transpose.register(Scaled)
@transpose.register(Diagonal)
def _(map_: LinearMap) -> LinearMap:
    return map_


@transpose.register
def _(map_: IndexMap) -> LinearMap:
    positions = map_.positions()
    strides = zip(positions.shape, positions.stride(), strict=True)
    repeated = [i for i, (size, step) in enumerate(strides) if size > 1 and not step]
    total = axis_sum(map_.shape_out, repeated)
    index = unexpanded(positions).reshape(-1)
    if torch.equal(index, torch.arange(math.prod(map_.shape_in))):
        return product(reshape(map_.shape_in, total.shape_out), total)  # lanes stay lanes
    used = (index >= 0).nonzero().flatten()
    size = math.prod(map_.shape_in)
    return product(
        reshape(map_.shape_in, (size,)),
        scatter((size,), (len(used),), 0, index[used]),
        identity((len(index),)) if len(used) == len(index) else gather((len(index),), 0, used),
        reshape((len(index),), total.shape_out),
        total,
    )


@transpose.register
def _(map_: Scatter) -> LinearMap:
    return gather(map_.shape_out, map_.axis, map_.index)


@transpose.register
def _(map_: AxisSum) -> LinearMap:
    axes, shape = map_.axes, map_.shape_in

    def run(t: Tensor) -> Tensor:
        for axis in axes:
            t = t.unsqueeze(axis)
        return t.expand(shape)

    return index_map(run, shape, map_.shape_out, False)


@transpose.register
def _(map_: Dense) -> LinearMap:
    return Dense(map_.shape_in, map_.shape_out, map_.axes_in, map_.axes_out)


@transpose.register
def _(map_: Sum) -> LinearMap:
    return add(*(transpose(p) for p in map_.parts))


@transpose.register
def _(map_: Product) -> LinearMap:
    return product(*(transpose(f) for f in reversed(map_.factors)))


def rank_bound(map_: LinearMap) -> int:
    """Upper bound of the rank: the smallest dimension in a product."""
    if isinstance(map_, Zero):
        return 0
    if isinstance(map_, Sum):
        return min(sum(map(rank_bound, map_.parts)), *_sizes(map_))
    if isinstance(map_, Product):
        return min(map(rank_bound, map_.factors))
    return min(_sizes(map_))


def _sizes(map_: LinearMap) -> tuple[int, int]:
    return math.prod(map_.shape_out), math.prod(map_.shape_in)


def sparse_matrix(
    shape_out: Sequence[int],
    shape_in: Sequence[int],
    rows: Tensor,
    columns: Tensor,
    factors: Factors,
) -> LinearMap:
    """A sparse matrix in COO form on the last axis; the axes before it are lanes.

    Args:
        shape_out: Shape of the result.
        shape_in: Shape of the argument.
        rows: Row of each entry, shape (nnz,).
        columns: Column of each entry, shape (nnz,).
        factors: Value of each entry, shape (nnz,).
    """
    shape_in = tuple(shape_in)
    entries = (*shape_in[:-1], len(rows))
    return product(
        scatter(shape_out, entries, -1, rows),
        diagonal(entries, factors),
        gather(shape_in, -1, columns),
    )
