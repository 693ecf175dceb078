"""Parts of a Jacobian, from passes to layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Slab:
    """Consecutive rows, or consecutive columns, of a Jacobian.

    Attributes:
        axis: Axis of the slab: rows or columns.
        start: First row (column).
        stop: Last row (column) + 1.
        values: For rows one tensor `(stop - start, [B,] *in.shape)` per input leaf, for columns
            one tensor `(stop - start, [B,] *out.shape)` per output leaf; None is all zeros.
        passes: Number of passes through the graph that computed the slab.
        used: For columns, whether the outputs depend on each input leaf; None for rows, whose
            values are None for an unused leaf.
    """

    axis: Literal["rows", "columns"]
    start: int
    stop: int
    values: tuple[Tensor | None, ...]
    passes: int
    used: tuple[bool, ...] | None = None


@dataclass(frozen=True, slots=True)
class Entries:
    """Some entries of a Jacobian whose pattern is known.

    Attributes:
        seeds: Number of groups of rows or columns that hold the entries.
        parts: Numbers of entries in the pattern, and their values.
        passes: Number of passes through the graph that computed the entries.
        used: Whether the outputs depend on each input leaf, as far as these entries show.
    """

    seeds: int
    parts: tuple[tuple[Tensor, Tensor], ...]
    passes: int
    used: tuple[bool, ...]
