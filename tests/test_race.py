"""Choosing among candidates: by measured time, and not for ever by a bad moment's."""

from __future__ import annotations

from collections import Counter

from torchjac.passes.autograd_graph import Profile
from torchjac.passes.plan import Plan
from torchjac.passes.race import Race
from torchjac.passes.structure import Structure

STRUCTURE = Structure((8,), (8,), (0, 8), (0, 8), None, None)
FAST, SLOW, HOPELESS = Plan("reverse", 8), Plan("forward", 8), Plan("reverse", 1)


def race() -> Race:
    ranked = [(FAST, 1.0), (SLOW, 1.1), (HOPELESS, 9.0)]
    return Race(ranked, STRUCTURE, Profile(4, 64, 16, 32), None)


def run(race: Race, seconds: dict[tuple[str, int], float], calls: int) -> Counter[tuple[str, int]]:
    """Which plans ran in some calls that take this long."""
    ran: Counter[tuple[str, int]] = Counter()
    for _ in range(calls):
        plan = race.next()
        key = (plan.mode, plan.chunk)
        ran[key] += 1
        race.record_run(plan, seconds[key])
    return ran


REVERSE, FORWARD, LOOP = ("reverse", 8), ("forward", 8), ("reverse", 1)


def test_the_fastest_stays() -> None:
    ran = run(race(), {REVERSE: 2e-3, FORWARD: 1e-3, LOOP: 9e-3}, 29)
    assert ran[FORWARD] > 20
    assert ran[LOOP] == 0


def test_ties_go_to_the_prediction() -> None:
    ran = run(race(), {REVERSE: 1.1e-3, FORWARD: 1e-3, LOOP: 9e-3}, 29)
    assert ran[REVERSE] > 20


def test_a_choice_at_a_bad_moment_is_measured_again() -> None:
    """While it was measured, the machine was busy."""
    one = race()
    assert run(one, {REVERSE: 1.9e-3, FORWARD: 1e-3, LOOP: 9e-3}, 29)[FORWARD] > 20
    later = run(one, {REVERSE: 0.5e-3, FORWARD: 1e-3, LOOP: 9e-3}, 100)
    assert later[REVERSE] > 90
    assert later[LOOP] == 0


def test_looking_again_is_rare() -> None:
    one = race()
    times = {REVERSE: 1.5e-3, FORWARD: 1e-3, LOOP: 9e-3}
    run(one, times, 100)
    assert run(one, times, 1000)[REVERSE] <= 3


def test_long_calls_are_not_measured_anew() -> None:
    one = race()
    times = {REVERSE: 0.3, FORWARD: 0.2, LOOP: 9.0}
    run(one, times, 20)
    assert len(run(one, times, 500)) == 1
