"""Garbage is collected seldom while a plan is made, and as before afterwards."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator

import pytest
import torch

import torchjac
from torchjac.compiler import compile as elimination
from torchjac.host.gc_pause import gc_paused

USUAL = (700, 10, 10)


@pytest.fixture(autouse=True)
def threshold() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(*USUAL)
    yield
    gc.set_threshold(*before)


def test_within_and_after() -> None:
    with gc_paused():
        with gc_paused():
            assert gc.get_threshold()[0] > 50_000
        assert gc.get_threshold()[0] > 50_000
    assert gc.get_threshold() == USUAL


def test_after_an_error() -> None:
    with pytest.raises(ValueError, match="mine"), gc_paused():
        raise ValueError("mine")
    assert gc.get_threshold() == USUAL


@pytest.mark.parametrize("thresholds", [(0, 10, 10), (500_000, 5, 5)])
def test_what_is_rarer_stays(thresholds: tuple[int, int, int]) -> None:
    gc.set_threshold(*thresholds)
    with gc_paused():
        assert gc.get_threshold() == thresholds
    assert gc.get_threshold() == thresholds


def test_what_somebody_sets_meanwhile_stays() -> None:
    with gc_paused():
        gc.set_threshold(123, 4, 5)
    assert gc.get_threshold() == (123, 4, 5)


def test_threads_that_overlap() -> None:
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with gc_paused():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    with gc_paused():
        leave.set()
        thread.join()
        assert gc.get_threshold()[0] > 50_000
    assert gc.get_threshold() == USUAL


def test_planning_is_within(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    trace = elimination.trace_function

    def traced(*args: object) -> object:
        seen.append(gc.get_threshold())
        return trace(*args)

    monkeypatch.setattr(elimination, "trace_function", traced)
    torchjac.jacobian(torch.sin, compile=True)(torch.rand(3))
    assert seen == [(100_000, *USUAL[1:])]
    assert gc.get_threshold() == USUAL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_process_that_is_forked_meanwhile() -> None:
    inside, leave = threading.Event(), threading.Event()

    def plans() -> None:
        with gc_paused():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=plans)
    thread.start()
    inside.wait()
    child = os.fork()
    if not child:
        with gc_paused():
            fine = gc.get_threshold()[0] > 50_000
        os._exit(0 if fine and gc.get_threshold() == USUAL else 1)
    assert os.waitpid(child, 0)[1] == 0
    leave.set()
    thread.join()
