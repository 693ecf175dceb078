"""Races: the choice among candidate plans by measured cost, one run a call.

Each call runs one candidate and returns its result, so no result is computed twice. The first calls
take turns among the candidates; later calls run the fastest. Races are cached by program (by
`Jacobian` and argument shapes, or by kind of graph for `jac`). The choice changes the speed of a
result, never its correctness.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

import torch

from torchjac.errors import PlanRefused
from torchjac.host.contest import Contest, Rules
from torchjac.passes.autograd_graph import Profile
from torchjac.passes.candidates import candidates, compressed_candidates, predict, with_groups
from torchjac.passes.plan import Batching, Plan
from torchjac.passes.structure import Structure

# Time 3 runs of a candidate (2 if a run takes 5 ms) and keep the best; the first run warms caches.
# Skip a candidate predicted 2.5x slower than the best prediction.
# Stop a candidate measured 1.5x slower than the fastest.
# Best times within 15 % are a tie: few runs do not resolve them.
_RULES = Rules(runs=3, hopeless=2.5, beaten=1.5, long=5e-3, alike=1.15)
# Seconds of the fastest run, from which only close predictions are measured.
_LONG_CALL = 0.1
# Factor of predicted times, below which a prediction is close to the prediction of the fastest.
_CLOSE_PREDICTION = 1.5
# Seconds of the fastest run, from which only better predictions are measured.
_VERY_LONG_CALL = 2.0
# Calls that measure candidates near the fastest again, in case the machine was busy before.
_REMEASURED_CALLS = frozenset({30, 300, 3000, 30_000})
_NEAR_FASTEST = 2.0  # factor of measured time, up to which a candidate is near the fastest
_MOST_RACES = 256  # races in the cache

_forced: ContextVar[Plan | None] = ContextVar("torchjac_forced_plan", default=None)


# The forced plan, or None.
forced: Callable[[], Plan | None] = _forced.get


@contextmanager
def forced_plan(plan: Plan) -> Iterator[None]:
    """A context in which every Jacobian uses one plan, or raises `PlanRefused`."""
    token = _forced.set(plan)
    try:
        yield
    finally:
        _forced.reset(token)


def is_forced() -> bool:
    """Whether a plan is forced."""
    return forced() is not None


class Race:
    """The candidates for one program, with predicted and measured costs.

    Attributes:
        predicted: Predicted seconds of each candidate, the best prediction first.
        budget: Bytes that gradients of one chunk may take; None for a single pass.
        measured: Seconds of the runs of each candidate.
        refused: Reason of the refusal of each refused candidate.
    """

    def __init__(
        self,
        ranked: list[tuple[Plan, float]],
        structure: Structure,
        size: Profile,
        budget: int | None,
    ):
        self.predicted = dict(ranked)
        self.budget = budget
        self.measured: dict[Plan, list[float]] = {}
        self.refused: dict[Plan, str] = {}
        self._structure = structure
        self._size = size
        self._settled: Plan | None = None
        self._checked: set[Kind] = set()
        self._calls = 0
        self._retry_call: dict[Kind, int] = {}  # call that retries a refused kind
        self._not_remeasured: frozenset[Plan] = frozenset()  # too slow to measure again

    @property
    def work(self) -> float:
        """Predicted seconds of the best candidate."""
        return next(iter(self.predicted.values()), 0.0)

    @property
    def settled(self) -> bool:
        """Whether no candidate is left to measure."""
        return self._settled is not None

    def next(self, skipped: Collection[Plan] = ()) -> Plan:
        """The candidate to run now.

        Args:
            skipped: Candidates that failed in this call.

        Raises:
            PlanRefused: No candidate is left.
        """
        if not skipped:
            self._calls += 1
            self.readmit([p for p in self.refused if self._retry_call.get(_kind(p)) == self._calls])
        settled = self._settled
        if settled is not None and not skipped and not self._reopen():
            return settled
        kinds = {_kind(plan) for plan in skipped}
        entrants = [p for p in self.predicted if p not in self.refused and _kind(p) not in kinds]
        if not entrants:
            raise PlanRefused("; ".join(f"{p}: {reason}" for p, reason in self.refused.items()))
        plan = self._contest(entrants).winner() if skipped else self._choose(entrants)
        return replace(plan, checked=True) if _kind(plan) in self._checked else plan

    def _choose(self, entrants: list[Plan]) -> Plan:
        if torch.are_deterministic_algorithms_enabled():
            return entrants[0]
        contest = self._contest(entrants)
        plan = contest.next(lambda p: self._may_run(p, contest))
        if plan is not None:
            return plan
        fastest = contest.winner()
        self._settled = replace(fastest, checked=True)
        return fastest

    def _reopen(self) -> bool:
        """Whether this call measures again: drops the timings of candidates near the fastest."""
        if self._calls not in _REMEASURED_CALLS:
            return False
        best = min((min(runs) for runs in self.measured.values()), default=0.0)
        near = {p for p, runs in self.measured.items() if min(runs) <= _NEAR_FASTEST * best}
        first = next(p for p in self.predicted if p not in self.refused)
        near.add(first)
        if len(near) < 2 or best > _LONG_CALL:
            return False
        self._not_remeasured = frozenset(self.predicted) - near
        self.measured = {p: runs for p, runs in self.measured.items() if p not in near}
        self._settled = None
        return True

    def _contest(self, entrants: list[Plan]) -> Contest[Plan]:
        """The contest of some candidates, with their timings so far."""
        timings = {p: tuple(self.measured[p]) for p in entrants if p in self.measured}
        return Contest({p: self.predicted[p] for p in entrants}, _RULES, timings=timings)

    def record_run(self, plan: Plan, seconds: float) -> None:
        """Records the seconds of a candidate that gave a result."""
        if self._settled is None:
            self._checked.add(_kind(plan))
            plan = replace(plan, checked=False)
            # Replaces the dictionary: threads may be iterating over the old one.
            self.measured = {**self.measured, plan: [*self.measured.get(plan, ()), seconds]}

    def refuse(
        self, plan: Plan, reason: str, substitute: Batching | None, transient: bool = False
    ) -> None:
        """Refuses all candidates of a plan's kind.

        Args:
            plan: The refused plan.
            reason: Reason of the refusal.
            substitute: Batching of the substitutes that enter the race; None for none.
            transient: Whether a later call may succeed (user code that branches on values). After
                a refusal at call n, call 2n + 1 retries the kind.
        """
        self._settled = None
        if transient:
            self._retry_call[_kind(plan)] = 2 * self._calls + 1
        predicted, refused = dict(self.predicted), dict(self.refused)
        for candidate in self.predicted:
            if _kind(candidate) == _kind(plan):
                refused.setdefault(candidate, reason)
                if substitute is not None:
                    entrant = replace(candidate, batching=substitute)
                    seconds = predict(entrant, self._structure, self._size)
                    predicted.setdefault(entrant, seconds)
        self.predicted = dict(sorted(predicted.items(), key=lambda item: item[1]))
        self.refused = refused

    def readmit(self, plans: Collection[Plan]) -> None:
        """Withdraws the refusals of all candidates of the plans' kinds."""
        if not plans:
            return
        self._settled = None
        kinds = {_kind(plan) for plan in plans}
        self.refused = {p: reason for p, reason in self.refused.items() if _kind(p) not in kinds}

    def _may_run(self, plan: Plan, contest: Contest[Plan]) -> bool:
        """Whether a run of a candidate is cheap enough to measure."""
        if plan in self._not_remeasured:
            return False
        if not contest.timings or plan == next(iter(contest.predicted)):
            return True
        # The replicated pass calls the user's function with shapes the user did not pass. So it
        # runs only if its prediction is the best one, never for a measurement.
        if plan.mode == "replicated":
            return False
        best = contest.fastest()
        fastest = min(contest.timings, key=lambda p: min(contest.timings[p]))
        slower = self.predicted[plan] / max(self.predicted[fastest], 1e-9)
        return (
            best < _LONG_CALL
            or slower < 1
            or (slower < _CLOSE_PREDICTION and best < _VERY_LONG_CALL)
        )


Kind = tuple[str, bool, str]


def _kind(plan: Plan) -> Kind:
    """The kind of a plan, refused as a whole: mode, whether chunked, and batching."""
    return plan.mode, plan.chunk > 1, plan.batching


_races: OrderedDict[Hashable, Race] = OrderedDict()


def race_for(
    key: Hashable,
    analysis: Callable[[], tuple[Structure, Profile, int]],
    replayable: bool,
) -> Race:
    """The race for a kind of program, from the cache or new.

    Args:
        key: Cache key of the kind of program.
        analysis: Returns structure, profile and budget; called only if the race is new.
        replayable: Whether the function can run again on copies of its input.
    """
    plan = _forced.get()
    if plan is not None:
        structure, size, budget = analysis()
        if structure.pattern is not None:
            plan, structure = replace(plan, engine="color"), with_groups(structure)
        return Race([(plan, predict(plan, structure, size))], structure, size, budget)
    race = _races.get(key)
    if race is None:
        structure, size, budget = analysis()
        if structure.pattern is not None:
            structure = with_groups(structure)
            ranked = compressed_candidates(structure, size, budget)
        else:
            ranked = candidates(structure, size, budget, replayable)
        race = Race(ranked, structure, size, budget)
        _races[key] = race
        if len(_races) > _MOST_RACES:
            _races.popitem(last=False)
    return race


def single_pass(structure: Structure) -> Race:
    """The race of a Jacobian with at most one row: a plain pass is the only candidate."""
    plan = _forced.get() or Plan("reverse", 1)
    return Race([(plan, 0.0)], structure, Profile(0, 0, 0, 0), None)
