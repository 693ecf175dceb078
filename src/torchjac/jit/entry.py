"""One guarded entry: a compiled Jacobian, its tiers, and their timings."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import torch

from torchjac.call import Call
from torchjac.compiler.compiled import Compiled, Tried
from torchjac.compiler.native import kernel_seconds
from torchjac.errors import PlanRefused
from torchjac.host.costs import cost_model
from torchjac.jit import tiers
from torchjac.jit.tiers import Action, EntryEvent, EntryState, Rejected, Tier
from torchjac.record import Candidate, Counts, Record, remember


class Entry:
    """What answers the calls that one guard holds for.

    Attributes:
        state: The state of the entry (`jit.tiers`).
        was_hit: Whether it has held for a call since it was made.
    """

    def __init__(self, state: EntryState, compiled: Compiled | None = None):
        """Begins with what the compiler gives.

        Args:
            state: The first state.
            compiled: The compiled Jacobian; None for a rejected entry.
        """
        self.state = state
        self.was_hit = False
        self._lock = threading.Lock()
        self._tiers: dict[Tier, Compiled] = {}
        self._work: dict[Tier, float] = {}
        if compiled is not None:
            self._add(compiled)
        self._refused: tuple[Tried, ...] = ()

    def _add(self, compiled: Compiled) -> None:
        tier = tier_of(compiled)
        self._tiers[tier] = compiled
        self._work[tier] = cost_model().seconds(compiled.emitted.work)
        self._work[Tier.PASSES] = compiled.passes

    @classmethod
    def of(cls, compiled: Compiled, asked: bool) -> Entry:
        """The entry of a new compiled Jacobian.

        Args:
            compiled: The compiled Jacobian.
            asked: Whether the user asked for native code: then the compiler has tried it.
        """
        ready = asked or compiled.emitted.is_compiled or compiled.emitted.differentiable
        cost = math.inf if ready else kernel_seconds(compiled.programs)
        predicted = cost_model().seconds(compiled.emitted.work)
        return cls(tiers.begin(tier_of(compiled), predicted, compiled.passes, cost), compiled)

    @property
    def refused(self) -> str | None:
        """Why passes answer; None where compiled code may."""
        return self.state.reason if isinstance(self.state, Rejected) else None

    @property
    def compiled(self) -> Compiled:
        """The compiled Jacobian of the tier that answers, or of the highest there is."""
        tier = tiers.tier_to_run(self.state)
        return self._tiers.get(tier) or self._tiers[max(self._tiers)]  # type: ignore[arg-type]

    def tier(self) -> Tier:
        """The tier that answers the next call."""
        tier = tiers.tier_to_run(self.state)
        return Tier.PASSES if tier is None else tier

    def settled_native(self) -> Compiled | None:
        """The compiled Jacobian, where native code answers for good."""
        settled = isinstance(self.state, tiers.Settled) and self.state.tier is Tier.NATIVE
        return self._tiers[Tier.NATIVE] if settled else None

    def step(self, event: EntryEvent) -> Action:
        """Takes an event in; says what to do next. No thread's event is lost."""
        with self._lock:
            self.state, action = tiers.step(self.state, event)  # type: ignore[assignment]
        return action

    def of_tier(self, tier: Tier) -> Compiled:
        """The compiled Jacobian of a tier above passes."""
        return self._tiers[tier]

    def ran(self, tier: Tier, seconds: float, call: Call) -> None:
        """Takes in how long a call took, and makes native code where that is due."""
        state = self.state
        if isinstance(state, tiers.Settled) and math.isinf(state.cost):
            return  # nothing is timed, and nothing banked, any more
        if self.step(tiers.Ran(tier, seconds, self._work[tier])) is Action.MAKE_NATIVE:
            self._make_native(call)

    def _make_native(self, call: Call) -> None:
        program = self._tiers[Tier.PROGRAM]
        seconds = kernel_seconds(program.programs)
        try:
            if tiers.is_too_long(seconds):
                raise PlanRefused(
                    f"it should take {seconds:.0f} s to write; compile=True has it done"
                )
            if torch.are_deterministic_algorithms_enabled():
                raise PlanRefused("algorithms are to be deterministic, and rounding would change")
            native = program.native(call)
        except PlanRefused as refusal:
            tried = Tried(program.emitted.mode, refused=str(refusal), form="kernel")
            self._refused = (*self._refused, tried)
            self.step(tiers.Refused(str(refusal)))
            return
        self._tiers[Tier.PROGRAM] = replace(program, alternatives=())
        self._add(native)
        self.step(tiers.NativeArrived(self._work[Tier.NATIVE]))

    def leave_record(self, compiled: Compiled, entry: str, seconds: float) -> None:
        """Leaves the record of a run, which holds no result."""
        remember(lambda: self.record(compiled, entry, seconds))

    def record(self, compiled: Compiled, entry: str, seconds: float) -> Record:
        """The record of one run."""
        m, n, samples = compiled.shape
        emitted = compiled.emitted
        tried = (*self._tiers[max(self._tiers)].tried, *self._refused)
        candidates = [self._candidate(t) for t in tried if t.predicted is not None]
        passes = Candidate("passes", compiled.passes, self._measured(Tier.PASSES))
        refusals = [
            (t.form or f"accumulate {t.mode}", t.refused) for t in tried if t.refused is not None
        ]
        if emitted.refusal is not None:
            refusals.append(("compile", emitted.refusal))
        return Record(
            entry=entry,
            engine="accumulate",
            mode=emitted.form,
            passes=0,
            chunk=0,
            budget=compiled.budget,
            rows=m,
            columns=n,
            batch=samples,
            layout=compiled.output.layout,
            seconds=seconds,
            independence=None if samples is None else "proved",
            pattern=compiled.output.description,
            candidates=(*candidates, passes),
            refusals=tuple(refusals),
            counts=_counts(compiled),
        )

    def _candidate(self, tried: Tried) -> Candidate:
        assert tried.predicted is not None, "asked for only where it is known"
        measured = tried.measured
        for tier, compiled in self._tiers.items():
            if compiled.emitted.form == tried.name:
                measured = self._measured(tier) or measured
        return Candidate(f"accumulate {tried.name}", tried.predicted, measured)

    def _measured(self, tier: Tier) -> float | None:
        """Seconds of the tier's best run that counts."""
        return None if isinstance(self.state, Rejected) else self.state.contest.best(tier)


def tier_of(compiled: Compiled) -> Tier:
    """The tier of a compiled Jacobian."""
    return Tier.NATIVE if compiled.emitted.is_compiled else Tier.PROGRAM


def _counts(compiled: Compiled) -> Counts:
    work = compiled.emitted.work
    fixed, whole = compiled.emitted.fixed
    return Counts(
        operations=work.operations,
        multiplications=work.multiplications,
        bytes=work.bytes,
        constant=fixed / max(whole, 1),
        lanes=compiled.shape[2] or 1,
        waists=compiled.emitted.waists,
        blame=compiled.blame,
    )
