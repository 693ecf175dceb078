"""Tracing a computation into a graph of ATen operations, and what such a graph says."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from torchjac._torch import proxies
from torchjac._torch.observer import Observer, next_sequence
from torchjac._torch.recorder import (
    DependsOnValues,
    NeedsTracing,
    NotRecorded,
    Recorder,
)
from torchjac._torch.recording import agree, functional, graph_of, recorded, rerun
from torchjac._torch.traits import HigherOrderOperator, OpOverload

# What tracing raises where the values of tensors decide what happens next.
DATA_DEPENDENT: tuple[type[Exception], ...] = (
    DependsOnValues,
    DataDependentOutputException,
    DynamicOutputShapeException,
)
UNSUPPORTED: tuple[type[Exception], ...] = (NotRecorded, UnsupportedOperatorException)


def trace(
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    *,
    parameters_vary: bool,
    keep: Collection[Any],
) -> tuple[fx.GraphModule, dict[int, str]]:
    """Runs a function of tensors and writes down the operations, gradients included.

    The graph is functional: in-place operations are rewritten.

    Args:
        function: Takes an `Observer`, to be active while a user's code runs, and the tensors;
            returns tensors (or None) in a sequence. It may run twice.
        tensors: Arguments; each becomes a placeholder, and so does each cotangent that the function
            asks the observer for.
        parameters_vary: Whether training changes what is there to be trained: its values may then
            not decide what is done next. Those of the arguments never may.
        keep: Operations not to decompose.

    Returns:
        The graph, and where in the user's code the operations with these sequence numbers were
        called.

    Raises:
        DependsOnValues: Values decide what is done next (one of `DATA_DEPENDENT`).
        NotRecorded: Something happened that a graph cannot say (one of `UNSUPPORTED`).
    """
    try:
        module, observer = _recorded(function, tensors, parameters_vary, keep)
    except NeedsTracing:
        module, observer = proxies.traced(function, tensors, parameters_vary, keep)
    return module, _lines(observer)


def _recorded(
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    parameters_vary: bool,
    keep: Collection[Any],
) -> tuple[fx.GraphModule, Observer]:
    """By noting what runs, on the tensors themselves."""
    recorder = Recorder(keep, parameters_vary)
    observer = Observer(recorder)
    given = list(tensors)
    for tensor in given:
        recorder.input(tensor)
    try:
        with warnings.catch_warnings(), recorder:
            warnings.simplefilter("ignore")  # they were given when it ran for the user
            outputs = function(observer, *given)
        found = recorded(recorder, outputs)
    finally:
        recorder.restore()
        if recorder.refusals or observer.refusals:  # even if the function caught it and went on
            raise [*recorder.refusals, *observer.refusals][0]
    given += recorder.cotangents
    if found.writes:
        found = functional(found, given, keep)
    if not recorder.has_random and not agree(outputs, rerun(found, given)):
        raise NotRecorded("its gradients come about by other ways than torch's operations")
    return graph_of(found), observer


def _lines(observer: Observer) -> dict[int, str]:
    found: dict[int, str] = {}
    for start, stop, file, line in observer.calls:
        for number in range(start, stop):
            found.setdefault(number, f"{file}:{line}")
    return found


@contextmanager
def numbered(nodes: Iterable[Any], observer: Observer) -> Iterator[None]:
    """Traced operations carry the sequence number of the autograd node that ran them."""
    handles = []
    for node in nodes:

        def enter(_: Any, number: int = node._sequence_nr()) -> None:
            observer.enter(number)

        handles.append(node.register_prehook(enter))
    try:
        yield
    finally:
        observer.enter(None)
        for handle in handles:
            handle.remove()


def sequence_of(node: fx.Node) -> int | None:
    """Number that a traced operation shares with its forward operation, or None."""
    return node.meta.get("seq_nr")


def is_random(op: Any) -> bool:
    """Whether an operation draws random numbers."""
    return isinstance(op, OpOverload) and torch.Tag.nondeterministic_seeded in op.tags


__all__ = [
    "DATA_DEPENDENT",
    "UNSUPPORTED",
    "HigherOrderOperator",
    "Observer",
    "OpOverload",
    "is_random",
    "next_sequence",
    "numbered",
    "sequence_of",
    "trace",
]
