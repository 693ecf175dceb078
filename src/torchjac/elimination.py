"""How a plan of the accumulate engine is made: orders of elimination are tried, one is chosen.

Reverse: local Jacobians are multiplied beginning with the outputs; forward: with the inputs, by
the same walk over the transposed program. Either stops at waists. What each order takes is
counted exactly on the operations that it leaves, not estimated before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from torchjac._torch import modes
from torchjac._torch.pytree import flatten
from torchjac.accumulated import Accumulated, Tried
from torchjac.capture import Call, Program
from torchjac.capture.derivative import (
    Derivative,
    arguments,
    trace_function,
    trace_transposed,
    variables,
)
from torchjac.compilation import faster, timed, with_kernel
from torchjac.engines.accumulate import Emitted, Mode, Target, elsewhere, emit, evaluated
from torchjac.engines.accumulate.check import Reference
from torchjac.errors import CaptureRefused, Disagrees, NotKnownLinear, PlanRefused, RefusedHere
from torchjac.layout.nested import finisher
from torchjac.plan import default_budget
from torchjac.plan.machine import calibrated, machine
from torchjac.report import report
from torchjac.saved import Saved
from torchjac.structure import Pattern
from torchjac.structure.detect import KEEP
from torchjac.structure.interpret import interpret
from torchjac.structure.lanes import is_batched
from torchjac.structure.pattern import pattern_of

# Numbers that intermediate values may have for each second that passes would take, and at least.
_NUMBERS, _LEAST = 2e8, 2**21
# Or for each number of the result.
_TIMES = 32
# Seconds that it may take to plan: at least, for each second that passes would take, and for each
# operation of the derivative.
_LIMIT, _SECONDS, _NODE = 1.0, 4.0, 4e-3
# Orders whose predictions differ less than this are both timed, as often as this.
_CLOSE, _RUNS = 4.0, 3
# The second order is tried where the first took less than this share of the time there is.
_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a plan is made for.

    Attributes:
        layout: Layout of the result.
        budget: Bytes that intermediate values may take, or None for the default.
        predicted: Seconds that passes would take.
        compiled: Whether the operations are to be compiled.
        differentiable: Whether the result is to keep its graph.
        saved: Plans that were loaded.
        orders: Orders of elimination to try.
    """

    layout: torch.layout = torch.strided
    budget: int | None = None
    predicted: float = 0.0
    compiled: bool = False
    differentiable: bool = False
    saved: tuple[Saved, ...] = ()
    orders: tuple[Mode, ...] = ("reverse", "forward")


@dataclass(frozen=True, slots=True)
class _Limits:
    """What planning may take: numbers that intermediate values have, and a point in time."""

    most: int
    deadline: float


def planned(call: Call, program: Program, wanted: Wanted) -> tuple[Accumulated, Any]:
    """A plan for a function, checked, and the Jacobian at these arguments.

    Args:
        call: The function and its arguments.
        program: Its graph at these arguments, to check the plan against.
        wanted: What the plan is made for.

    Raises:
        CaptureRefused: The derivative cannot be traced.
        PlanRefused: It cannot be accumulated, or would take too much.
        Disagrees: It gives something else than autograd.
    """
    started = perf_counter()
    derivative = trace_function(call, KEEP)
    _refuse_beforehand(derivative)
    if wanted.differentiable and derivative.stops_gradients:
        raise PlanRefused(
            "gradients do not go everywhere that numbers go (detach, no_grad, custom functions), "
            "so the derivative of the result is not that of its operations"
        )
    inputs, reference = arguments(call), Reference(program)
    with modes.ordinary_tensors():
        made = _loaded(derivative, program, wanted, reference)
        if made is None:
            made = _eliminated(call, derivative, program, wanted, reference, started)
        programs, pattern, tried = made
        ways: Sequence[Emitted] = programs
        if wanted.compiled and not wanted.differentiable:
            best, timings = _compiled(programs, inputs, program.batch)
            ways = [best, *programs]
            tried = (*(t for t in tried if t.name != timings[0].name), *timings)
        for emitted in ways:
            if wanted.differentiable:
                emitted = emitted.with_graph()
            try:
                parts = evaluated(emitted, inputs)
                reference.check(parts, pattern)
                if wanted.differentiable:
                    parts = _twice(emitted, call, reference)
            except Disagrees as wrong:
                wrong.report = report(call, derivative, emitted, wrong)
                if emitted.form == ways[-1].form:
                    raise
                tried = tuple(
                    replace(t, refused=str(wrong)) if t.name == emitted.form else t for t in tried
                )
            else:
                break
    nest, samples = program.nest, program.batch
    wrong_ones = {t.name for t in tried if t.refused is not None}
    plan = Accumulated(
        derivative,
        emitted,
        pattern,
        finisher(pattern, wanted.layout, nest.output_spec, nest.input_spec),
        (derivative.m // (samples or 1), derivative.n // (samples or 1), samples),
        wanted.predicted,
        wanted.budget or default_budget(program.device),
        tried,
        () if pattern is None else tuple(map(str, pattern.blame[:3])),
        alternatives=tuple([p for p in programs if p.form not in {emitted.form, *wrong_ones}]),
    )
    return plan, plan.finish(parts)


def _compiled(
    programs: Sequence[Emitted], inputs: Sequence[Tensor], samples: int | None
) -> tuple[Emitted, list[Tried]]:
    """A program as compiled code, or as it is where that is faster (most of it are products)."""
    refused: list[Tried] = []
    try:
        made = with_kernel(programs, inputs, samples)
    except PlanRefused as refusal:
        refused.append(Tried(programs[0].mode, refused=str(refusal), form="kernel"))
        made = programs[0].compiled(inputs)
    ways = [programs[0], made] if made.is_compiled else [made]
    best, seconds = faster(ways, inputs)
    tried = [
        Tried(way.mode, machine().seconds(way.work), took, form=way.form)
        for way, took in zip(ways, seconds, strict=True)
    ]
    return best, tried + refused


def _twice(emitted: Emitted, call: Call, reference: Reference) -> tuple[Tensor, ...]:
    """The result with its graph, whose derivative is compared with that of passes first."""
    given = variables(call)
    count = len(flatten(call.differentiated())[0])
    beside = [t for t in (*given[count:], *emitted.constants) if t.requires_grad]
    with torch.enable_grad():
        leaves = [elsewhere(x.detach()).requires_grad_() for x in given[:count]]
        found = emitted([*leaves, *given[count:]])
        assert found is not None, "it was finite before"
        reference.check_graph(found, leaves, beside)
        found = emitted(given)
    assert found is not None, "it was finite before"
    return found


# Programs, the one to be preferred first, the pattern of a sparse result, and what was tried.
_Made = tuple[Sequence[Emitted], Pattern | None, tuple[Tried, ...]]


def _loaded(
    derivative: Derivative, program: Program, wanted: Wanted, reference: Reference
) -> _Made | None:
    """The plan that was loaded for this program, if there is one."""
    for saved in wanted.saved:
        emitted = saved.emitted(derivative, wanted.layout, program.batch is not None)
        if emitted is not None and (emitted.mode == "reverse" or reference.pushes):
            tried = Tried(emitted.mode, machine().seconds(emitted.work))
            return [emitted], saved.pattern, (tried,)
    return None


def _eliminated(
    call: Call,
    derivative: Derivative,
    program: Program,
    wanted: Wanted,
    reference: Reference,
    started: float,
) -> _Made:
    """A new plan."""
    pattern = _pattern(derivative, program, wanted)
    budget = wanted.budget or default_budget(program.device)
    size = pattern.nnz if pattern is not None else derivative.m * derivative.n
    size //= program.batch or 1
    most = max(_LEAST, _TIMES * size, wanted.predicted * _NUMBERS)
    limit = _LIMIT + _SECONDS * wanted.predicted + _NODE * len(derivative.module.graph.nodes)
    limits = _Limits(min(int(most), budget // 16), started + limit)
    target = Target(pattern, program.batch is not None)

    def traced(mode: Mode) -> Derivative:
        if mode == "reverse":
            return derivative
        if not reference.pushes:
            raise PlanRefused("the derivative of its backward pass is not known to be J")
        return trace_transposed(call, KEEP)

    ways = list(_ways(call, traced, target, wanted.orders, limits))
    programs, tried = _ranked(ways, arguments(call))
    return programs, pattern, tried


def _refuse_beforehand(derivative: Derivative) -> None:
    if derivative.writes:
        raise PlanRefused("it writes to tensors that others may read")
    if any(g is None for g in derivative.gradients):
        raise PlanRefused("an input is not used")
    if not derivative.m or not all(s.numel() for s in derivative.column_shapes):
        raise PlanRefused("there is nothing to compute")


def _pattern(derivative: Derivative, program: Program, wanted: Wanted) -> Pattern | None:
    """The pattern of a sparse result. That samples are independent is proved first."""
    sparse, batched = wanted.layout is not torch.strided, program.batch is not None
    if not sparse and not batched:
        return None
    found = interpret(derivative)
    if batched and not is_batched(derivative, found):
        raise PlanRefused("samples are not proved to be independent")
    return pattern_of(derivative, found) if sparse else None


def _ways(
    call: Call,
    trace: Callable[[Mode], Derivative],
    target: Target,
    orders: Sequence[Mode],
    limits: _Limits,
) -> Iterator[tuple[Mode, Emitted | str]]:
    """A program for each order of elimination, or why there is none."""
    started, inputs = perf_counter(), arguments(call)
    for mode in orders:
        now = perf_counter()
        if mode != orders[0] and now - started > _SHARE * (limits.deadline - now):
            yield mode, "there was no time left to try it"
            return
        try:
            traced = trace(mode)
            if any(g is None for g in traced.cotangents):
                raise PlanRefused("a gradient does not depend on the cotangent")
            left = limits.deadline - perf_counter()
            yield mode, emit(traced, inputs, replace(target, mode=mode), limits.most, left)
        except (RefusedHere, NotKnownLinear):
            raise
        except (PlanRefused, CaptureRefused) as refusal:
            yield mode, str(refusal)
        except Exception as error:  # the other order, or passes, give the result; this is noted
            yield mode, f"{type(error).__name__}: {error}"


def _ranked(
    ways: Sequence[tuple[Mode, Emitted | str]], inputs: Sequence[Tensor]
) -> tuple[list[Emitted], tuple[Tried, ...]]:
    """Programs, the fastest first: as predicted, and as measured where that is close."""
    refused = [Tried(mode, refused=way) for mode, way in ways if isinstance(way, str)]
    programs = [way for _, way in ways if not isinstance(way, str)]
    if not programs:
        raise PlanRefused(str(refused[0].refused))
    costs = calibrated()
    predicted = {way.mode: costs.seconds(way.work) for way in programs}
    best = min(predicted.values())
    tried = {}
    for way in programs:
        seconds = predicted[way.mode]
        close = len(programs) > 1 and seconds < _CLOSE * best
        tried[way.mode] = Tried(way.mode, seconds, timed(way, inputs, _RUNS) if close else None)

    def rank(way: Emitted) -> float:
        return tried[way.mode].measured or predicted[way.mode] * _CLOSE

    return sorted(programs, key=rank), (*tried.values(), *refused)
