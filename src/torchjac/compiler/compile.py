"""How a plan of the accumulate engine is made: orders of elimination are tried, one is chosen.

Reverse: local Jacobians are multiplied beginning with the outputs; forward: with the inputs, by
the same walk over the transposed program. Either stops at waists. What each order takes is
counted exactly on the operations that it leaves, not estimated before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from torchjac._torch import modes
from torchjac.call import Call, arguments, to_differentiate, variables
from torchjac.capture.eager_graph import EagerGraph
from torchjac.capture.linear_program import LinearProgram
from torchjac.capture.trace import trace_function
from torchjac.compiler.accumulate.emit import elsewhere, evaluated
from torchjac.compiler.accumulate.output import Goal
from torchjac.compiler.bug_report import report
from torchjac.compiler.compiled import Compiled, Tried
from torchjac.compiler.native import timed, with_kernel
from torchjac.compiler.orders import Limits, ranked, ways
from torchjac.compiler.per_sample import compiled_again, sampled
from torchjac.compiler.program.tensor_program import TensorProgram
from torchjac.compiler.store import Saved
from torchjac.errors import CaptureRefused, Disagrees, PlanRefused
from torchjac.host.clock import now
from torchjac.host.costs import cost_model
from torchjac.host.gc_pause import gc_paused
from torchjac.host.memory import default_budget
from torchjac.layout.assemble import assembler
from torchjac.passes.verify import Reference
from torchjac.request import Dense, Mode, Output, Request
from torchjac.sparsity.detect import KEEP
from torchjac.sparsity.interpret import interpret
from torchjac.sparsity.lanes import is_batched
from torchjac.sparsity.pattern import pattern_of

# Numbers that intermediate values may have for each second that passes would take, and at least.
_NUMBERS, _LEAST = 2e8, 2**21
# Or for each number of the result.
_TIMES = 32
# Seconds that it may take to plan: at least, for each second that passes would take, and for each
# operation of the derivative.
_LIMIT, _SECONDS, _NODE = 1.0, 4.0, 4e-3


# What operations work on: whole tensors only, or a few samples of a batch as well.
Operands = Literal["any", "whole tensors"]


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a function before it is compiled, and how it is to be compiled.

    Attributes:
        passes: Predicted seconds of passes.
        saved: Compiled Jacobians that were loaded from files.
        orders: Orders of elimination to try.
        operands: What operations work on.
    """

    passes: float
    saved: tuple[Saved, ...] = ()
    orders: tuple[Mode, ...] = ("reverse", "forward")
    operands: Operands = "any"


@dataclass(frozen=True, slots=True)
class _Job:
    """One compilation.

    Attributes:
        call: The function and its arguments.
        derivative: Its linear program.
        program: Its eager graph, to compare results with.
        request: What the user asks for.
        known: What is known before.
        reference: Products of the Jacobian by passes.
    """

    call: Call
    derivative: LinearProgram
    program: EagerGraph
    request: Request
    known: Known
    reference: Reference

    @property
    def batch(self) -> int | None:
        """Number of independent samples; None without a batch."""
        return self.program.batch


@gc_paused()
def planned(
    call: Call, program: EagerGraph, request: Request, known: Known
) -> tuple[Compiled, Any]:
    """A plan for a function, checked, and the Jacobian at these arguments.

    Args:
        call: The function and its arguments.
        program: Its graph at these arguments, to check the plan against.
        request: What the user asks for.
        known: What is known before.

    Raises:
        CaptureRefused: The derivative cannot be traced.
        PlanRefused: It cannot be accumulated, or would take too much.
        Disagrees: It gives something else than autograd.
    """
    started = now()
    derivative = trace_function(call, KEEP)
    _refuse_beforehand(derivative)
    if request.create_graph and derivative.stops_gradients:
        raise PlanRefused(
            "gradients do not go everywhere that numbers go (detach, no_grad, custom functions), "
            "so the derivative of the result is not that of its operations"
        )
    job = _Job(call, derivative, program, request, known, Reference(program))
    with modes.ordinary_tensors():
        try:
            chosen = _of_one_sample(job)
        except (PlanRefused, CaptureRefused, Disagrees) as refusal:
            chosen = _of_all(job, started)
            refused = Tried("reverse", refused=str(refusal), form="kernel of one sample")
            if program.batch is not None:
                chosen = replace(chosen, tried=(*chosen.tried, refused))
    nest, samples = program.nest, program.batch
    output, pattern = chosen.output, chosen.output.pattern
    plan = Compiled(
        derivative,
        chosen.emitted,
        output,
        assembler(output, nest, program.device),
        (derivative.m // (samples or 1), derivative.n // (samples or 1), samples),
        known.passes,
        request.memory_budget or default_budget(program.device),
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
        output: The output, with its pattern if it has one.
        tried: What else was looked at.
        alternatives: Programs of other orders.
    """

    emitted: TensorProgram
    parts: tuple[Tensor, ...]
    output: Output
    tried: tuple[Tried, ...]
    alternatives: tuple[TensorProgram, ...] = ()


def _of_one_sample(job: _Job) -> _Chosen:
    """A kernel that runs for each sample of a batch.

    Raises:
        PlanRefused: There is none, or it is not to be expected to be faster.
        Disagrees: It gives something else than autograd.
    """
    request, known, output = job.request, job.known, job.request.output
    if job.batch is None or not isinstance(output, Dense) or request.create_graph:
        raise PlanRefused("there is no batch of dense blocks without a graph")
    if (
        known.operands != "any"
        or known.saved
        or (torch.are_deterministic_algorithms_enabled() and not request.compile)
    ):
        raise PlanRefused("other operations are asked for")
    few = sampled(job.call, job.derivative, job.batch, known.orders, job.reference.pushes)
    return _Chosen(few[0], _right(few[0], job, output), output, few[1])


def _right(emitted: TensorProgram, job: _Job, output: Output) -> tuple[Tensor, ...]:
    """What a program gives, compared with autograd.

    Raises:
        Disagrees: It is something else.
        RefusedHere: It is not finite.
    """
    parts = evaluated(emitted, arguments(job.call))
    job.reference.check(parts, output)
    return _twice(emitted, job.call, job.reference) if emitted.differentiable else parts


def _of_all(job: _Job, started: float) -> _Chosen:
    """Operations on whole tensors, or what they were compiled to.

    Raises:
        PlanRefused: There are none.
        Disagrees: None gives what autograd gives.
    """
    made = _loaded(job)
    if made is None:
        made = _eliminated(job, started)
    programs, output, tried = made
    request = job.request
    ways: Sequence[TensorProgram] = programs
    if request.compile and not request.create_graph:
        best, timings = _compiled(programs, arguments(job.call), job.batch)
        ways = [best, *programs]
        tried = (*(t for t in tried if t.name != timings[0].name), *timings)
    for emitted in ways:
        if request.create_graph:
            emitted = emitted.with_graph()
        try:
            parts = _right(emitted, job, output)
        except Disagrees as wrong:
            wrong.report = report(job.call, job.derivative, emitted, wrong)
            if emitted.form == ways[-1].form:
                raise
            tried = tuple(
                replace(t, refused=str(wrong)) if t.name == emitted.form else t for t in tried
            )
        else:
            break
    out = {emitted.form, *(t.name for t in tried if t.refused is not None)}
    others = tuple([p for p in programs if p.form not in out])
    return _Chosen(emitted, parts, output, tried, others)


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


# Programs, the one to be preferred first, the output with its pattern, and what was tried.
_Made = tuple[Sequence[TensorProgram], Output, tuple[Tried, ...]]


def _loaded(job: _Job) -> _Made | None:
    """The plan that was loaded for this program, if there is one."""
    output = job.request.output
    for saved in job.known.saved:
        emitted = saved.emitted(job.derivative, output, job.batch is not None)
        if emitted is None or (emitted.mode == "forward" and not job.reference.pushes):
            continue
        if emitted.samples is not None:
            try:
                emitted = compiled_again(emitted)
            except PlanRefused:  # there is no compiler here
                continue
        tried = Tried(emitted.mode, cost_model().seconds(emitted.work), form=emitted.form)
        return [emitted], saved.output(output), (tried,)
    return None


def _eliminated(job: _Job, started: float) -> _Made:
    """A new plan."""
    derivative, passes = job.derivative, job.known.passes
    output = _output(job)
    budget = job.request.memory_budget or default_budget(job.program.device)
    size = output.size(derivative.m, derivative.n) // (job.batch or 1)
    most = max(_LEAST, _TIMES * size, passes * _NUMBERS)
    limit = _LIMIT + _SECONDS * passes + _NODE * len(derivative.module.graph.nodes)
    limits = Limits(min(int(most), budget // 16), started + limit)
    goal = Goal(output, job.batch is not None)
    found = list(ways(job.call, derivative, job.reference.pushes, goal, job.known.orders, limits))
    programs, tried = ranked(found, arguments(job.call))
    return programs, output, tried


def _refuse_beforehand(derivative: LinearProgram) -> None:
    if derivative.writes:
        raise PlanRefused("it writes to tensors that others may read")
    if derivative.draws:
        raise PlanRefused("it draws random numbers")
    if any(g is None for g in derivative.gradients):
        raise PlanRefused("an input is not used")
    if not derivative.m or not all(s.numel() for s in derivative.column_shapes):
        raise PlanRefused("there is nothing to compute")


def _output(job: _Job) -> Output:
    """The output with its pattern. Samples of a batch are proved to be independent first.

    Raises:
        PlanRefused: They are not.
    """
    output, derivative = job.request.output, job.derivative
    if job.batch is None and isinstance(output, Dense):
        return output
    dependence = interpret(derivative)
    if job.batch is not None and not is_batched(derivative, dependence):
        raise PlanRefused("samples are not proved to be independent")
    if isinstance(output, Dense):
        return output
    return output.of_pattern(pattern_of(derivative, dependence))
