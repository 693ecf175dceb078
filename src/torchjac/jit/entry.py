"""An entry of the capture cache: a compiled Jacobian, its tiers, and their timings."""

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
from torchjac.record import Candidate, Counts, Record, set_last_record


class Entry:
    """The code that answers the calls that one guard holds for.

    Attributes:
        state: The state of the entry (`jit.tiers`).
        was_hit: Whether its guard has held for a call after the one that compiled it.
    """

    def __init__(self, state: EntryState, compiled: Compiled | None = None):
        """Starts with the tier of a compiled Jacobian.

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
        self._refused_native: tuple[Tried, ...] = ()

    def _add(self, compiled: Compiled) -> None:
        tier = tier_of(compiled)
        self._tiers[tier] = compiled
        self._work[tier] = cost_model().seconds(compiled.program.work)
        self._work[Tier.PASSES] = compiled.passes

    @classmethod
    def of(cls, compiled: Compiled, is_native_tried: bool) -> Entry:
        """The entry of a new compiled Jacobian.

        Args:
            compiled: The compiled Jacobian.
            is_native_tried: Whether the compiler has tried native code, as with `compile=True`.
        """
        final = is_native_tried or compiled.program.is_compiled or compiled.program.differentiable
        cost = math.inf if final else kernel_seconds(compiled.programs)
        predicted = cost_model().seconds(compiled.program.work)
        return cls(tiers.begin_trial(tier_of(compiled), predicted, compiled.passes, cost), compiled)

    @property
    def refused(self) -> str | None:
        """Why passes answer the calls of this entry; None if compiled code may."""
        return self.state.reason if isinstance(self.state, Rejected) else None

    @property
    def compiled(self) -> Compiled:
        """The compiled Jacobian of the next tier; of the highest tier if passes are next."""
        tier = tiers.tier_to_run(self.state)
        return self._tiers.get(tier) or self._tiers[max(self._tiers)]  # type: ignore[arg-type]

    def next_tier(self) -> Tier:
        """The tier that answers the next call."""
        tier = tiers.tier_to_run(self.state)
        return Tier.PASSES if tier is None else tier

    def settled_native(self) -> Compiled | None:
        """The compiled Jacobian of the native tier, if the entry has settled on it; else None."""
        settled = isinstance(self.state, tiers.Settled) and self.state.tier is Tier.NATIVE
        return self._tiers[Tier.NATIVE] if settled else None

    def step(self, event: EntryEvent) -> Action:
        """Changes the state by an event, and returns the next action. Safe between threads."""
        with self._lock:
            self.state, action = tiers.step(self.state, event)  # type: ignore[assignment]
        return action

    def compiled_for(self, tier: Tier) -> Compiled:
        """The compiled Jacobian of a tier above passes."""
        return self._tiers[tier]

    def observe(self, tier: Tier, seconds: float, call: Call) -> None:
        """Reports the seconds of a call that a tier answered; compiles native code when due."""
        state = self.state
        if isinstance(state, tiers.Settled) and math.isinf(state.cost):
            return  # settled for good: timings and the bank decide nothing any more
        if self.step(tiers.Ran(tier, seconds, self._work[tier])) is Action.COMPILE_NATIVE:
            self._compile_native(call)

    def _compile_native(self, call: Call) -> None:
        compiled = self._tiers[Tier.PROGRAM]
        seconds = kernel_seconds(compiled.programs)
        try:
            if tiers.stalls_too_long(seconds):
                raise PlanRefused(
                    f"it should take {seconds:.0f} s to write; compile=True has it done"
                )
            if torch.are_deterministic_algorithms_enabled():
                raise PlanRefused("algorithms are to be deterministic, and rounding would change")
            native = compiled.native(call)
        except PlanRefused as refusal:
            tried = Tried(compiled.program.mode, refused=str(refusal), form="kernel")
            self._refused_native = (*self._refused_native, tried)
            self.step(tiers.Refused(str(refusal)))
            return
        self._tiers[Tier.PROGRAM] = replace(compiled, alternatives=())
        self._add(native)
        self.step(tiers.NativeArrived(self._work[Tier.NATIVE]))

    def leave_record(self, compiled: Compiled, entry: str, seconds: float) -> None:
        """Makes the record of a run the last one of this thread; it holds no tensor."""
        set_last_record(lambda: self.record(compiled, entry, seconds))

    def record(self, compiled: Compiled, entry: str, seconds: float) -> Record:
        """The record of one run."""
        m, n, samples = compiled.shape
        program = compiled.program
        tried = (*self._tiers[max(self._tiers)].tried, *self._refused_native)
        candidates = [self._candidate(t) for t in tried if t.predicted is not None]
        passes = Candidate("passes", compiled.passes, self._measured(Tier.PASSES))
        refusals = [
            (t.form or f"accumulate {t.mode}", t.refused) for t in tried if t.refused is not None
        ]
        if program.refusal is not None:
            refusals.append(("compile", program.refusal))
        return Record(
            entry=entry,
            engine="accumulate",
            mode=program.form,
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
        assert tried.predicted is not None, "callers skip orders without a prediction"
        measured = tried.measured
        for tier, compiled in self._tiers.items():
            if compiled.program.form == tried.name:
                measured = self._measured(tier) or measured
        return Candidate(f"accumulate {tried.name}", tried.predicted, measured)

    def _measured(self, tier: Tier) -> float | None:
        """Seconds of the fastest timed run of a tier; None if no run was timed."""
        return None if isinstance(self.state, Rejected) else self.state.contest.best(tier)


def tier_of(compiled: Compiled) -> Tier:
    """The tier of a compiled Jacobian."""
    return Tier.NATIVE if compiled.program.is_compiled else Tier.PROGRAM


def _counts(compiled: Compiled) -> Counts:
    work = compiled.program.work
    fixed, whole = compiled.program.fixed
    return Counts(
        operations=work.operations,
        multiplications=work.multiplications,
        bytes=work.bytes,
        constant=fixed / max(whole, 1),
        lanes=compiled.shape[2] or 1,
        waists=compiled.program.waists,
        blame=compiled.blame,
    )
