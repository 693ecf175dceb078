"""Where products of a chain are taken: the order that multiplies least, by dynamic programming.

Values that everything goes through cut a program into a chain of matrices. Rows can be pulled
through the next matrix, or the chain can be split at a value: what comes before it and what comes
after it are multiplied out apart, and then with each other. This is the order of a matrix chain
(Godbole, "On efficient computation of matrix chain products", 1973), except that a matrix that is
the first of its part need not be multiplied with anything.

Orders are compared by their multiplications; `host/costs.py` predicts the seconds of the program
that is emitted. The order is exact where the matrices are dense. Where an adjoint turns out to be
sparse its splits are not made.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, fx

from torchjac.host.costs import PRODUCT_START
from torchjac.ops import Fact, having

# Points at which a chain may be split; the widest ones of a longer chain are left out.
_POINTS = 48


@dataclass(frozen=True, slots=True)
class Point:
    """What is done where a value of the chain has been reached.

    Attributes:
        closed: Values at which the chain was split, whose products are taken here, in order.
        opened: Whether the chain is split here.
    """

    closed: tuple[fx.Node, ...]
    opened: bool


def points(
    nodes: Sequence[fx.Node], cotangents: Collection[fx.Node], m: int, n: int, samples: int
) -> dict[fx.Node, Point]:
    """What is done at each value of the chain of a program.

    Args:
        nodes: Linear nodes that are needed, in order; without the cotangents.
        cotangents: Where rows enter.
        m: Number of rows.
        n: Number of columns.
        samples: Independent samples, which are products of their own.
    """
    every = inner = _separators(nodes, cotangents)
    costs = [_cost(node) // samples for node in nodes]
    sizes = [_numel(node) // samples for node in inner]
    where = {node: position for position, node in enumerate(nodes)}
    keep = _distinct(m // samples, sizes, [where[node] for node in inner], costs)
    if len(keep) > _POINTS:
        keep = sorted(sorted(keep, key=lambda i: sizes[i])[:_POINTS])
    inner, sizes = [inner[i] for i in keep], [sizes[i] for i in keep]
    if not inner:
        return {}
    ends = [*(where[node] + 1 for node in inner), len(nodes)]
    starts = [0, *ends[:-1]]
    parts = [costs[a:b] for a, b in zip(starts, ends, strict=True)]
    widths = [m // samples, *sizes, n // samples]
    splits = _splits(widths, parts)
    closed: dict[int, list[tuple[int, int]]] = {}
    for i, k, j in splits:
        closed.setdefault(j, []).append((k, i))
    opened = {k for _, k, _ in splits}
    found = {node: Point((), False) for node in every}
    for j, node in enumerate(inner, 1):
        ends_here = sorted(closed.get(j, ()), reverse=True)
        found[node] = Point(tuple(inner[k - 1] for k, _ in ends_here), j in opened)
    return found


def _separators(nodes: Sequence[fx.Node], cotangents: Collection[fx.Node]) -> list[fx.Node]:
    """Values that everything that comes later is made of."""
    position = {node: i for i, node in enumerate(nodes)}
    last = {
        node: max((position[user] for user in node.users if user in position), default=-1)
        for node in (*cotangents, *nodes)
    }
    reach = max((last[c] for c in cotangents), default=-1)  # of all values before this one
    found = []
    for i, node in enumerate(nodes):
        if reach <= i < last[node] and isinstance(node.meta.get("val"), Tensor):
            found.append(node)
        reach = max(reach, last[node])
    return found


def _distinct(
    m: int, sizes: Sequence[int], where: Sequence[int], costs: Sequence[int]
) -> list[int]:
    """The first of every run of values of the same size between which nothing is multiplied."""
    found: list[int] = []
    last, begin = m, 0
    for i, size in enumerate(sizes):
        between = max(costs[begin : where[i] + 1], default=0)
        if size and (size != last or between > size):
            found.append(i)
            last, begin = size, where[i] + 1
    return found


def _splits(widths: Sequence[int], parts: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """The best way to multiply a chain: its splits as (begin, at, end).

    Args:
        widths: Sizes of the values of the chain.
        parts: For each two neighbors what one row costs in each operation between them.
    """
    count = len(parts)
    width = np.array(widths, dtype=float)
    whole = [float(sum(part)) for part in parts]
    best = np.zeros((count + 1, count + 1))
    at = np.full((count + 1, count + 1), -1)
    for j in range(1, count + 1):
        for i in range(j - 1, -1, -1):
            if i == j - 1:  # the first operation that costs something is not multiplied by anything
                first = next((c for c in parts[i] if c > max(widths[i], widths[j])), 0)
                best[i, j] = width[i] * (whole[i] - first) + width[i] * width[j]
                continue
            pulled = best[i, j - 1] + width[i] * whole[j - 1]
            product = width[i] * width[i + 1 : j] * width[j]
            split = best[i, i + 1 : j] + best[i + 1 : j, j] + product + PRODUCT_START
            least = int(split.argmin())
            if split[least] < pulled:
                best[i, j], at[i, j] = split[least], i + 1 + least
            else:
                best[i, j] = pulled
    found, todo = [], [(0, count)]
    while todo:
        i, j = todo.pop()
        k = int(at[i, j])
        if k >= 0:
            found.append((i, k, j))
            todo += [(i, k), (k, j)]
        elif j - i > 1:
            todo.append((i, j - 1))
    return found


def _numel(node: fx.Node) -> int:
    value: Any = node.meta["val"]
    return int(value.numel())


def _cost(node: fx.Node) -> int:
    """Multiplications that pulling one row through an operation takes."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return 0
    given = [a.meta.get("val") for a in node.all_input_nodes]
    tensors = [g for g in given if isinstance(g, Tensor)]
    if node.target in _PRODUCTS and tensors:
        return int(value.numel() * tensors[-2 if len(tensors) > 1 else -1].shape[-1])
    return max([int(value.numel()), *(int(t.numel()) for t in tensors[:1])])


_PRODUCTS = having(Fact.CHAIN_PRODUCT)
