"""The clock that is injected: replaced, nested, and put back whatever happens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from torchjac.host.clock import clock, now


def stands_at(seconds: float) -> Callable[[], float]:
    return lambda: seconds


def test_the_clock_of_the_system() -> None:
    before = time.perf_counter()
    reading = now()
    assert before <= reading <= time.perf_counter()


def test_every_reading_asks_the_replacement() -> None:
    readings = iter([1.0, 2.5, 2.5])
    with clock(lambda: next(readings)):
        assert [now(), now(), now()] == [1.0, 2.5, 2.5]
    with pytest.raises(StopIteration):
        next(readings)


def test_nested() -> None:
    before = now()
    with clock(stands_at(-1.0)):
        with clock(stands_at(-2.0)):
            assert now() == -2.0
        assert now() == -1.0
    assert now() >= before


def test_after_an_error() -> None:
    before = now()
    with pytest.raises(ValueError, match="mine"), clock(stands_at(-1.0)), clock(stands_at(-2.0)):
        raise ValueError("mine")
    assert now() >= before


def test_an_error_in_the_replacement_is_the_callers() -> None:
    def broken() -> float:
        raise ValueError("mine")

    before = now()
    with clock(broken), pytest.raises(ValueError, match="mine"):
        now()
    assert now() >= before


def test_it_is_the_clock_of_the_process() -> None:
    times = []
    with clock(stands_at(-1.0)):
        thread = threading.Thread(target=lambda: times.append(now()))
        thread.start()
        thread.join()
    assert times == [-1.0]
