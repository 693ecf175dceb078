"""Entries of a flat tensor that come from many places, in one or two operations."""

from __future__ import annotations

import torch
from torch import Tensor

from torchjac._torch.modes import real_values


def placed(
    size: int, places: Tensor, values: Tensor, onto: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Values put into their places in a flat tensor, added up where they share one.

    Which value comes first is decided here, once: the sum is the same on every run.

    Args:
        size: Number of places.
        places: Place of each value; negative for those that have none.
        values: A running tensor.
        onto: What is there already, and where it is not zero.
    """
    with real_values():
        order = torch.argsort(places, stable=True)
        order = order[int((places < 0).sum()) :]
        ascending = places[order]
        new = torch.ones(len(order), dtype=torch.bool)
        new[1:] = ascending[1:] != ascending[:-1]
        first, more = order[new], order[~new]
        every = len(first) == len(places)
        as_it_is = every and torch.equal(first, torch.arange(len(places)))
        clear = onto is None or not bool(onto[1][places[first]].any())
        where, added = places[first], places[more]
    if len(first) == size and onto is None:  # gathered: nothing is written twice
        made = values if as_it_is else values.index_select(0, first)
    else:
        base = values.new_zeros(size) if onto is None else onto[0]
        picked, there = (values, places) if every else (values.index_select(0, first), where)
        made = base.scatter(0, there, picked) if clear else base.index_add(0, there, picked)
    return made.index_add(0, added, values.index_select(0, more)) if len(more) else made
