"""The order of products of a matrix chain that multiplies least, by dynamic programming.

Values that all later values are made of cut a program into a chain of matrices. Rows can be pulled
through the next matrix, or the chain can be split at a value: the parts before and after the value
are multiplied out apart, and then with each other. The optimal order is that of a matrix chain
(Godbole, "On efficient computation of matrix chain products", 1973), except that the first matrix
of a part need not be multiplied with anything.

The order is exact for dense matrices. Where an adjoint turns out to be sparse its splits are not
made.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, fx

from torchjac.host.costs import PRODUCT_START
from torchjac.ops import Fact, operators_with

_MOST_CUTS = 48  # values of a chain; the widest ones of a longer chain are left out


@dataclass(frozen=True, slots=True)
class Cut:
    """The products and the split at a value of the chain.

    Attributes:
        products: Values at which the chain was split and whose product is taken here, in order.
        splits: Whether the chain is split here.
    """

    products: tuple[fx.Node, ...]
    splits: bool


def cuts(
    nodes: Sequence[fx.Node], cotangents: Collection[fx.Node], m: int, n: int, samples: int
) -> dict[fx.Node, Cut]:
    """The products and splits at each value of a program's chain, of the cheapest order.

    Args:
        nodes: Linear nodes that are needed, in order; without the cotangents.
        cotangents: Nodes where rows enter.
        m: Number of rows.
        n: Number of columns.
        samples: Number of independent samples, each with products of its own.
    """
    every = chain = _separators(nodes, cotangents)
    costs = [_row_cost(node) // samples for node in nodes]
    sizes = [_numel(node) // samples for node in chain]
    position = {node: i for i, node in enumerate(nodes)}
    useful = _distinct(m // samples, sizes, [position[node] for node in chain], costs)
    if len(useful) > _MOST_CUTS:
        useful = sorted(sorted(useful, key=lambda i: sizes[i])[:_MOST_CUTS])
    chain, sizes = [chain[i] for i in useful], [sizes[i] for i in useful]
    if not chain:
        return {}
    ends = [*(position[node] + 1 for node in chain), len(nodes)]
    starts = [0, *ends[:-1]]
    matrices = [costs[a:b] for a, b in zip(starts, ends, strict=True)]
    splits = _best_splits([m // samples, *sizes, n // samples], matrices)
    products: dict[int, list[tuple[int, int]]] = {}
    for i, k, j in splits:
        products.setdefault(j, []).append((k, i))
    split = {k for _, k, _ in splits}
    by_node = {node: Cut((), False) for node in every}
    for j, node in enumerate(chain, 1):
        inner_first = sorted(products.get(j, ()), reverse=True)
        by_node[node] = Cut(tuple(chain[k - 1] for k, _ in inner_first), j in split)
    return by_node


def _separators(nodes: Sequence[fx.Node], cotangents: Collection[fx.Node]) -> list[fx.Node]:
    """Values that all later values are made of: no edge of the graph passes them by."""
    position = {node: i for i, node in enumerate(nodes)}
    last = {
        node: max((position[user] for user in node.users if user in position), default=-1)
        for node in (*cotangents, *nodes)
    }
    reach = max((last[c] for c in cotangents), default=-1)  # last user of all values so far
    separators = []
    for i, node in enumerate(nodes):
        if reach <= i < last[node] and isinstance(node.meta.get("val"), Tensor):
            separators.append(node)
        reach = max(reach, last[node])
    return separators


def _distinct(
    m: int, sizes: Sequence[int], positions: Sequence[int], costs: Sequence[int]
) -> list[int]:
    """The first of every run of values of the same size between which nothing is multiplied."""
    firsts: list[int] = []
    last, begin = m, 0
    for i, size in enumerate(sizes):
        between = max(costs[begin : positions[i] + 1], default=0)
        if size and (size != last or between > size):
            firsts.append(i)
            last, begin = size, positions[i] + 1
    return firsts


def _best_splits(
    widths: Sequence[int], matrices: Sequence[Sequence[int]]
) -> list[tuple[int, int, int]]:
    """The splits of the cheapest order of a chain, as (begin, at, end).

    Args:
        widths: Sizes of the values between the matrices, and at both ends.
        matrices: Multiplications that one row takes in each operation of each matrix.
    """
    count = len(matrices)
    width = np.array(widths, dtype=float)
    whole = [float(sum(costs)) for costs in matrices]
    best = np.zeros((count + 1, count + 1))
    at = np.full((count + 1, count + 1), -1)
    for j in range(1, count + 1):
        for i in range(j - 1, -1, -1):
            if i == j - 1:  # the first operation that is not free is not multiplied by anything
                first = next((c for c in matrices[i] if c > max(widths[i], widths[j])), 0)
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
    splits, open_parts = [], [(0, count)]
    while open_parts:
        i, j = open_parts.pop()
        k = int(at[i, j])
        if k >= 0:
            splits.append((i, k, j))
            open_parts += [(i, k), (k, j)]
        elif j - i > 1:
            open_parts.append((i, j - 1))
    return splits


def _numel(node: fx.Node) -> int:
    value: Any = node.meta["val"]
    return int(value.numel())


def _row_cost(node: fx.Node) -> int:
    """Multiplications of pulling one row through an operation."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return 0
    operands = [a.meta.get("val") for a in node.all_input_nodes]
    tensors = [x for x in operands if isinstance(x, Tensor)]
    if node.target in _PRODUCTS and tensors:
        return int(value.numel() * tensors[-2 if len(tensors) > 1 else -1].shape[-1])
    return max([int(value.numel()), *(int(x.numel()) for x in tensors[:1])])


_PRODUCTS = operators_with(Fact.CHAIN_PRODUCT)
