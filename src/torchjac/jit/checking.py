"""A context in which every result of compiled code is compared with passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_checking: ContextVar[bool] = ContextVar("torchjac_checking", default=False)

# Whether every result of compiled code is compared with passes.
is_checking: Callable[[], bool] = _checking.get


@contextmanager
def checking() -> Iterator[None]:
    """Compares every result of compiled code in this context with passes."""
    token = _checking.set(True)
    try:
        yield
    finally:
        _checking.reset(token)
