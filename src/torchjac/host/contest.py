"""A contest finds the fastest of several candidates by few timed runs.

A contest is a value. `next` is the candidate to run, `timed` returns the contest after that run,
and `winner` is the fastest candidate so far. The caller reads the clock: `hold` times runs that
follow one another, the dispatcher times the runs that answer calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from torchjac.host.clock import now

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Rules:
    """Thresholds of a contest.

    Attributes:
        runs: Timed runs of a candidate; the best time counts.
        hopeless: A candidate predicted this many times slower than the best prediction is not run.
        beaten: A candidate measured this many times slower than the fastest is not run again. A new
            candidate is compared after two runs that count, so that one slow run decides nothing.
        long: Seconds; a candidate that takes at least as long has one timed run fewer.
        alike: Best times within this factor are a tie, which the better prediction wins.
    """

    runs: int
    hopeless: float = math.inf
    beaten: float = math.inf
    long: float = math.inf
    alike: float = 1.0


@dataclass(frozen=True, slots=True)
class Contest(Generic[C]):
    """Candidates, their predictions, and their timed runs.

    Attributes:
        predicted: Predicted seconds of each candidate, the best prediction first.
        rules: How long candidates are run.
        warmups: Runs of a candidate, before the timed ones, that warm up caches; none if absent.
        timings: Seconds of each timed run of a candidate, in order.
        new: Candidates that entered with warm-ups.
    """

    predicted: Mapping[C, float]
    rules: Rules
    warmups: Mapping[C, int] = field(default_factory=dict)
    timings: Mapping[C, tuple[float, ...]] = field(default_factory=dict)
    new: frozenset[C] = frozenset()

    def best(self, candidate: C) -> float | None:
        """Seconds of the candidate's fastest timed run; None before the first one."""
        return min(self.timings.get(candidate, ()), default=None)

    def fastest(self) -> float:
        """Seconds of the fastest timed run of any candidate; infinite before the first one."""
        return min((min(t) for t in self.timings.values() if t), default=math.inf)

    def next(self, may_run: Callable[[C], bool] | None = None) -> C | None:
        """The candidate to run now: new ones first, then the best prediction that is worth a run.

        Args:
            may_run: Whether a candidate may run; all may if None.

        Returns:
            The candidate; None if the contest is decided.
        """
        order = self.predicted if not self.new else sorted(self.predicted, key=self._is_old)
        worth = (c for c in order if self._is_worth(c) and (may_run is None or may_run(c)))
        return next(worth, None)

    def timed(self, candidate: C, seconds: float) -> Contest[C]:
        """The contest after a run of a candidate."""
        warmups = self.warmups.get(candidate, 0)
        if warmups:
            return replace(self, warmups={**self.warmups, candidate: warmups - 1})
        runs = (*self.timings.get(candidate, ()), seconds)
        return replace(self, timings={**self.timings, candidate: runs})

    def with_candidate(self, candidate: C, predicted: float, warmups: int = 0) -> Contest[C]:
        """The contest with a candidate added, or entered again without its timings."""
        timings = {c: runs for c, runs in self.timings.items() if c != candidate}
        predictions = {**self.predicted, candidate: predicted}
        ranked = dict(sorted(predictions.items(), key=lambda item: item[1]))
        return replace(
            self,
            predicted=ranked,
            timings=timings,
            warmups={**self.warmups, candidate: warmups},
            new=self.new | {candidate} if warmups else self.new - {candidate},
        )

    def winner(self) -> C:
        """The fastest candidate; of a tie, the one with the best prediction.

        Before any timed run, the candidate with the best prediction.
        """
        ran = [c for c in self.predicted if self.timings.get(c)]
        fastest = self.fastest()
        tied = [c for c in ran if min(self.timings[c]) <= self.rules.alike * fastest]
        return (tied or list(self.predicted))[0]

    def _is_old(self, candidate: C) -> bool:
        """Sort key of the next run: new candidates come first."""
        return candidate not in self.new

    def _is_worth(self, candidate: C) -> bool:
        """Whether the contest still needs a run of a candidate."""
        runs = self.timings.get(candidate, ())
        if len(runs) >= self.rules.runs - bool(runs and min(runs) >= self.rules.long):
            return False
        enough = len(runs) > (candidate in self.new)
        if enough and min(runs) > self.rules.beaten * self.fastest():
            return False
        if math.isinf(self.rules.hopeless):
            return True
        first = next(iter(self.predicted.values()))
        return self.predicted[candidate] <= self.rules.hopeless * first


def hold(contest: Contest[C], run: Callable[[C], object]) -> Contest[C]:
    """Runs candidates one after the other until the contest is decided.

    Args:
        contest: The contest before the first run.
        run: Runs a candidate.

    Returns:
        The decided contest.
    """
    while (candidate := contest.next()) is not None:
        started = now()
        run(candidate)
        contest = contest.timed(candidate, now() - started)
    return contest


def ranked(contest: Contest[C]) -> Sequence[C]:
    """Candidates by measured time; after them, those without a timed run, by prediction."""
    return sorted(
        contest.predicted,
        key=lambda c: (c not in contest.timings, contest.best(c) or contest.predicted[c]),
    )
