"""Garbage collection while plans are made: seldom.

A plan makes objects by the hundred thousand and drops few of them. Python looks through all objects
of the process every so often, those of torch among them: a fifth of the time that planning took.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# New objects after which the youngest are looked through.
_MANY = 100_000

_lock = threading.Lock()
_inside = 0
_usual: tuple[int, int, int] = gc.get_threshold()


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Makes collections a hundred times rarer in the process; threads may be in it at once.

    What somebody else sets meanwhile stays.
    """
    global _inside, _usual
    with _lock:
        _inside += 1
        if _inside == 1:
            _usual = gc.get_threshold()
            if 0 < _usual[0] < _MANY:  # 0: never
                gc.set_threshold(_MANY, *_usual[1:])
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside and gc.get_threshold() == (_MANY, *_usual[1:]):
                gc.set_threshold(*_usual)


def _in_child() -> None:
    """A process that was forked while others made plans makes none."""
    global _inside, _lock
    _lock = threading.Lock()
    if _inside and gc.get_threshold() == (_MANY, *_usual[1:]):
        gc.set_threshold(*_usual)
    _inside = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
