"""Tracing: a computation as a functional graph of ATen operations."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from torchjac._torch import modes
from torchjac._torch.autograd import ENGINE, NODES
from torchjac._torch.modes import MODES
from torchjac._torch.private import check_contracts, corner, private_type
from torchjac._torch.state import SETTINGS
from torchjac._torch.trace import proxies
from torchjac._torch.trace.ir import DependsOnValues, NeedsTracing, NotRecorded
from torchjac._torch.trace.observer import OBSERVING, NullObserver, Observer, next_sequence
from torchjac._torch.trace.op_traits import (
    DECOMPOSITIONS,
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
)
from torchjac._torch.trace.recorder import Recorder
from torchjac._torch.trace.recording import (
    LAZY_GRAPHS,
    Recording,
    agree,
    finish_recording,
    functionalize,
    graph_of,
    rerun,
)
from torchjac._torch.vmap import TRANSFORMS

# Errors of a trace where control flow depends on the values of tensors.
DATA_DEPENDENT: tuple[type[Exception], ...] = (
    DependsOnValues,
    private_type("torch._subclasses.fake_tensor.DataDependentOutputException", Exception),
    private_type("torch._subclasses.fake_tensor.DynamicOutputShapeException", Exception),
)
# Errors of a trace where the function has an effect that a graph cannot represent.
UNSUPPORTED: tuple[type[Exception], ...] = (
    NotRecorded,
    private_type("torch._subclasses.fake_tensor.UnsupportedOperatorException", Exception),
)


def trace(
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    *,
    parameters_vary: bool,
    keep: Collection[Any],
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[fx.GraphModule, dict[int, str]]:
    """Runs a function of tensors and records its operations, backward passes included.

    The graph is functional: in-place operations are rewritten.

    Args:
        function: Takes an `Observer`, which must be active while a user's code runs, and the
            tensors; returns a sequence of tensors or None. The function runs twice, at two points,
            and the recording at the first point must reproduce the results at the second.
        tensors: Arguments; each becomes a placeholder, as does each cotangent of the observer.
        parameters_vary: Whether control flow must not depend on values of parameters, because
            training changes them. It must never depend on values of the arguments.
        keep: Operations not to decompose.
        around: Context of each evaluation.

    Returns:
        The graph, and the line of the user's code for each sequence number.

    Raises:
        DependsOnValues: Control flow depends on values (one of `DATA_DEPENDENT`).
        NotRecorded: The function has an effect that no graph represents (one of `UNSUPPORTED`).
    """
    if not all(part.known for part in _CORNERS):
        check_contracts(*_CORNERS, DECOMPOSITIONS, LAZY_GRAPHS)
        for part in _CORNERS:
            if not part.holds():
                raise NotRecorded(str(part))
    # One trace at a time, as warning filters and random states belong to the process. With a
    # timeout, as the function may wait for another thread that traces.
    locked = _TRACE_LOCK.acquire(timeout=_LOCK_TIMEOUT)
    try:
        module, observer = _record(function, tensors, parameters_vary, keep, around)
    except NeedsTracing:
        with around():
            module, observer = proxies.trace_with_proxies(function, tensors, parameters_vary, keep)
    finally:
        if locked:
            _TRACE_LOCK.release()
    return module, _lines(observer)


@corner("torch's dispatch mode", "nothing is planned")
def RECORDING() -> bool:
    """A recorder records exactly the operations that run, with their arguments and results."""
    x = torch.linspace(1.0, 2.0, 3, dtype=torch.float64)
    outside = torch.ones(3, dtype=torch.float64)
    recorder = Recorder((), parameters_vary=False)
    input_ = recorder.input(x)
    with recorder:
        y = torch.mul(x.sin(), outside)
        view = y[1:]
        y.add_(1.0)
    x.cos()
    names = [str(call.operation) for call in recorder.calls]
    first, *_, last = recorder.calls
    return (
        names == ["aten.sin.default", "aten.mul.Tensor", "aten.slice.Tensor", "aten.add_.Tensor"]
        and first.args == (input_,)
        and recorder.calls[1].args[0] is first.results[0]
        and recorder.value(view).base is recorder.value(y).base
        and last.written == (recorder.value(y).base,)
        and recorder.value(y).base.varies
        and [c is outside for c in recorder.constants] == [True]
    )


# Corners of torch on which a trace and its guards rely.
_CORNERS = (ENGINE, NODES, MODES, SETTINGS, TRANSFORMS, RECORDING, OBSERVING)
_TRACE_LOCK = threading.RLock()
_LOCK_TIMEOUT = 10.0


def _record(
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    parameters_vary: bool,
    keep: Collection[Any],
    around: Callable[[], AbstractContextManager[None]],
) -> tuple[fx.GraphModule, Observer]:
    """Traces by the recorder, on the tensors themselves."""
    rewind = modes.save_random_states(tensors)
    try:
        with around():
            first = _run_recorded(function, tensors, Recorder(keep, parameters_vary))
    except _Failed as failed:
        raise failed.error from None
    recording = finish_recording(first.recorder, first.outputs)

    def rerun_at(arguments: Sequence[Tensor]) -> _Run:
        rewind()
        with around():
            if first.recorder.wrote_elsewhere:  # the recorder restores it
                return _run_recorded(function, arguments, Recorder(keep, parameters_vary))
            return _run_unrecorded(function, arguments, first.recorder)

    if not any(t.is_meta for t in tensors):
        reason = "what it does depends on its input in a way that cannot be seen"
        _check(recording, _run_elsewhere(rerun_at, tensors) or first, reason)
    if recording.writes:
        recording = functionalize(recording, first.arguments, keep)
        if not recording.is_random:  # functionalize reorders random draws
            _check(recording, first, "what it writes in place cannot be rewritten")
    originals = first.observer.originals
    constants = tuple(originals.get(id(c), c) for c in recording.constants)
    module = graph_of(replace(recording, constants=constants))
    module.meta[WRITES] = first.recorder.wrote_elsewhere
    module.meta[STOPS] = first.recorder.stops_gradients
    module.meta[DRAWS] = any(c.drawn_from is not None for c in first.recorder.calls)
    return module, first.observer


# Keys in the `meta` of a traced module.
WRITES = "writes"  # whether the function writes to external tensors
# Whether the function uses numbers that depend on the input without a gradient (`detach`,
# `no_grad`, custom functions).
STOPS = "stops"
DRAWS = "draws"  # whether the function draws random numbers, needed or not


def _run_elsewhere(
    run: Callable[[Sequence[Tensor]], _Run], tensors: Sequence[Tensor]
) -> _Run | None:
    """An evaluation at another point; None if the function fails at every point."""
    for point in (_distant_point, _near_point):
        with suppress(_Failed):  # the function may be undefined there
            return run([point(t) for t in tensors])
    return None


class _Failed(Exception):
    """The function itself raised an error."""

    def __init__(self, error: Exception):
        """Holds the error."""
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True, slots=True)
class _Run:
    """One evaluation: arguments with cotangents, outputs, recorder and observer."""

    arguments: tuple[Tensor, ...]
    outputs: Sequence[Tensor | None]
    recorder: Recorder
    observer: Observer


def _run_recorded(
    function: Callable[..., Any], tensors: Sequence[Tensor], recorder: Recorder
) -> _Run:
    observer = Observer(recorder)
    for tensor in tensors:
        recorder.input(tensor)
    try:
        with warnings.catch_warnings(), proxies.uncompiled(), recorder:
            warnings.simplefilter("ignore")  # warnings appear when the function runs for the user
            outputs = function(observer, *tensors)
    except Exception as error:
        if not _refusals(recorder, observer):
            raise _Failed(error) from error
    finally:
        recorder.restore()
    # Raised here even if the function caught them.
    for refusal in [*_refusals(recorder, observer), *recorder.failures]:
        raise refusal
    return _Run((*tensors, *recorder.cotangents), outputs, recorder, observer)


def _run_unrecorded(
    function: Callable[..., Any], tensors: Sequence[Tensor], recorder: Recorder
) -> _Run:
    """As `_run_recorded`, without recording."""
    observer = NullObserver()
    try:
        with warnings.catch_warnings(), proxies.uncompiled():
            warnings.simplefilter("ignore")
            outputs = function(observer, *tensors)
    except Exception as error:
        raise _Failed(error) from error
    finally:
        recorder.restore()  # generators
    return _Run((*tensors, *observer.cotangents), outputs, recorder, Observer(recorder))


def _refusals(recorder: Recorder, observer: Observer) -> list[Exception]:
    return [*recorder.refusals, *observer.refusals]


def _check(recording: Recording, run: _Run, reason: str) -> None:
    """Runs a recording on the arguments of an evaluation, and compares the results.

    Raises:
        NotRecorded: The results differ.
    """
    again = rerun(recording, run.arguments)
    run.recorder.restore()
    if not agree(run.outputs, again):
        raise NotRecorded(reason)


def _distant_point(tensor: Tensor) -> Tensor:
    """Another point in the range of this one, where values that a trace froze are wrong."""
    if not tensor.numel() or 0 in tensor.stride():
        return tensor.detach().clone()
    generator = torch.Generator(tensor.device).manual_seed(0)
    weight = torch.rand(tensor.shape, generator=generator, device=tensor.device)
    weight = 0.2 + 0.6 * weight.to(tensor.dtype)
    flat = tensor.detach().reshape(-1)
    other = flat.roll(flat.numel() // 3 + 1).reshape(tensor.shape)
    point = torch.lerp(tensor.detach(), other, weight) * (0.9 + 0.2 * weight)
    if not point.is_complex() and bool((tensor < 0).any() & (tensor > 0).any()):
        point = torch.where(weight.flip(0) > 0.5, point, -point) if point.ndim else -point
    return torch.empty_like(tensor).copy_(point)


def _near_point(tensor: Tensor) -> Tensor:
    """A point close to this one, where a function is most often defined if it is here."""
    return tensor.detach() * 0.999


def _lines(observer: Observer) -> dict[int, str]:
    lines: dict[int, str] = {}
    for start, stop, file, line in observer.calls:
        for number in range(start, stop):
            lines.setdefault(number, f"{file}:{line}")
    return lines


@contextmanager
def with_sequence_numbers(
    nodes: Iterable[Any], observer: Observer | NullObserver
) -> Iterator[None]:
    """A context in which recorded operations carry the sequence number of their autograd node."""
    handles = []
    for node in nodes if isinstance(observer, Observer) else ():

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
    """Sequence number that a traced operation shares with its forward operation, or None."""
    return node.meta.get("seq_nr")


def is_random(op: Any) -> bool:
    """Whether an operation draws random numbers."""
    return isinstance(op, OpOverload) and torch.Tag.nondeterministic_seeded in op.tags


__all__ = [
    "DATA_DEPENDENT",
    "DRAWS",
    "STOPS",
    "UNSUPPORTED",
    "WRITES",
    "HigherOrderOperator",
    "Observer",
    "OpOverload",
    "OpOverloadPacket",
    "is_random",
    "next_sequence",
    "sequence_of",
    "trace",
    "with_sequence_numbers",
]
