"""The value that engines hand to layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Slab:
    """Consecutive rows, or consecutive columns, of a Jacobian.

    Attributes:
        axis: Whether the slab holds rows or columns.
        start: First row (column).
        stop: One after the last.
        values: For rows one tensor `(stop - start, [B,] *in.shape)` per input leaf, for columns
            one tensor `(stop - start, [B,] *out.shape)` per output leaf; None is all zeros.
        passes: Passes through the graph that it took.
        used: For columns, which input leaves the outputs depend on; rows show it themselves.
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
        seeds: Groups of rows or columns that they were read off.
        parts: Numbers of entries in the pattern, and their values.
        passes: Passes through the graph that it took.
        used: Which input leaves the outputs depend on, as far as these entries show.
    """

    seeds: int
    parts: tuple[tuple[Tensor, Tensor], ...]
    passes: int
    used: tuple[bool, ...]
