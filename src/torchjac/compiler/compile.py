"""How a plan of the accumulate engine is made: orders of elimination are tried, one is chosen.

Reverse: local Jacobians are multiplied beginning with the outputs; forward: with the inputs, by
the same sweep over the transposed program. Both split at bottlenecks. What each order takes is
counted exactly on the operations that it leaves, not estimated before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchjac._torch import modes
from torchjac.call import Call, arguments, to_differentiate, variables
from torchjac.capture.eager_graph import EagerGraph
from torchjac.capture.linear_program import LinearProgram
from torchjac.capture.trace import trace_function
from torchjac.compiler.accumulate.emit import elsewhere, evaluated
from torchjac.compiler.accumulate.output import Target
from torchjac.compiler.bug_report import report
from torchjac.compiler.compiled import Compiled, Tried
from torchjac.compiler.native import timed, with_kernel
from torchjac.compiler.orders import Limits, ranked, ways
from torchjac.compiler.per_sample import compiled_again, sampled
from torchjac.compiler.program.tensor_program import TensorProgram
from torchjac.errors import CaptureRefused, Disagrees, PlanRefused
from torchjac.host.clock import now
from torchjac.host.costs import cost_model
from torchjac.host.gc_pause import gc_paused
from torchjac.host.memory import default_budget
from torchjac.layout.nested import finisher
from torchjac.passes.verify import Reference
from torchjac.request import CompileRequest
from torchjac.sparsity.detect import KEEP
from torchjac.sparsity.interpret import interpret
from torchjac.sparsity.lanes import is_batched
from torchjac.sparsity.pattern import Pattern, pattern_of

# Numbers that intermediate values may have for each second that passes would take, and at least.
_NUMBERS, _LEAST = 2e8, 2**21
# Or for each number of the result.
_TIMES = 32
# Seconds that it may take to plan: at least, for each second that passes would take, and for each
# operation of the derivative.
_LIMIT, _SECONDS, _NODE = 1.0, 4.0, 4e-3


@gc_paused()
def planned(call: Call, program: EagerGraph, wanted: CompileRequest) -> tuple[Compiled, Any]:
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
    started = now()
    derivative = trace_function(call, KEEP)
    _refuse_beforehand(derivative)
    if wanted.differentiable and derivative.stops_gradients:
        raise PlanRefused(
            "gradients do not go everywhere that numbers go (detach, no_grad, custom functions), "
            "so the derivative of the result is not that of its operations"
        )
    reference = Reference(program)
    with modes.ordinary_tensors():
        try:
            chosen = _of_one_sample(call, derivative, program, wanted, reference)
        except (PlanRefused, CaptureRefused, Disagrees) as refusal:
            chosen = _of_all(call, derivative, program, wanted, reference, started)
            refused = Tried("reverse", refused=str(refusal), form="kernel of one sample")
            if program.batch is not None:
                chosen = replace(chosen, tried=(*chosen.tried, refused))
    nest, samples = program.nest, program.batch
    pattern = chosen.pattern
    plan = Compiled(
        derivative,
        chosen.emitted,
        pattern,
        finisher(pattern, wanted.layout, nest.output_spec, nest.input_spec),
        (derivative.m // (samples or 1), derivative.n // (samples or 1), samples),
        wanted.predicted,
        wanted.budget or default_budget(program.device),
        chosen.tried,
        () if pattern is None else tuple(map(str, pattern.blame[:3])),
        alternatives=chosen.alternatives,
    )
    return plan, plan.finish(chosen.parts)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """A program that was checked.

    Attributes:
        emitted: The program.
        parts: What it gives at the arguments.
        pattern: Of a sparse result.
        tried: What else was looked at.
        alternatives: Programs of other orders.
    """

    emitted: TensorProgram
    parts: tuple[Tensor, ...]
    pattern: Pattern | None
    tried: tuple[Tried, ...]
    alternatives: tuple[TensorProgram, ...] = ()


def _of_one_sample(
    call: Call,
    derivative: LinearProgram,
    program: EagerGraph,
    wanted: CompileRequest,
    reference: Reference,
) -> _Chosen:
    """A kernel that runs for each sample of a batch.

    Raises:
        PlanRefused: There is none, or it is not to be expected to be faster.
        Disagrees: It gives something else than autograd.
    """
    if program.batch is None or wanted.layout is not torch.strided or wanted.differentiable:
        raise PlanRefused("there is no batch of dense blocks without a graph")
    if (
        wanted.whole
        or wanted.saved
        or (torch.are_deterministic_algorithms_enabled() and not wanted.compiled)
    ):
        raise PlanRefused("other operations are asked for")
    few = sampled(call, derivative, program.batch, wanted.orders, reference.pushes)
    return _Chosen(few[0], _right(few[0], call, None, reference), None, few[1])


def _right(
    emitted: TensorProgram, call: Call, pattern: Pattern | None, reference: Reference
) -> tuple[Tensor, ...]:
    """What a program gives, compared with autograd.

    Raises:
        Disagrees: It is something else.
        RefusedHere: It is not finite.
    """
    parts = evaluated(emitted, arguments(call))
    reference.check(parts, pattern)
    return _twice(emitted, call, reference) if emitted.differentiable else parts


def _of_all(
    call: Call,
    derivative: LinearProgram,
    program: EagerGraph,
    wanted: CompileRequest,
    reference: Reference,
    started: float,
) -> _Chosen:
    """Operations on whole tensors, or what they were compiled to.

    Raises:
        PlanRefused: There are none.
        Disagrees: None gives what autograd gives.
    """
    made = _loaded(derivative, program, wanted, reference)
    if made is None:
        made = _eliminated(call, derivative, program, wanted, reference, started)
    programs, pattern, tried = made
    ways: Sequence[TensorProgram] = programs
    if wanted.compiled and not wanted.differentiable:
        best, timings = _compiled(programs, arguments(call), program.batch)
        ways = [best, *programs]
        tried = (*(t for t in tried if t.name != timings[0].name), *timings)
    for emitted in ways:
        if wanted.differentiable:
            emitted = emitted.with_graph()
        try:
            parts = _right(emitted, call, pattern, reference)
        except Disagrees as wrong:
            wrong.report = report(call, derivative, emitted, wrong)
            if emitted.form == ways[-1].form:
                raise
            tried = tuple(
                replace(t, refused=str(wrong)) if t.name == emitted.form else t for t in tried
            )
        else:
            break
    out = {emitted.form, *(t.name for t in tried if t.refused is not None)}
    others = tuple([p for p in programs if p.form not in out])
    return _Chosen(emitted, parts, pattern, tried, others)


def _compiled(
    programs: Sequence[TensorProgram], inputs: Sequence[Tensor], samples: int | None
) -> tuple[TensorProgram, list[Tried]]:
    """A program as compiled code, or as it is where that is faster (most of it are products)."""
    refused: list[Tried] = []
    try:
        made = with_kernel(programs, inputs, samples)
    except PlanRefused as refusal:
        refused.append(Tried(programs[0].mode, refused=str(refusal), form="kernel"))
        made = programs[0].compiled(inputs)
    forms = {way.form: way for way in ([programs[0], made] if made.is_compiled else [made])}
    contest = timed(forms, inputs)
    tried = [
        Tried(way.mode, contest.predicted[form], contest.best(form), form=form)
        for form, way in forms.items()
    ]
    return forms[contest.winner()], tried + refused


def _twice(emitted: TensorProgram, call: Call, reference: Reference) -> tuple[Tensor, ...]:
    """The result with its graph, whose derivative is compared with that of passes first."""
    given = variables(call)
    count = len(call.leaves)
    beside = [t for t in (*given[count:], *emitted.constants) if t.requires_grad]
    with torch.enable_grad():
        leaves = [elsewhere(x.detach()).requires_grad_() for x in given[:count]]
        found = emitted([*leaves, *given[count:]])
        assert found is not None, "it was finite before"
        reference.check_graph(found, leaves, beside)
        found = emitted(to_differentiate(call))
    assert found is not None, "it was finite before"
    return found


# Programs, the one to be preferred first, the pattern of a sparse result, and what was tried.
_Made = tuple[Sequence[TensorProgram], Pattern | None, tuple[Tried, ...]]


def _loaded(
    derivative: LinearProgram, program: EagerGraph, wanted: CompileRequest, reference: Reference
) -> _Made | None:
    """The plan that was loaded for this program, if there is one."""
    for saved in wanted.saved:
        emitted = saved.emitted(derivative, wanted.layout, program.batch is not None)
        if emitted is None or (emitted.mode == "forward" and not reference.pushes):
            continue
        if emitted.samples is not None:
            try:
                emitted = compiled_again(emitted)
            except PlanRefused:  # there is no compiler here
                continue
        tried = Tried(emitted.mode, cost_model().seconds(emitted.work), form=emitted.form)
        return [emitted], saved.pattern, (tried,)
    return None


def _eliminated(
    call: Call,
    derivative: LinearProgram,
    program: EagerGraph,
    wanted: CompileRequest,
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
    limits = Limits(min(int(most), budget // 16), started + limit)
    target = Target(pattern, program.batch is not None)

    found = list(ways(call, derivative, reference.pushes, target, wanted.orders, limits))
    programs, tried = ranked(found, arguments(call))
    return programs, pattern, tried


def _refuse_beforehand(derivative: LinearProgram) -> None:
    if derivative.writes:
        raise PlanRefused("it writes to tensors that others may read")
    if derivative.draws:
        raise PlanRefused("it draws random numbers")
    if any(g is None for g in derivative.gradients):
        raise PlanRefused("an input is not used")
    if not derivative.m or not all(s.numel() for s in derivative.column_shapes):
        raise PlanRefused("there is nothing to compute")


def _pattern(
    derivative: LinearProgram, program: EagerGraph, wanted: CompileRequest
) -> Pattern | None:
    """The pattern of a sparse result. That samples are independent is proved first."""
    sparse, batched = wanted.layout is not torch.strided, program.batch is not None
    if not sparse and not batched:
        return None
    found = interpret(derivative)
    if batched and not is_batched(derivative, found):
        raise PlanRefused("samples are not proved to be independent")
    return pattern_of(derivative, found) if sparse else None
