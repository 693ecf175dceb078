"""Nesting: whether torchjac differentiates the code that runs now.

A Jacobian inside a function under differentiation must keep its graph, as nested torch.func
transforms do. Any other Jacobian must not, as a result that keeps its graph alive leaks memory in
loops.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

import torch

_depth: ContextVar[int] = ContextVar("torchjac_depth", default=0)

# Number of enclosing calls of torchjac.
depth: Callable[[], int] = _depth.get


def differentiating() -> bool:
    """Whether an enclosing call of torchjac differentiates the running code."""
    return depth() > 0 and torch.is_grad_enabled()


class nested:
    """Marks the evaluation of a user's function."""

    def __enter__(self) -> None:
        """Enters a level."""
        self._token = _depth.set(_depth.get() + 1)

    def __exit__(self, *_: object) -> None:
        """Leaves the level."""
        _depth.reset(self._token)
