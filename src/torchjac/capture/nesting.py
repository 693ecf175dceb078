"""Knowing that a function is being differentiated by torchjac while it runs.

A Jacobian computed inside a function whose Jacobian is being computed must keep its own graph, as
nested torch.func transforms do; outside it must not (a result that holds its graph alive leaks
memory in loops).
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

import torch

_depth: ContextVar[int] = ContextVar("torchjac_depth", default=0)

# How many calls of torchjac are around.
depth: Callable[[], int] = _depth.get


def differentiating() -> bool:
    """Whether an enclosing torchjac call differentiates what happens now."""
    return depth() > 0 and torch.is_grad_enabled()


class nested:
    """Marks the evaluation of a user's function."""

    def __enter__(self) -> None:
        """Goes one level deeper."""
        self._token = _depth.set(_depth.get() + 1)

    def __exit__(self, *_: object) -> None:
        """Comes back up."""
        _depth.reset(self._token)
