"""Values scattered to positions in a flat tensor, and added up where positions coincide."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torchjac._torch.modes import real_values

_LEAST_COLUMN = 256  # positions of a column: shorter ones are not compared
_MOST_COLUMNS = 1024  # columns: more are not compared

# Positions, which are constant, and running values of the same shape.
Part = tuple[Tensor, Tensor]


def scatter(
    size: int, positions: Tensor, values: Tensor, onto: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """A flat tensor of values at positions; values with the same position are added up.

    The order of the summands is fixed here, once: the sum is the same on every run.

    Args:
        size: Number of elements of the result.
        positions: Position of each value; negative for a value that is dropped.
        values: A running tensor.
        onto: A tensor to add to, and a mask of its elements that are not zero.
    """
    with real_values():
        order = torch.argsort(positions, stable=True)
        order = order[int((positions < 0).sum()) :]
        ascending = positions[order]
        new = torch.ones(len(order), dtype=torch.bool)
        new[1:] = ascending[1:] != ascending[:-1]
        first, later = order[new], order[~new]
        every = len(first) == len(positions)
        in_order = every and torch.equal(first, torch.arange(len(positions)))
        clear = onto is None or not bool(onto[1][positions[first]].any())
        first_positions, later_positions = positions[first], positions[later]
    if len(first) == size and onto is None:  # a gather: every element is written once
        result = values if in_order else values.index_select(0, first)
    else:
        base = values.new_zeros(size) if onto is None else onto[0]
        if every:
            at, source = positions, values
        else:
            at, source = first_positions, values.index_select(0, first)
        result = base.scatter(0, at, source) if clear else base.index_add(0, at, source)
    if not len(later):
        return result
    return result.index_add(0, later_positions, values.index_select(0, later))


def coalesce(parts: Sequence[Part]) -> list[Part]:
    """Flat positions and values, of which columns with equal positions are added up first.

    A column is a slice along the longest axis of the positions.
    """
    by_size: dict[int, list[Part]] = {}
    for part in parts:
        by_size.setdefault(max(part[0].shape, default=0), []).append(part)
    return [result for size, some in by_size.items() for result in _coalesce(some, size)]


def _coalesce(parts: list[Part], size: int) -> list[Part]:
    """The same, for parts with an axis of this size."""
    flat_parts = [(positions.reshape(-1), values.reshape(-1)) for positions, values in parts]
    count = sum(positions.numel() for positions, _ in parts)
    if len(parts) < 2 or size < _LEAST_COLUMN or count > _MOST_COLUMNS * size:
        return flat_parts
    columns: list[Part] = []
    for positions, values in parts:
        axis = list(positions.shape).index(size)
        with real_values():
            rows = positions.movedim(axis, -1).reshape(-1, size)
        flat = values.movedim(axis, -1).reshape(-1, size)
        columns += [(rows[k], flat[k]) for k in range(len(rows))]
    with real_values():
        groups = _equal_columns([positions for positions, _ in columns])
    if len(groups) == len(columns):
        return flat_parts
    sums = []
    for first, *rest in groups:
        positions, total = columns[first]
        for k in rest:
            total = total + columns[k][1]
        sums.append((positions, total))
    return sums


def _equal_columns(columns: Sequence[Tensor]) -> list[list[int]]:
    """Groups of equal columns, by number, each group in order."""
    weight = np.random.default_rng(0).integers(1, 2**62, len(columns[0]), dtype=np.int64)
    groups: dict[int, list[list[int]]] = {}
    order: list[list[int]] = []
    for number, column in enumerate(columns):
        key = int((column.numpy() * weight).sum())  # wraps around, as a hash may
        for group in groups.setdefault(key, []):
            if torch.equal(columns[group[0]], column):
                group.append(number)
                break
        else:
            groups[key].append([number])
            order.append(groups[key][-1])
    return order
