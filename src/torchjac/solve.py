"""One pass through the stages: structure, plan, engine, layout, and the record of it."""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch

from torchjac._torch import modes
from torchjac.capture import Program
from torchjac.engines import evaluate
from torchjac.errors import LoopWarning, PlanRefused
from torchjac.explain import Candidate, Record, remember
from torchjac.layout import Arranged, arrange
from torchjac.plan import Plan, Race, default_budget, race_for, single_pass
from torchjac.structure import Profile, Structure, analyze, collect, fingerprint, profile

_warned_of: set[str] = set()


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for beside the program itself.

    Attributes:
        entry: The public call, for the record.
        layout: Layout of the result.
        memory_budget: Bytes that a chunk may hold, or None for the default.
        key: Identifies the program among those that come again, or None to ask its graph.
    """

    entry: str
    layout: torch.layout
    memory_budget: int | None
    key: Hashable | None


@dataclass(frozen=True, slots=True)
class Ran:
    """What a record is made of, if one is asked for; holds no tensor alive.

    Attributes:
        structure: Rows and columns.
        request: What was asked for.
        race: The candidates.
        plan: The one that ran.
        passes: Passes it took.
        chunk: Most seeds that one of them carried.
        seconds: Wall time of passes and layout.
    """

    structure: Structure
    request: Request
    race: Race
    plan: Plan
    passes: int
    chunk: int
    seconds: float

    def record(self) -> Record:
        """The record for the user."""
        measured = {p: min(runs) for p, runs in self.race.measured.items()}
        return Record(
            entry=self.request.entry,
            engine=self.plan.engine,
            mode=self.plan.mode,
            passes=self.passes,
            chunk=self.chunk,
            budget=self.race.budget or self.request.memory_budget,
            rows=self.structure.m,
            columns=self.structure.n,
            batch=self.structure.batch,
            layout=self.request.layout,
            seconds=self.seconds,
            candidates=tuple(
                Candidate(str(p), predicted, measured.get(p))
                for p, predicted in self.race.predicted.items()
            ),
            refusals=tuple((str(p), reason) for p, reason in self.race.refused.items()),
        )


def solve(program: Program, request: Request) -> Arranged:
    """Computes a Jacobian and remembers what ran.

    Candidates are tried until one is not refused; the row loop never is.

    Raises:
        CoupledBatchError: Samples of a batch are not independent.
        PlanRefused: A plan was forced and cannot be run.
    """
    structure = analyze(program)
    race = _race(program, structure, request)
    if modes.needs_passes_context():
        with modes.passes((*program.outputs, *program.inputs)):
            return _run(program, structure, request, race)
    return _run(program, structure, request, race)


def _race(program: Program, structure: Structure, request: Request) -> Race:
    if structure.m <= 1 or structure.n == 0:
        return single_pass(structure)
    key = request.key
    nodes: list[Any] = []
    if key is None:
        nodes = collect(program)
        key = (*fingerprint(nodes), structure)

    def study() -> tuple[Structure, Profile, int]:
        size = profile(nodes or collect(program))
        return structure, size, request.memory_budget or default_budget(program.device)

    return race_for(
        (key, program.create_graph, program.replay is None, request.memory_budget),
        study,
        replayable=program.replay is not None and not program.create_graph,
    )


def _run(program: Program, structure: Structure, request: Request, race: Race) -> Arranged:
    while True:
        plan = race.next()
        started = perf_counter()
        try:
            arranged = arrange(
                evaluate(program, structure, plan) if structure.m and structure.n else (),
                program,
                structure,
                request.layout,
            )
        except PlanRefused as refusal:
            race.refuse(replace(plan, checked=False), str(refusal))
            _warn_of_loop(refusal)
            continue
        _synchronize(program)
        seconds = perf_counter() - started
        race.ran(plan, seconds)
        ran = Ran(structure, request, race, plan, arranged.passes, arranged.chunk, seconds)
        remember(ran.record)
        return arranged


def _synchronize(program: Program) -> None:
    """Waits for the device, where calls return before the work is done."""
    if program.device.type == "cuda":
        torch.cuda.synchronize(program.device)


def _warn_of_loop(refusal: PlanRefused) -> None:
    """Says once per operation that rows are looped over because of it."""
    operation = getattr(refusal, "operation", None)
    if operation is None or operation in _warned_of:
        return
    _warned_of.add(operation)
    warnings.warn(
        f"torchjac: torch has no batching rule for {operation}, so rows are looped over: inside "
        f"that operation or as a whole, whichever measures faster. The result is the same.",
        LoopWarning,
        stacklevel=6,
    )
