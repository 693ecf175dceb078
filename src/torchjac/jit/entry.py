"""A Jacobian that is accumulated: run, timed, checked on demand, and told about."""

from __future__ import annotations

from typing import Any

import torch

from torchjac.call import Call
from torchjac.compiler.compiled import Accumulated, Tried
from torchjac.host.clock import now
from torchjac.record import Candidate, Counts, Record, remember


def accumulate(plan: Accumulated, call: Call, entry: str, layout: torch.layout) -> Any:
    """Computes a Jacobian by its plan, and leaves a record of it; None where it is not finite."""
    started = now()
    value = plan(call)
    if value is None:
        return None
    took = now() - started
    plan.ran(took, call)
    note(plan, entry, layout, took)
    return value


def note(plan: Accumulated, entry: str, layout: torch.layout, seconds: float) -> None:
    """Leaves a record of a run, which holds no result."""
    remember(lambda: record(plan, entry, layout, seconds))


def record(plan: Accumulated, entry: str, layout: torch.layout, seconds: float) -> Record:
    """The record of one run."""
    m, n, samples = plan.shape
    emitted = plan.emitted
    candidates = [_candidate(plan, tried) for tried in plan.tried if tried.predicted is not None]
    passes = Candidate("passes", plan.predicted, min(plan.others, default=None))
    refusals = [
        (t.form or f"accumulate {t.mode}", t.refused) for t in plan.tried if t.refused is not None
    ]
    if emitted.note is not None:
        refusals.append(("compile", emitted.note))
    work = emitted.work
    fixed, whole = emitted.fixed
    return Record(
        entry=entry,
        engine="accumulate",
        mode=emitted.form,
        passes=0,
        chunk=0,
        budget=plan.budget,
        rows=m,
        columns=n,
        batch=samples,
        layout=layout,
        seconds=seconds,
        independence=None if samples is None else "proved",
        pattern=None if plan.pattern is None else f"{plan.pattern.nnz} nonzeros, global",
        candidates=(*candidates, passes),
        refusals=tuple(refusals),
        counts=Counts(
            operations=work.operations,
            multiplications=work.multiplications,
            bytes=work.bytes,
            constant=fixed / max(whole, 1),
            lanes=samples or 1,
            waists=emitted.waists,
            blame=plan.blame,
        ),
    )


def _candidate(plan: Accumulated, tried: Tried) -> Candidate:
    measured = tried.measured
    if tried.name == plan.emitted.form:
        measured = min(plan.seconds, default=measured)
    assert tried.predicted is not None
    return Candidate(f"accumulate {tried.name}", tried.predicted, measured)
