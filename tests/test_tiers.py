"""The state machine of the tiers, row by row: the table of `docs/architecture.md`.

The machine is pure: no row needs torch or a clock.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from torchjac.jit import tiers
from torchjac.jit.tiers import (
    Action,
    Captured,
    Cold,
    Compiled,
    Disagreed,
    Event,
    FastPathMisses,
    FirstHit,
    Missed,
    NativeArrived,
    NotFinite,
    PassesAnswered,
    Ran,
    Refused,
    Rejected,
    Settled,
    State,
    Tier,
    Trial,
    Warming,
    begin_trial,
    step,
)

Row = tuple[str, State, Event, type, Action]
PAGE = Path(__file__).parent.parent / "docs" / "architecture.md"
WARMING = Warming(nodes=10, cost=1.0, work=0.1)
DUE = replace(WARMING, banked=2.0)
TRIAL = begin_trial(Tier.PROGRAM, 1e-3, 1e-3, cost=5.0)
PAID = replace(TRIAL, banked=10.0)
SETTLED = Settled(Tier.PROGRAM, TRIAL.contest, cost=5.0)
NO = Rejected("it draws random numbers")


def ran(state: State) -> Ran:
    """A run of the tier that the state names."""
    tier = tiers.tier_to_run(state)  # type: ignore[arg-type]
    assert tier is not None
    return Ran(tier, 1e-3, 0.0)


def before_settled(state: State) -> State:
    """The last state of a trial."""
    while not isinstance(step(state, ran(state))[0], Settled):
        state, _ = step(state, ran(state))
    return state


LAST = before_settled(TRIAL)

# Name of the row, state, event, kind of the next state, action: of a function, and of an entry.
FUNCTION: list[Row] = [
    ("Cold, a call missed", Cold(), Missed(), Cold, Action.BUILD_GUARD),
    ("Cold, captured, cheap", Cold(), Captured(10, 1e-4), Warming, Action.RUN_PASSES),
    ("Cold, captured, it pays at once", Cold(), Captured(10, 9.0), Warming, Action.COMPILE),
    ("Cold, captured, asked for", Cold(), Captured(10, 0.0, eager=True), Warming, Action.COMPILE),
    ("Warming, a call missed, not due", WARMING, Missed(), Warming, Action.RUN_PASSES),
    ("Warming, a call missed, due", DUE, Missed(), Warming, Action.BUILD_GUARD),
    ("Warming, captured, not due", WARMING, Captured(10, 1e-4), Warming, Action.RUN_PASSES),
    ("Warming, captured, due", DUE, Captured(10, 1e-4), Warming, Action.COMPILE),
    ("Warming, passes answered", WARMING, PassesAnswered(), Warming, Action.NOTHING),
    ("Warming, a plan has arrived", DUE, Compiled(), Warming, Action.NOTHING),
    ("Warming, refused", DUE, Refused("no"), Warming, Action.NOTHING),
    ("Warming, an entry holds", WARMING, FirstHit(), Warming, Action.NOTHING),
    ("Warming, not finite", DUE, NotFinite(), Warming, Action.RUN_PASSES),
    ("Warming, disagreed", WARMING, Disagreed("no"), Rejected, Action.RUN_PASSES),
    ("Rejected, a call missed", NO, Missed(eager=True), Rejected, Action.RUN_PASSES),
]
ENTRY: list[Row] = [
    ("Trial, ran", TRIAL, Ran(Tier.PROGRAM, 1e-3, 1e-3), Trial, Action.NOTHING),
    (
        "Trial, ran, native code is due",
        PAID,
        Ran(Tier.PROGRAM, 1.0, 1.0),
        Trial,
        Action.COMPILE_NATIVE,
    ),
    ("Trial, ran, the contest is decided", LAST, ran(LAST), Settled, Action.NOTHING),
    ("Trial, not finite", TRIAL, NotFinite(), Trial, Action.RUN_PASSES),
    ("Trial, native code has arrived", TRIAL, NativeArrived(1e-4), Trial, Action.NOTHING),
    ("Trial, native code refused", TRIAL, Refused("no"), Trial, Action.NOTHING),
    ("Trial, disagreed", TRIAL, Disagreed("no"), Rejected, Action.RUN_PASSES),
    ("Settled, ran", SETTLED, Ran(Tier.PROGRAM, 1e-3, 1e-3), Settled, Action.NOTHING),
    (
        "Settled, ran, native code is due",
        replace(SETTLED, banked=10.0),
        Ran(Tier.PROGRAM, 1.0, 1.0),
        Settled,
        Action.COMPILE_NATIVE,
    ),
    ("Settled, not finite", SETTLED, NotFinite(), Settled, Action.RUN_PASSES),
    ("Settled, native code has arrived", SETTLED, NativeArrived(1e-4), Trial, Action.NOTHING),
    ("Settled, native code refused", SETTLED, Refused("no"), Settled, Action.NOTHING),
    ("Settled, disagreed", SETTLED, Disagreed("no"), Rejected, Action.RUN_PASSES),
]


def line(row: Row) -> str:
    """The row as the page has it."""
    name, _, _, kind, action = row
    before, _, event = name.partition(", ")
    return f"| {before} | {event} | {kind.__name__} | {action.value} |"


@pytest.mark.parametrize("row", [*FUNCTION, *ENTRY], ids=lambda row: row[0].replace(" ", "-"))
def test_row(row: Row) -> None:
    name, state, event, kind, action = row
    assert name.startswith(type(state).__name__)
    after, then = step(state, event)
    assert (type(after), then) == (kind, action)


@pytest.mark.parametrize(
    ("head", "rows"), [("state of a function", FUNCTION), ("state of an entry", ENTRY)]
)
def test_the_page_has_these_rows(head: str, rows: list[Row]) -> None:
    text = PAGE.read_text()
    begin = text.index(f"| {head} | event |")
    table = text[begin : text.index("\n\n", begin)].splitlines()[2:]
    assert table == [line(row) for row in rows]


def test_a_side_exit_changes_no_state() -> None:
    for state in (Cold(), TRIAL, PAID, SETTLED, NO):
        assert step(state, NotFinite())[0] == state


class TestWarmUp:
    def test_work_is_banked_until_it_pays(self) -> None:
        state: State = step(Cold(), Captured(10, 1e-4))[0]
        assert isinstance(state, Warming)
        calls = 0
        while step(state, Missed())[1] is Action.RUN_PASSES:
            state, _ = step(state, PassesAnswered(1e-4))
            calls += 1
        assert calls == math.ceil(state.cost / state.work) - 1  # type: ignore[union-attr]

    def test_an_expensive_call_counts_as_what_it_is(self) -> None:
        state, _ = step(WARMING, PassesAnswered(1e3))
        assert step(state, Missed())[1] is Action.BUILD_GUARD

    def test_success_begins_anew_and_does_not_lengthen(self) -> None:
        state, _ = step(DUE, Compiled())
        state, _ = step(state, FirstHit())
        assert state == replace(WARMING, banked=0.0)

    def test_refusals_lengthen_it(self) -> None:
        state: State = WARMING
        for _ in range(3):
            state, _ = step(state, Refused("no"))
        assert isinstance(state, Warming)
        almost = replace(state, banked=7.8)
        assert step(almost, Missed())[1] is Action.RUN_PASSES
        assert step(replace(state, banked=7.9), Missed())[1] is Action.BUILD_GUARD
        state, _ = step(state, Compiled())
        assert state.refusals == 0  # type: ignore[union-attr]

    def test_nothing_is_abandoned_for_ever(self) -> None:
        state: State = WARMING
        for _ in range(100):
            state, _ = step(state, Refused("no"))
        assert isinstance(state, Warming)
        assert step(replace(state, banked=2e3), Missed())[1] is Action.BUILD_GUARD

    def test_values_that_are_not_finite_are_no_failures(self) -> None:
        """They spend the bank: a function that is never finite is not traced at every call."""
        state: State = DUE
        for _ in range(50):
            state, _ = step(replace(state, banked=2.0), NotFinite())  # type: ignore[type-var]
            assert step(state, Missed())[1] is Action.RUN_PASSES
        assert isinstance(state, Warming)
        assert step(replace(state, banked=0.9), Missed())[1] is Action.BUILD_GUARD
        assert step(state, Missed(eager=True))[1] is Action.RUN_PASSES
        assert step(step(DUE, NotFinite())[0], Missed(eager=True))[1] is Action.BUILD_GUARD
        assert step(state, Compiled())[0].undecided == 0  # type: ignore[union-attr]

    def test_who_asks_need_not_wait(self) -> None:
        state: State = step(Cold(), Captured(10, 0.0, eager=True))[0]
        for _ in range(8):
            assert step(state, Missed(eager=True))[1] is Action.BUILD_GUARD
            state, _ = step(state, Compiled())
        assert step(state, Missed(eager=True))[1] is Action.RUN_PASSES, "none of eight was used"
        state, _ = step(state, FirstHit())
        assert step(state, Missed(eager=True))[1] is Action.BUILD_GUARD

    def test_who_asks_waits_after_refusals(self) -> None:
        state: State = WARMING
        for _ in range(3):
            assert step(state, Missed(eager=True))[1] is Action.BUILD_GUARD
            state, _ = step(state, Refused("no"))
        assert step(state, Missed(eager=True))[1] is Action.RUN_PASSES


def settled(state: State, seconds: dict[Tier, float], runs: int = 50) -> tuple[State, list[Tier]]:
    """The state after some runs, each of which takes as long as its tier does; and the tiers."""
    ran = []
    for _ in range(runs):
        tier = tiers.tier_to_run(state)  # type: ignore[arg-type]
        assert tier is not None
        ran.append(tier)
        state, _ = step(state, Ran(tier, seconds[tier], 0.0))
    return state, ran


class TestTrial:
    def test_the_faster_tier_stays(self) -> None:
        for program, winner in [(1e-3, Tier.PROGRAM), (4e-3, Tier.PASSES)]:
            trial = begin_trial(Tier.PROGRAM, 1e-3, 1e-3)
            state, ran = settled(trial, {Tier.PROGRAM: program, Tier.PASSES: 2e-3})
            assert isinstance(state, Settled)
            assert state.tier is winner
            assert ran[10:] == [winner] * 40
            assert sorted(ran[:7]) == [Tier.PASSES] * 3 + [Tier.PROGRAM] * 4

    def test_passes_predicted_far_slower_do_not_run(self) -> None:
        state, ran = settled(begin_trial(Tier.NATIVE, 1e-6, 1.0), {Tier.NATIVE: 1e-6})
        assert ran == [Tier.NATIVE] * 50
        assert isinstance(state, Settled)

    def test_one_slow_run_parks_nothing(self) -> None:
        state: State = begin_trial(Tier.PROGRAM, 1e-3, 1e-3)
        for _ in range(2):  # the first run, and one that counts
            state, _ = step(state, Ran(Tier.PROGRAM, 10.0, 0.0))
        state, _ = settled(state, {Tier.PROGRAM: 1e-4, Tier.PASSES: 1e-3})
        assert isinstance(state, Settled)
        assert state.tier is Tier.PROGRAM

    def test_native_code_is_compared_with_what_was_there(self) -> None:
        costs = {Tier.PROGRAM: 1e-3, Tier.PASSES: 2e-3, Tier.NATIVE: 1e-5}
        state, _ = settled(begin_trial(Tier.PROGRAM, 1e-3, 1e-3), costs)
        state, _ = step(state, NativeArrived(1e-3))
        state, ran = settled(state, costs)
        assert ran == [Tier.NATIVE] * 50, "the timings of the others are there"
        assert isinstance(state, Settled)
        slow = {**costs, Tier.NATIVE: 1.0}
        state, _ = step(state, NativeArrived(1e-3))
        state, ran = settled(state, slow)
        assert ran[-1] is Tier.PROGRAM

    def test_native_code_waits_for_its_bank(self) -> None:
        state: State = begin_trial(Tier.PROGRAM, 1e-3, 1e-3, cost=1.0)
        actions = []
        for _ in range(12):
            state, action = step(state, Ran(Tier.PROGRAM, 1e-3, 0.1))
            actions.append(action)
        assert actions.index(Action.COMPILE_NATIVE) == 9
        assert actions.count(Action.COMPILE_NATIVE) == 1, "other threads run while it is made"
        state, _ = step(state, Refused("no compiler"))
        assert step(state, Ran(Tier.PROGRAM, 1e-3, 1e3))[1] is Action.NOTHING, "tried once"

    def test_what_takes_too_long_must_be_asked_for(self) -> None:
        assert tiers.stalls_too_long(31.0)
        assert not tiers.stalls_too_long(29.0)
        assert not tiers.stalls_too_long(math.inf), "there is none to be made"


def test_the_fast_path_is_installed_ever_more_seldom() -> None:
    state, installed = FastPathMisses(), []
    for call in range(1, 600):
        state, action = state.add()
        if action is Action.INSTALL_FAST_PATH:
            installed.append(call)
    assert installed == [1, 3, 7, 15, 31, 63, 127, 255, 511]
