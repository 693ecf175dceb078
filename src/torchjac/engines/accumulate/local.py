"""Local blocks: entries that meet wherever they go are added up before they go there.

The faces of a mesh, the observations of a camera: every one has the same few entries, and several
terms give parts of one. Which these are is seen once, in the places; adding them up side by side
costs a fraction of adding them up where they end, all over memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torchjac._torch.modes import real_values

# Fewer elements than this along the common axis, or more entries for each: not worth it.
_LEAST, _MOST = 256, 1024

Part = tuple[Tensor, Tensor]


def assembled(parts: Sequence[Part]) -> list[Part]:
    """Places and values of several terms, with entries that share all of their places as one.

    Args:
        parts: Places, which are known, and running values of the same shape.
    """
    together: dict[int, list[Part]] = {}
    for part in parts:
        together.setdefault(max(part[0].shape, default=0), []).append(part)
    return [made for size, some in together.items() for made in _assembled(some, size)]


def _assembled(parts: list[Part], size: int) -> list[Part]:
    """The same for terms with an axis of this size."""
    as_they_are = [(places.reshape(-1), values.reshape(-1)) for places, values in parts]
    count = sum(places.numel() for places, _ in parts)
    if len(parts) < 2 or size < _LEAST or count > _MOST * size:
        return as_they_are
    columns: list[Part] = []
    for places, values in parts:
        axis = list(places.shape).index(size)
        with real_values():
            where = places.movedim(axis, -1).reshape(-1, size)
        flat = values.movedim(axis, -1).reshape(-1, size)
        columns += [(where[k], flat[k]) for k in range(len(where))]
    with real_values():
        groups = _alike([where for where, _ in columns])
    if len(groups) == len(columns):
        return as_they_are
    found = []
    for first, *others in groups:
        where, total = columns[first]
        for other in others:
            total = total + columns[other][1]
        found.append((where, total))
    return found


def _alike(columns: Sequence[Tensor]) -> list[list[int]]:
    """Numbers of columns that are the same, each group in order."""
    weight = np.random.default_rng(0).integers(1, 2**62, len(columns[0]), dtype=np.int64)
    groups: dict[int, list[list[int]]] = {}
    order: list[list[int]] = []
    for number, column in enumerate(columns):
        mark = int((column.numpy() * weight).sum())  # wraps around: only a first guess
        for group in groups.setdefault(mark, []):
            if torch.equal(columns[group[0]], column):
                group.append(number)
                break
        else:
            groups[mark].append([number])
            order.append(groups[mark][-1])
    return order
