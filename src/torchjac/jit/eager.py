"""Evaluates a Jacobian by passes: structure, plan, passes, layout, and the record."""

from __future__ import annotations

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
    warn,
)
from torchjac.host.clock import now
from torchjac.host.memory import default_budget
from torchjac.layout.arrange import Arranged, arrange
from torchjac.passes.autograd_graph import Profile, profile
from torchjac.passes.modes import evaluate
from torchjac.passes.plan import Batching, Plan
from torchjac.passes.race import Race, race_for, single_pass
from torchjac.passes.structure import Structure, analyze
from torchjac.record import Candidate, Record, set_last_record
from torchjac.request import Request, Sparse

_warned_operations: set[str] = set()


@dataclass(frozen=True, slots=True)
class PassRun:
    """The data of a record, which is made only when the user reads it; holds no tensor alive.

    Attributes:
        structure: Rows and columns, without the graph.
        entry: The public call.
        layout: Layout of the result.
        budget: Bytes that the user allows; None for the default.
        race: The candidates.
        plan: The plan that ran.
        passes: Number of passes.
        chunk: Largest number of seeds in one pass.
        seconds: Wall time of passes and layout.
        pattern: The pattern that passes were restricted to, in words; None without one.
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
        """The record of this run."""
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


def evaluate_passes(
    eager_graph: EagerGraph,
    request: Request,
    key: Hashable | None = None,
    independent: bool = False,
) -> Arranged:
    """The Jacobian of an eager graph by passes; leaves a record.

    Candidates run in turn until one is not refused; the row loop never is.

    Args:
        eager_graph: The eager graph to differentiate.
        request: The options of the user, with the pattern of the output if it is known.
        key: Identifies the function, whose measurements are shared; None for tensors of a graph.
        independent: Whether the samples of the batch are proved to be independent.

    Raises:
        CoupledBatchError: Samples of a batch are not independent.
        PlanRefused: A forced plan is refused.
        TorchjacError: The Jacobian has to be differentiable, and torch.compile made the function.
    """
    output = request.output
    if output.pattern is not None:  # the pattern covers all samples: no axis is a batch
        eager_graph = replace(eager_graph, batch=None)
    structure = analyze(eager_graph, output.pattern, independent)
    if eager_graph.create_graph and structure.graph and not structure.graph.differentiable:
        raise TorchjacError(
            "torchjac: the function was compiled by torch.compile, whose backward torch cannot "
            "differentiate again, so create_graph=True, nested Jacobians and Hessians are not "
            "possible. Use the function as it was before torch.compile."
        )
    try:
        return _evaluate_structure(eager_graph, structure, request, key)
    except PatternMissed as missed:
        if isinstance(output, Sparse) and output.user_pattern is not None:
            raise
        warn(
            f"{missed} torchjac found this pattern itself: please report the function. The rows "
            f"are evaluated without it.",
            PatternWarning,
        )
    except CompressionFailed as failed:
        warn(
            f"torchjac: {failed}. The rows are evaluated without a pattern.",
            PatternWarning,
        )
    assert isinstance(output, Sparse), "a dense output has no pattern"
    request = replace(request, output=output.of_pattern(None))
    return evaluate_passes(eager_graph, request, key, independent)


def _evaluate_structure(
    eager_graph: EagerGraph, structure: Structure, request: Request, key: Hashable | None
) -> Arranged:
    race = _race_of(eager_graph, structure, request, key)
    if modes.needs_passes_context():
        with modes.passes((*eager_graph.outputs, *eager_graph.inputs)):
            return _run_candidates(eager_graph, structure, request, race)
    return _run_candidates(eager_graph, structure, request, race)


def _race_of(
    eager_graph: EagerGraph, structure: Structure, request: Request, key: Hashable | None
) -> Race:
    graph = structure.graph
    if modes.tracing(eager_graph.inputs):
        if structure.batch is not None:
            raise ArgumentError(
                "torchjac: batched=True needs real values (independence of the samples is tested "
                "on them), got fake, meta or traced tensors. Use torch.vmap(torchjac.jacobian(f))."
            )
        return single_pass(structure)
    if graph is None:
        return single_pass(structure)

    def analyze_graph() -> tuple[Structure, Profile, int]:
        budget = request.memory_budget or default_budget(eager_graph.device)
        shapes_only = replace(structure.without_graph(), pattern=structure.pattern)
        return shapes_only, profile(eager_graph, graph), budget

    shapes = (structure.rows, structure.columns, structure.batch)
    pattern = structure.pattern
    context = (
        eager_graph.create_graph,
        eager_graph.replay is None,
        request.memory_budget,
        None if pattern is None else pattern.digest,
        structure.independent,
    )
    return race_for(
        (key, graph.kind, shapes, context),
        analyze_graph,
        replayable=eager_graph.replay is not None and not eager_graph.create_graph,
    )


def _run_candidates(
    eager_graph: EagerGraph, structure: Structure, request: Request, race: Race
) -> Arranged:
    refused: dict[Plan, PlanRefused] = {}
    while True:
        try:
            plan = race.next(refused)
        except PlanRefused as no_candidate:
            raise next(reversed(refused.values()), no_candidate) from None
        started = now()
        try:
            arranged = arrange(
                evaluate(eager_graph, structure, plan) if structure.m and structure.n else (),
                eager_graph,
                structure,
                request.output,
            )
        except PlanRefused as refusal:
            refused[replace(plan, checked=False)] = refusal
            if refusal.lasting:
                batching = _fallback_batching(plan, refusal)
                may_pass_later = refusal.user_code and refusal.operation is None
                race.refuse(replace(plan, checked=False), str(refusal), batching, may_pass_later)
                _warn_of_loop(refusal)
            continue
        except Exception:
            race.readmit(refused)  # the row loop fails as well: the refused plans may be right
            raise
        if not race.settled:
            _synchronize(eager_graph)
        seconds = now() - started
        race.record_run(plan, seconds)
        shapes_only = structure.without_graph()
        output = request.output
        run = PassRun(
            shapes_only,
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
        set_last_record(run.record)
        return replace(arranged, work=race.work)


def _independence(structure: Structure) -> str | None:
    if structure.batch is None or structure.batch < 2:
        return None
    return "proved" if structure.independent else "tested"


def _fallback_batching(plan: Plan, refusal: PlanRefused) -> Batching | None:
    """The batching to try after a refused plan; None if no other one is safe."""
    if plan.mode != "reverse" or plan.chunk == 1 or plan.batching != "functorch":
        return None
    if refusal.operation is not None:
        return "looping"
    # A custom function or hook that reads grad.data crashes the process under legacy batching.
    return None if refusal.user_code else "legacy"


def _synchronize(eager_graph: EagerGraph) -> None:
    """Waits for a CUDA device, whose calls return early, so that the clock measures its work."""
    if eager_graph.device.type == "cuda":
        torch.cuda.synchronize(eager_graph.device)


def _warn_of_loop(refusal: PlanRefused) -> None:
    """Warns once an operation that rows are looped over, because it has no batching rule."""
    operation = refusal.operation
    if operation is None or operation in _warned_operations:
        return
    _warned_operations.add(operation)
    warn(
        f"torchjac: torch has no batching rule for {operation}, so rows are looped over: inside "
        f"that operation or as a whole, whichever measures faster. The result is the same.",
        LoopWarning,
    )
