"""The contest: which candidate runs, which of them wins."""

from __future__ import annotations

import math

import pytest

from torchjac.host.clock import clock
from torchjac.host.contest import Contest, Rules, hold, ranked

COSTS = {"a": 2.0, "b": 1.0, "c": 9.0}


def held(contest: Contest[str], costs: dict[str, float] = COSTS) -> tuple[Contest[str], list[str]]:
    """The contest after all runs, by a clock that the runs drive, and the runs in order."""
    time, runs = [0.0], []

    def run(candidate: str) -> None:
        runs.append(candidate)
        time[0] += costs[candidate]

    with clock(lambda: time[0]):
        return hold(contest, run), runs


def test_the_fastest_wins() -> None:
    contest, runs = held(Contest({"a": 1.0, "b": 1.0}, Rules(runs=3)))
    assert contest.winner() == "b"
    assert sorted(runs) == ["a"] * 3 + ["b"] * 3


def test_the_best_run_counts() -> None:
    contest = Contest({"a": 1.0, "b": 1.0}, Rules(runs=2))
    for candidate, seconds in [("a", 5.0), ("b", 2.0), ("a", 1.0), ("b", 2.0)]:
        contest = contest.timed(candidate, seconds)
    assert contest.next() is None
    assert (contest.winner(), contest.best("a"), contest.fastest()) == ("a", 1.0, 1.0)


def test_hopeless_predictions_do_not_run() -> None:
    contest, runs = held(Contest({"a": 1.0, "b": 5.0}, Rules(runs=1, hopeless=4.0)))
    assert runs == ["a"]
    assert contest.winner() == "a"


def test_predictions_of_nothing() -> None:
    """A result that is constant takes no time by the model."""
    contest, runs = held(Contest({"a": 0.0, "b": 1.0}, Rules(runs=1)))
    assert sorted(runs) == ["a", "b"]
    assert contest.winner() == "b"


def test_beaten_candidates_run_once() -> None:
    _, runs = held(Contest({"b": 1.0, "c": 1.0}, Rules(runs=3, beaten=4.0)))
    assert runs.count("c") == 1


def test_one_slow_run_of_a_new_candidate_decides_nothing() -> None:
    contest = Contest({"a": 1.0}, Rules(runs=3, beaten=4.0)).with_candidate("new", 1.0, warmups=1)
    assert contest.next() == "new", "new candidates are first"
    contest = contest.timed("new", 1e3)
    assert contest.best("new") is None, "the warm-up does not count"
    contest = contest.timed("new", 1e3)
    for _ in range(3):
        contest = contest.timed("a", 1.0)
    assert contest.next() == "new"
    contest = contest.timed("new", 0.5)
    assert contest.winner() == "new"


def test_ties_go_to_the_prediction() -> None:
    contest = Contest({"a": 1.0, "b": 2.0}, Rules(runs=1, alike=1.2))
    contest = contest.timed("a", 1.1).timed("b", 1.0)
    assert contest.winner() == "a"


def test_without_runs_the_prediction_decides() -> None:
    contest = Contest({"a": 1.0, "b": 2.0}, Rules(runs=0))
    assert contest.next() is None
    assert contest.winner() == "a"
    assert contest.fastest() == math.inf
    assert list(ranked(contest)) == ["a", "b"]


def test_a_candidate_that_enters_anew_has_no_timings() -> None:
    contest = Contest({"a": 1.0}, Rules(runs=1)).timed("a", 1.0).with_candidate("a", 3.0)
    assert contest.best("a") is None
    assert contest.predicted["a"] == 3.0


def test_only_some_may_run() -> None:
    contest = Contest({"a": 1.0, "b": 2.0}, Rules(runs=1))
    assert contest.next(lambda c: c == "b") == "b"


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_ranked(order: str) -> None:
    contest, _ = held(Contest({c: 1.0 for c in order}, Rules(runs=2)))
    assert list(ranked(contest)) == ["b", "a"]
