"""One pass through the stages: structure, plan, engine, layout, and the record of it."""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch

from torchjac._torch import modes
from torchjac.capture.eager_graph import EagerGraph
from torchjac.errors import (
    ArgumentError,
    CompressionFailed,
    LoopWarning,
    PatternMissed,
    PatternWarning,
    PlanRefused,
    TorchjacError,
)
from torchjac.host.clock import now
from torchjac.host.memory import default_budget
from torchjac.layout.arrange import Arranged, arrange
from torchjac.passes.autograd_graph import Profile, profile
from torchjac.passes.modes import evaluate
from torchjac.passes.plan import Batching, Plan
from torchjac.passes.race import Race, race_for, single_pass
from torchjac.passes.structure import Structure, analyze
from torchjac.record import Candidate, Record, remember
from torchjac.request import Request, Sparse

_warned_of: set[str] = set()


@dataclass(frozen=True, slots=True)
class Ran:
    """What a record is made of, if one is asked for; holds no tensor alive.

    Attributes:
        structure: Rows and columns.
        entry: The public call.
        layout: Layout of the result.
        budget: Bytes that the user allows; None for the default.
        race: The candidates.
        plan: The one that ran.
        passes: Passes it took.
        chunk: Most seeds that one of them carried.
        seconds: Wall time of passes and layout.
        pattern: The pattern that passes were restricted to, in words.
    """

    structure: Structure
    entry: str
    layout: torch.layout
    budget: int | None
    race: Race
    plan: Plan
    passes: int
    chunk: int
    seconds: float
    pattern: str | None

    def record(self) -> Record:
        """The record for the user."""
        measured = {p: min(runs) for p, runs in self.race.measured.items()}
        return Record(
            entry=self.entry,
            engine=self.plan.engine,
            mode=self.plan.mode,
            passes=self.passes,
            chunk=self.chunk,
            budget=self.race.budget or self.budget,
            rows=self.structure.m,
            columns=self.structure.n,
            batch=self.structure.batch,
            layout=self.layout,
            seconds=self.seconds,
            independence=_independence(self.structure),
            pattern=self.pattern,
            candidates=tuple(
                Candidate(str(p), predicted, measured.get(p))
                for p, predicted in self.race.predicted.items()
            ),
            refusals=tuple((str(p), reason) for p, reason in self.race.refused.items()),
        )


def solve(
    program: EagerGraph,
    request: Request,
    key: Hashable | None = None,
    independent: bool = False,
) -> Arranged:
    """Computes a Jacobian and remembers what ran.

    Candidates are tried until one is not refused; the row loop never is.

    Args:
        program: The eager graph to differentiate.
        request: What the user asks for, with the pattern of the output if it is known.
        key: Tells the functions of different callers apart; None for no function.
        independent: Whether the samples of the batch are proved to be independent.

    Raises:
        CoupledBatchError: Samples of a batch are not independent.
        PlanRefused: A plan was forced and cannot be run.
        TorchjacError: A differentiable Jacobian of a compiled function was asked for.
    """
    output = request.output
    if output.pattern is not None:  # samples are rows and columns like all others
        program = replace(program, batch=None)
    structure = analyze(program, output.pattern, independent)
    if program.create_graph and structure.graph and not structure.graph.differentiable:
        raise TorchjacError(
            "torchjac: the function was compiled by torch.compile, whose backward torch cannot "
            "differentiate again, so create_graph=True, nested Jacobians and Hessians are not "
            "possible. Use the function as it was before torch.compile."
        )
    try:
        return _solved(program, structure, request, key)
    except PatternMissed as missed:
        if isinstance(output, Sparse) and output.user_pattern is not None:
            raise
        warnings.warn(
            f"{missed} torchjac found this pattern itself: please report the function. The rows "
            f"are evaluated without it.",
            PatternWarning,
            stacklevel=4,
        )
    except CompressionFailed as failed:
        warnings.warn(
            f"torchjac: {failed}. The rows are evaluated without a pattern.",
            PatternWarning,
            stacklevel=4,
        )
    assert isinstance(output, Sparse), "a dense output has no pattern"
    request = replace(request, output=output.of_pattern(None))
    return solve(program, request, key, independent)


def _solved(
    program: EagerGraph, structure: Structure, request: Request, key: Hashable | None
) -> Arranged:
    race = _race(program, structure, request, key)
    if modes.needs_passes_context():
        with modes.passes((*program.outputs, *program.inputs)):
            return _run(program, structure, request, race)
    return _run(program, structure, request, race)


def _race(
    program: EagerGraph, structure: Structure, request: Request, key: Hashable | None
) -> Race:
    graph = structure.graph
    if modes.tracing(program.inputs):
        if structure.batch is not None:
            raise ArgumentError(
                "torchjac: batched=True needs real values (independence of the samples is tested "
                "on them), got fake, meta or traced tensors. Use torch.vmap(torchjac.jacobian(f))."
            )
        return single_pass(structure)
    if graph is None:
        return single_pass(structure)

    def study() -> tuple[Structure, Profile, int]:
        budget = request.memory_budget or default_budget(program.device)
        light = replace(structure.without_graph(), pattern=structure.pattern)
        return light, profile(program, graph), budget

    shapes = (structure.rows, structure.columns, structure.batch)
    pattern = structure.pattern
    context = (
        program.create_graph,
        program.replay is None,
        request.memory_budget,
        None if pattern is None else pattern.digest,
        structure.independent,
    )
    return race_for(
        (key, graph.kind, shapes, context),
        study,
        replayable=program.replay is not None and not program.create_graph,
    )


def _run(program: EagerGraph, structure: Structure, request: Request, race: Race) -> Arranged:
    refused: dict[Plan, PlanRefused] = {}
    while True:
        try:
            plan = race.next(refused)
        except PlanRefused as nothing_left:
            raise next(reversed(refused.values()), nothing_left) from None
        started = now()
        try:
            arranged = arrange(
                evaluate(program, structure, plan) if structure.m and structure.n else (),
                program,
                structure,
                request.output,
            )
        except PlanRefused as refusal:
            refused[replace(plan, checked=False)] = refusal
            if refusal.lasting:
                substitute = _substitute(plan, refusal)
                passing = refusal.user_code and refusal.operation is None
                race.refuse(replace(plan, checked=False), str(refusal), substitute, passing)
                _warn_of_loop(refusal)
            continue
        except Exception:
            race.readmit(refused)  # the row loop fails as well: it was not the plans' fault
            raise
        if not race.settled:
            _synchronize(program)
        seconds = now() - started
        race.record_run(plan, seconds)
        shape = structure.without_graph()
        output = request.output
        ran = Ran(
            shape,
            request.entry,
            output.layout,
            request.memory_budget,
            race,
            plan,
            arranged.passes,
            arranged.chunk,
            seconds,
            output.description,
        )
        remember(ran.record)
        return replace(arranged, work=race.work)


def _independence(structure: Structure) -> str | None:
    if structure.batch is None or structure.batch < 2:
        return None
    return "proved" if structure.independent else "tested"


def _substitute(plan: Plan, refusal: PlanRefused) -> Batching | None:
    """Another way to batch the passes of a refused plan, if there is a safe one."""
    if plan.mode != "reverse" or plan.chunk == 1 or plan.batching != "functorch":
        return None
    if refusal.operation is not None:
        return "looping"
    # A custom function or hook that reads grad.data crashes the process under legacy batching.
    return None if refusal.user_code else "legacy"


def _synchronize(program: EagerGraph) -> None:
    """Waits for the device, where calls return before the work is done (only to measure it)."""
    if program.device.type == "cuda":
        torch.cuda.synchronize(program.device)


def _warn_of_loop(refusal: PlanRefused) -> None:
    """Says once per operation that rows are looped over because of it."""
    operation = refusal.operation
    if operation is None or operation in _warned_of:
        return
    _warned_of.add(operation)
    warnings.warn(
        f"torchjac: torch has no batching rule for {operation}, so rows are looped over: inside "
        f"that operation or as a whole, whichever measures faster. The result is the same.",
        LoopWarning,
        stacklevel=6,
    )
