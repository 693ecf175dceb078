"""Choosing among candidates by measured cost, without ever computing anything twice.

Every call runs one candidate and serves its result; the first calls take turns among the
candidates, the later ones take the fastest. A race is remembered per program (per `Jacobian` and
argument shapes, or per kind of graph for `jac`). A choice never decides whether a result is right,
only how fast it comes.
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
from torchjac.passes.candidates import candidates, compressed_candidates, grouped, predict
from torchjac.passes.plan import Batching, Plan
from torchjac.passes.structure import Structure

# Three timed runs of a candidate, the best one counts (the first one also warms caches up); two
# where they take more than 5 ms. A candidate predicted 2.5x slower than the best is not run; one
# measured 1.5x slower not once more. Best times within 15 % are not told apart by a few runs.
_RULES = Rules(runs=3, hopeless=2.5, beaten=1.5, long=5e-3, alike=1.15)
# Where a call takes longer than this, only candidates predicted about as fast as the fastest so far
# are measured, and beyond the second limit none: a second look must not cost a user seconds.
_LONG, _CLOSE, _VERY_LONG = 0.1, 1.5, 2.0
# Calls at which candidates that came near the fastest are measured anew: what was timed while the
# machine was busy with something else must not decide for ever.
_REVIEWS = frozenset({30, 300, 3000, 30_000})
_NEAR = 2.0
_REMEMBERED = 256

_forced: ContextVar[Plan | None] = ContextVar("torchjac_forced_plan", default=None)


# The plan that is forced, if there is one.
forced: Callable[[], Plan | None] = _forced.get


@contextmanager
def forced_plan(plan: Plan) -> Iterator[None]:
    """Makes every Jacobian in the context use one plan, or raise `PlanRefused`."""
    token = _forced.set(plan)
    try:
        yield
    finally:
        _forced.reset(token)


def is_forced() -> bool:
    """Whether a plan is forced."""
    return forced() is not None


class Race:
    """The candidates for one program, what they were predicted to cost and what they did cost."""

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
        self._again: dict[Kind, int] = {}  # call at which a refused kind is tried again
        self._left_out: frozenset[Plan] = frozenset()  # too slow to be measured anew

    @property
    def work(self) -> float:
        """Predicted seconds of the best candidate."""
        return next(iter(self.predicted.values()), 0.0)

    @property
    def settled(self) -> bool:
        """Whether there is nothing left to measure."""
        return self._settled is not None

    def next(self, skipped: Collection[Plan] = ()) -> Plan:
        """The candidate to run now, other than those that failed at the present values.

        Raises:
            PlanRefused: None is left.
        """
        if not skipped:
            self._calls += 1
            self.forgive([p for p in self.refused if self._again.get(_kind(p)) == self._calls])
        settled = self._settled
        if settled is not None and not skipped and not self._reopened():
            return settled
        kinds = {_kind(plan) for plan in skipped}
        entrants = [p for p in self.predicted if p not in self.refused and _kind(p) not in kinds]
        if not entrants:
            raise PlanRefused("; ".join(f"{p}: {why}" for p, why in self.refused.items()))
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

    def _reopened(self) -> bool:
        """Now and then forgets the timings of candidates near the fastest, if there are several."""
        if self._calls not in _REVIEWS:
            return False
        best = min((min(runs) for runs in self.measured.values()), default=0.0)
        near = {p for p, runs in self.measured.items() if min(runs) <= _NEAR * best}
        first = next(p for p in self.predicted if p not in self.refused)
        near.add(first)
        if len(near) < 2 or best > _LONG:
            return False
        self._left_out = frozenset(self.predicted) - near
        self.measured = {p: runs for p, runs in self.measured.items() if p not in near}
        self._settled = None
        return True

    def _contest(self, entrants: list[Plan]) -> Contest[Plan]:
        """The contest of the candidates that are not refused."""
        timings = {p: tuple(self.measured[p]) for p in entrants if p in self.measured}
        return Contest({p: self.predicted[p] for p in entrants}, _RULES, timings=timings)

    def ran(self, plan: Plan, seconds: float) -> None:
        """Notes that a candidate gave a result, and what it cost."""
        if self._settled is None:
            self._checked.add(_kind(plan))
            plan = replace(plan, checked=False)
            # Other threads may be looking at the old dictionary: it is replaced, not changed.
            self.measured = {**self.measured, plan: [*self.measured.get(plan, ()), seconds]}

    def refuse(
        self, plan: Plan, reason: str, instead: Batching | None, passing: bool = False
    ) -> None:
        """Takes a candidate out, for all chunks of its kind, and remembers why.

        Args:
            plan: What was refused.
            reason: Why.
            instead: Another way to batch the same passes, which enters in its place.
            passing: Whether the reason may pass (code of the user that branches on values): then
                it is tried again, after twice as many calls each time.
        """
        self._settled = None
        if passing:
            self._again[_kind(plan)] = 2 * self._calls + 1
        predicted, refused = dict(self.predicted), dict(self.refused)
        for other in self.predicted:
            if _kind(other) == _kind(plan):
                refused.setdefault(other, reason)
                if instead is not None:
                    substitute = replace(other, batching=instead)
                    seconds = predict(substitute, self._structure, self._size)
                    predicted.setdefault(substitute, seconds)
        self.predicted = dict(sorted(predicted.items(), key=lambda item: item[1]))
        self.refused = refused

    def forgive(self, plans: Collection[Plan]) -> None:
        """Takes refusals back."""
        if not plans:
            return
        self._settled = None
        kinds = {_kind(plan) for plan in plans}
        self.refused = {p: why for p, why in self.refused.items() if _kind(p) not in kinds}

    def _may_run(self, plan: Plan, contest: Contest[Plan]) -> bool:
        """Whether a run of a candidate costs the user little enough."""
        if plan in self._left_out:
            return False
        if not contest.timings or plan == next(iter(contest.predicted)):
            return True
        # The replicated pass calls the user's function with shapes the user did not pass: not for
        # the sake of a measurement, only where it should win.
        if plan.mode == "replicated":
            return False
        best = contest.fastest()
        fastest = min(contest.timings, key=lambda p: min(contest.timings[p]))
        slower = self.predicted[plan] / max(self.predicted[fastest], 1e-9)
        return best < _LONG or slower < 1 or (slower < _CLOSE and best < _VERY_LONG)


Kind = tuple[str, bool, str]


def _kind(plan: Plan) -> Kind:
    """What a refusal holds for: the same passes in any chunk."""
    return plan.mode, plan.chunk > 1, plan.batching


_races: OrderedDict[Hashable, Race] = OrderedDict()


def race_for(
    key: Hashable,
    study: Callable[[], tuple[Structure, Profile, int]],
    replayable: bool,
) -> Race:
    """The remembered race for a kind of program, or a new one.

    Args:
        key: Identifies the kind of program.
        study: Gives structure, profile and budget; asked only for a program not seen before.
        replayable: Whether the function can be run again on other inputs.
    """
    plan = _forced.get()
    if plan is not None:
        structure, size, budget = study()
        if structure.pattern is not None:
            plan, structure = replace(plan, engine="color"), grouped(structure)
        return Race([(plan, predict(plan, structure, size))], structure, size, budget)
    race = _races.get(key)
    if race is None:
        structure, size, budget = study()
        if structure.pattern is not None:
            structure = grouped(structure)
            ranked = compressed_candidates(structure, size, budget)
        else:
            ranked = candidates(structure, size, budget, replayable)
        race = Race(ranked, structure, size, budget)
        _races[key] = race
        if len(_races) > _REMEMBERED:
            _races.popitem(last=False)
    return race


def single_pass(structure: Structure) -> Race:
    """The race of a Jacobian with one row (or none): a plain pass, with nothing to choose."""
    plan = _forced.get() or Plan("reverse", 1)
    return Race([(plan, 0.0)], structure, Profile(0, 0, 0, 0), None)
