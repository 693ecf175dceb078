"""Compiles the Jacobian of a function: orders of elimination are tried, the fastest is verified.

Reverse order multiplies local Jacobians beginning with the outputs; forward order begins with the
inputs, by the same sweep over the transposed program. Both split at bottlenecks. The work of each
order is counted on the operations of its program, not estimated before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from torchjac._torch import modes
from torchjac.call import Call, arguments, differentiable_variables, variables
from torchjac.capture.eager_graph import EagerGraph
from torchjac.capture.linear_program import LinearProgram
from torchjac.capture.trace import trace_function
from torchjac.compiler.accumulate.emit import elsewhere, evaluated
from torchjac.compiler.accumulate.output import Goal
from torchjac.compiler.bug_report import report
from torchjac.compiler.compiled import Compiled, Tried
from torchjac.compiler.native import compare_times, with_kernel
from torchjac.compiler.orders import Limits, eliminate, rank
from torchjac.compiler.per_sample import compile_per_sample, with_per_sample_kernel
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

# Numbers that intermediate values may have, whatever the function.
_NUMBERS = 2**21
# Numbers that intermediate values may have for each second that passes would take.
_NUMBERS_PASSES = 2e8
# Numbers that intermediate values may have for each number of the result.
_NUMBERS_RESULT = 32
# Bytes of the budget for each number that intermediate values may have.
_BUDGET_NUMBER = 16


# What operations of a program work on: whole tensors only, or a few samples of a batch as well.
Operands = Literal["any", "whole tensors"]


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a function before it is compiled, and which programs may answer it.

    Attributes:
        passes: Predicted seconds of passes.
        saved: Plans that were loaded from files.
        orders: Orders of elimination to try.
        operands: What operations of the program work on.
    """

    passes: float
    saved: tuple[Saved, ...] = ()
    orders: tuple[Mode, ...] = ("reverse", "forward")
    operands: Operands = "any"


@gc_paused()
def compile_jacobian(
    call: Call, graph: EagerGraph, request: Request, known: Known
) -> tuple[Compiled, Any]:
    """A compiled Jacobian, verified, and its value at the arguments of a call.

    Args:
        call: The function and its arguments.
        graph: The eager graph at these arguments, to verify the compiled Jacobian against.
        request: What the user asks for.
        known: What is known of the function.

    Raises:
        CaptureRefused: The derivative cannot be traced.
        PlanRefused: It cannot be accumulated, or would take too much.
        Disagrees: Passes give another Jacobian.
    """
    started = now()
    derivative = trace_function(call, KEEP)
    _check_traced(derivative)
    if request.create_graph and derivative.stops_gradients:
        raise PlanRefused(
            "gradients do not go everywhere that numbers go (detach, no_grad, custom functions), "
            "so the derivative of the result is not that of its operations"
        )
    task = _Task(call, derivative, graph, request, known, Reference(graph), started)
    with modes.ordinary_tensors():
        try:
            verified = _per_sample(task)
        except (PlanRefused, CaptureRefused, Disagrees) as refusal:
            verified = _all_samples(task)
            refused = Tried("reverse", refused=str(refusal), form="kernel of one sample")
            if graph.batch is not None:
                verified = replace(verified, tried=(*verified.tried, refused))
    nest, samples = graph.nest, graph.batch
    output = verified.output
    compiled = Compiled(
        derivative,
        verified.program,
        output,
        assembler(output, nest, graph.device),
        (derivative.m // (samples or 1), derivative.n // (samples or 1), samples),
        known.passes,
        task.budget,
        verified.tried,
        () if output.pattern is None else tuple(map(str, output.pattern.blame[:3])),
        alternatives=verified.alternatives,
    )
    return compiled, compiled.finish(verified.parts)


@dataclass(frozen=True, slots=True)
class _Task:
    """Everything that one compilation knows.

    Attributes:
        call: The function and its arguments.
        derivative: The derivative of the function.
        eager: The eager graph of the call.
        request: What the user asks for.
        known: What is known of the function.
        reference: Products of J by passes, to verify programs against.
        started: The reading of the clock at the start.
    """

    call: Call
    derivative: LinearProgram
    eager: EagerGraph
    request: Request
    known: Known
    reference: Reference
    started: float

    @property
    def budget(self) -> int:
        """Bytes that intermediate values may take."""
        return self.request.memory_budget or default_budget(self.eager.device)


@dataclass(frozen=True, slots=True)
class _Verified:
    """A program that was compared with passes.

    Attributes:
        program: The program.
        parts: The parts of the Jacobian at the arguments of the call.
        output: The output, with its pattern if it has one.
        tried: All orders and forms that were tried.
        alternatives: Programs of the other orders.
    """

    program: TensorProgram
    parts: tuple[Tensor, ...]
    output: Output
    tried: tuple[Tried, ...]
    alternatives: tuple[TensorProgram, ...] = ()


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Programs to verify.

    Attributes:
        programs: Programs of the same Jacobian, the preferred one first.
        output: The output, with its pattern if it has one.
        tried: All orders that were tried.
    """

    programs: tuple[TensorProgram, ...]
    output: Output
    tried: tuple[Tried, ...]


def _per_sample(task: _Task) -> _Verified:
    """A program for a few samples, with a kernel that runs for each sample of a batch.

    Raises:
        PlanRefused: There is no kernel, or it is predicted to be slower than tensor operations.
        Disagrees: Passes give another Jacobian.
    """
    batch, request, known = task.eager.batch, task.request, task.known
    if batch is None or not isinstance(request.output, Dense) or request.create_graph:
        raise PlanRefused("there is no batch of dense blocks without a graph")
    if (
        known.operands != "any"
        or known.saved
        or (torch.are_deterministic_algorithms_enabled() and not request.compile)
    ):
        raise PlanRefused("other operations are asked for")
    transposable = task.reference.transposable
    program, tried = compile_per_sample(
        task.call, task.derivative, batch, known.orders, transposable
    )
    return _Verified(program, _verify(program, request.output, task), request.output, tried)


def _verify(program: TensorProgram, output: Output, task: _Task) -> tuple[Tensor, ...]:
    """The parts of the Jacobian by a program, compared with passes.

    Raises:
        Disagrees: Passes give another Jacobian.
        RefusedHere: An entry is not finite.
    """
    parts = evaluated(program, arguments(task.call))
    task.reference.check(parts, output)
    return _verify_graph(program, task) if program.differentiable else parts


def _all_samples(task: _Task) -> _Verified:
    """A program of operations on whole tensors, or code that it was compiled to.

    Raises:
        PlanRefused: There is none.
        Disagrees: Passes give another Jacobian than every program.
    """
    candidates = _loaded(task) or _eliminated(task)
    programs, output, tried = candidates.programs, candidates.output, candidates.tried
    forms: Sequence[TensorProgram] = programs
    if task.request.compile and not task.request.create_graph:
        best, timings = _fastest_form(programs, arguments(task.call), task.eager.batch)
        forms = [best, *programs]
        tried = (*(t for t in tried if t.name != timings[0].name), *timings)
    for program in forms:
        if task.request.create_graph:
            program = program.with_graph()
        try:
            parts = _verify(program, output, task)
        except Disagrees as wrong:
            wrong.report = report(task.call, task.derivative, program, wrong)
            if program.form == forms[-1].form:
                raise
            tried = tuple(
                replace(t, refused=str(wrong)) if t.name == program.form else t for t in tried
            )
        else:
            break
    excluded = {program.form, *(t.name for t in tried if t.refused is not None)}
    alternatives = tuple([p for p in programs if p.form not in excluded])
    return _Verified(program, parts, output, tried, alternatives)


def _fastest_form(
    programs: Sequence[TensorProgram], inputs: Sequence[Tensor], samples: int | None
) -> tuple[TensorProgram, list[Tried]]:
    """The first program, or compiled code of one of the programs, whichever is faster.

    Tensor operations are faster where most of the work is products of matrices.
    """
    refused: list[Tried] = []
    try:
        native = with_kernel(programs, inputs, samples)
    except PlanRefused as refusal:
        refused.append(Tried(programs[0].mode, refused=str(refusal), form="kernel"))
        native = programs[0].compiled(inputs)
    ways = [programs[0], native] if native.is_compiled else [native]
    forms = {way.form: way for way in ways}
    contest = compare_times(forms, inputs)
    tried = [
        Tried(way.mode, contest.predicted[form], contest.best(form), form=form)
        for form, way in forms.items()
    ]
    return forms[contest.winner()], tried + refused


def _verify_graph(program: TensorProgram, task: _Task) -> tuple[Tensor, ...]:
    """The parts with their graph, whose derivative was compared with that of passes."""
    tensors = variables(task.call)
    count = len(task.call.leaves)
    parameters = [t for t in (*tensors[count:], *program.constants) if t.requires_grad]
    with torch.enable_grad():
        leaves = [elsewhere(x.detach()).requires_grad_() for x in tensors[:count]]
        parts = program([*leaves, *tensors[count:]])
        assert parts is not None, "it was finite before"
        task.reference.check_graph(parts, leaves, parameters)
        parts = program(differentiable_variables(task.call))
    assert parts is not None, "it was finite before"
    return parts


def _loaded(task: _Task) -> _Candidates | None:
    """The program that was loaded from a file for this derivative; None if there is none."""
    output, batched = task.request.output, task.eager.batch is not None
    for saved in task.known.saved:
        program = saved.program(task.derivative, output, batched)
        if program is None or (program.mode == "forward" and not task.reference.transposable):
            continue
        if program.samples is not None:
            try:
                program = with_per_sample_kernel(program)
            except PlanRefused:  # there is no compiler here
                continue
        seconds = cost_model().seconds(program.work)
        tried = Tried(program.mode, seconds, form=program.form)
        return _Candidates((program,), saved.output(output), (tried,))
    return None


def _eliminated(task: _Task) -> _Candidates:
    """A new program for each order of elimination, the fastest first."""
    known, derivative = task.known, task.derivative
    output = _output(task)
    size = output.size(derivative.m, derivative.n) // (task.eager.batch or 1)
    most = max(_NUMBERS, _NUMBERS_RESULT * size, known.passes * _NUMBERS_PASSES)
    most = min(int(most), task.budget // _BUDGET_NUMBER)
    limits = Limits.of(derivative, most, task.started, known.passes)
    goal = Goal(output, task.eager.batch is not None)
    transposable = task.reference.transposable
    programs = list(eliminate(task.call, derivative, transposable, goal, known.orders, limits))
    ranked, tried = rank(programs, arguments(task.call))
    return _Candidates(tuple(ranked), output, tried)


def _check_traced(derivative: LinearProgram) -> None:
    """Refuses a derivative that no program computes."""
    if derivative.writes:
        raise PlanRefused("it writes to tensors that others may read")
    if derivative.draws:
        raise PlanRefused("it draws random numbers")
    if any(g is None for g in derivative.gradients):
        raise PlanRefused("an input is not used")
    if not derivative.m or not all(s.numel() for s in derivative.column_shapes):
        raise PlanRefused("there is nothing to compute")


def _output(task: _Task) -> Output:
    """The output, with its pattern if it is sparse.

    Raises:
        PlanRefused: Samples of a batch are not proved to be independent.
    """
    output, derivative, batched = task.request.output, task.derivative, task.eager.batch is not None
    if not batched and isinstance(output, Dense):
        return output
    dependences = interpret(derivative)
    if batched and not is_batched(derivative, dependences):
        raise PlanRefused("samples are not proved to be independent")
    if isinstance(output, Dense):
        return output
    return output.of_pattern(pattern_of(derivative, dependences))
