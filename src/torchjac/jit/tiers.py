"""The tiers: which code answers a call, and when better code is made.

Tier 0 (passes) evaluates the autograd graph of the call. Tier 1 (program) is a straight line of
tensor operations; tier 2 (native) is machine code. A *function* is `Cold` or `Warming` for calls
that no entry of its cache holds for. An *entry* is compiled code with the guard that it holds
under: it is in `Trial` or `Settled`, or it is `Rejected`.

`step` is a pure function of state and event. It knows neither torch nor a clock: events carry the
predicted and the measured seconds. `docs/architecture.md` has the table of states and events, and
`tests/test_tiers.py` tests it row by row. The models are the header of HotSpot's compilation policy
(banks of work), LuaJIT (penalties for traces that fail) and PyPy (guards and side exits).
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace

from torchjac.host.contest import Contest, Rules

# Predicted seconds of tracing, accumulating and verifying a function: of any, and an operation.
_COMPILE = 25e-3
_COMPILE_NODE = 0.8e-3
# Predicted seconds of making native code of one sample: of any, and an operation.
_PER_SAMPLE = 0.3
_PER_SAMPLE_NODE = 4e-3
# Predicted seconds of a call beside its passes: of any, an operation, and times the passes
# (2 quiet cores, torch 2.13, float64: 0.10 ms for 5 operations, 0.82 for 101, 3.0 for 423; batches
# and hidden layers take up to 2.5 times as long).
_CALL = 80e-6
_CALL_NODE = 4e-6
_CALL_PASSES = 1.5
# Timed runs of a tier in a trial. The first run of a new tier does not count.
_RUNS = 3
# Passes predicted this many times slower than the new tier measured: the trial skips them.
_CLEAR = 4.0
# A tier measured this many times slower than the fastest one: the trial stops running it.
_BEATEN = 20.0
# Seconds of work that an entry banks, at least, before native code is made.
_NATIVE_LEAST = 0.3
# Predicted seconds of making native code above which `compile=True` must ask for it.
_NATIVE_MOST = 30.0
# Refusals in a row after which `compile=True` waits for a warm-up as well.
_REFUSALS = 3
# Entries that answered no call yet, or compilations that said nothing, after which `compile=True`
# waits for a warm-up as well.
_UNUSED = 8
# A warm-up is never longer than two to this power times the cost of compiling.
_DOUBLINGS = 10
# Calls that miss the fast path for each that installs another one, at most.
_SELDOM = 256


class Tier(enum.IntEnum):
    """What answers a call."""

    PASSES = 0
    PROGRAM = 1
    NATIVE = 2


class Action(enum.Enum):
    """What the dispatcher does next."""

    NOTHING = "nothing"
    PASS = "answer the call by passes"
    WATCH = "build the guard of the call, then answer it by passes or compile"
    COMPILE = "compile the function, and answer the call by the result"
    MAKE_NATIVE = "make native code of the entry's program"
    INSTALL = "install the fast path"


# States.


@dataclass(frozen=True, slots=True)
class Cold:
    """No call of the function was seen that no entry holds for."""


@dataclass(frozen=True, slots=True)
class Warming:
    """Calls are answered by passes until their work pays for compiling.

    Attributes:
        nodes: Operations of the autograd graph that was captured last.
        cost: Predicted seconds of compiling it.
        work: Predicted seconds of the last call.
        banked: Predicted seconds of the calls since the last compilation.
        refusals: Compilations in a row that were refused.
        unused: Compilations since an entry was last of use for the first time.
        undecided: Compilations in a row that said nothing, as values were not finite.
    """

    nodes: int
    cost: float
    work: float
    banked: float = 0.0
    refusals: int = 0
    unused: int = 0
    undecided: int = 0


@dataclass(frozen=True, slots=True)
class Trial:
    """Tiers of an entry take turns until the fastest is known.

    Attributes:
        contest: The tiers and their timings.
        banked: Predicted seconds of the entry's runs.
        cost: Predicted seconds of making native code; infinite where it is made now, was made or
            refused, or cannot be made.
    """

    contest: Contest[Tier]
    banked: float = 0.0
    cost: float = math.inf


@dataclass(frozen=True, slots=True)
class Settled:
    """One tier answers the calls that the entry holds for.

    Attributes:
        tier: The tier.
        contest: The tiers and their timings.
        banked: Predicted seconds of the entry's runs.
        cost: As of `Trial`.
    """

    tier: Tier
    contest: Contest[Tier]
    banked: float = 0.0
    cost: float = math.inf


@dataclass(frozen=True, slots=True)
class Rejected:
    """Passes answer: the calls that an entry holds for, or all calls of a function.

    Attributes:
        reason: Why there is no compiled code for them.
    """

    reason: str


FunctionState = Cold | Warming | Rejected
EntryState = Trial | Settled | Rejected
State = FunctionState | EntryState


# Events of a function.


@dataclass(frozen=True, slots=True)
class Missed:
    """No entry holds for a call.

    Attributes:
        eager: Whether the user asked for compiled code at once.
    """

    eager: bool = False


@dataclass(frozen=True, slots=True)
class Captured:
    """The autograd graph of a call that was missed is there.

    Attributes:
        nodes: Operations of the graph.
        passes: Predicted seconds of its passes.
        is_batch: Whether it has many samples, so that native code of one is made in the same turn.
        eager: Whether the user asked for compiled code at once.
    """

    nodes: int
    passes: float
    is_batch: bool = False
    eager: bool = False


@dataclass(frozen=True, slots=True)
class Passed:
    """Passes answered a call that was missed.

    Attributes:
        passes: Predicted seconds of the passes; 0 where nothing was predicted.
    """

    passes: float = 0.0


@dataclass(frozen=True, slots=True)
class Compiled:
    """A plan has arrived: an entry was made."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The function could not be compiled, or native code could not be made of an entry.

    Attributes:
        reason: Why.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Hit:
    """An entry with compiled code holds for a call, its first one."""


# Events of an entry.


@dataclass(frozen=True, slots=True)
class Ran:
    """A tier answered a call.

    Attributes:
        tier: The tier.
        seconds: Measured seconds of the call.
        work: Predicted seconds of the passes, or of the compiled code.
    """

    tier: Tier
    seconds: float
    work: float


@dataclass(frozen=True, slots=True)
class NotFinite:
    """A side exit: compiled code gave a result that is not finite.

    Of a function: it could not be compared with passes at these values, or is not for these inputs.
    """


@dataclass(frozen=True, slots=True)
class NativeArrived:
    """Native code was made of the entry's program.

    Attributes:
        predicted: Predicted seconds of a run.
    """

    predicted: float


@dataclass(frozen=True, slots=True)
class Disagreed:
    """Compiled code gave another result than passes.

    Attributes:
        reason: What was compared, and how it differs.
    """

    reason: str


FunctionEvent = Missed | Captured | Passed | Compiled | Refused | Hit | NotFinite | Disagreed
EntryEvent = Ran | NotFinite | NativeArrived | Refused | Disagreed
Event = FunctionEvent | EntryEvent


def compile_cost(nodes: int, is_batch: bool) -> float:
    """Predicted seconds of compiling a function.

    Args:
        nodes: Operations of its autograd graph.
        is_batch: Whether it has many samples, so that native code of one is made in the same turn.
    """
    cost = _COMPILE + _COMPILE_NODE * nodes
    return cost + _PER_SAMPLE + _PER_SAMPLE_NODE * nodes if is_batch else cost


def call_work(nodes: int, passes: float) -> float:
    """Predicted seconds of a call that passes answer.

    Args:
        nodes: Operations of its autograd graph.
        passes: Predicted seconds of the passes.
    """
    return _CALL + _CALL_NODE * nodes + _CALL_PASSES * passes


def begin(tier: Tier, predicted: float, passes: float, cost: float = math.inf) -> Trial:
    """The trial of a new entry.

    Args:
        tier: The tier that its compiled code is of.
        predicted: Predicted seconds of a run of it.
        passes: Predicted seconds of passes.
        cost: Predicted seconds of making native code of it; infinite where that is not to be done.
    """
    rules = Rules(runs=_RUNS, beaten=_BEATEN)
    contest = Contest({Tier.PASSES: _CALL + _CALL_PASSES * passes}, rules)
    return Trial(contest.with_candidate(tier, predicted, warmups=1), cost=cost)


def step(state: State, event: Event) -> tuple[State, Action]:
    """The state after an event, and what the dispatcher does next."""
    if isinstance(state, (Cold, Warming)):
        return _step_function(state, event)
    return _step_entry(state, event)


def _step_function(state: Cold | Warming, event: Event) -> tuple[State, Action]:
    match state, event:
        case Cold(), Missed():
            return state, Action.WATCH
        case Warming(), Missed(eager):
            return state, Action.WATCH if _is_due(state, eager) else Action.PASS
        case _, Captured(nodes, passes, is_batch, eager):
            cost, work = compile_cost(nodes, is_batch), call_work(nodes, passes)
            if isinstance(state, Cold):
                state = Warming(nodes, cost, work)
            else:
                state = replace(state, nodes=nodes, cost=cost, work=work)
            return state, Action.COMPILE if _is_due(state, eager) else Action.PASS
        case Warming(), Passed(passes):
            work = call_work(state.nodes, passes) if passes else state.work
            warmer = Warming(  # at every call: a third of what `replace` takes
                state.nodes,
                state.cost,
                work,
                state.banked + work,
                state.refusals,
                state.unused,
                state.undecided,
            )
            return warmer, Action.NOTHING
        case Warming(), NotFinite():  # the bank is spent; no failure is counted
            return replace(state, banked=0.0, undecided=state.undecided + 1), Action.PASS
        case _, Disagreed(reason):
            return Rejected(reason), Action.PASS
        case Warming(), Compiled():
            compiled = Warming(state.nodes, state.cost, state.work, unused=state.unused + 1)
            return compiled, Action.NOTHING
        case Warming(), Refused():
            return replace(state, banked=0.0, refusals=state.refusals + 1), Action.NOTHING
        case Warming(), Hit():
            return (replace(state, unused=0) if state.unused else state), Action.NOTHING
    return state, Action.NOTHING


def _is_due(state: Warming, eager: bool) -> bool:
    """Whether the work of this call and of those before pays for compiling."""
    if eager and state.refusals < _REFUSALS and max(state.unused, state.undecided) < _UNUSED:
        return True
    doublings = min(state.refusals + state.unused, _DOUBLINGS)
    warmup: float = state.cost * 2**doublings
    return state.banked + state.work >= warmup


def _step_entry(state: EntryState, event: Event) -> tuple[State, Action]:
    match state, event:
        case Rejected(), _:
            return state, Action.PASS
        case _, Ran(tier, seconds, work):
            return _ran(state, tier, seconds, work)
        case _, NotFinite():
            return state, Action.PASS
        case _, NativeArrived(predicted):
            contest = state.contest.with_candidate(Tier.NATIVE, predicted, 1)
            return Trial(contest, state.banked), Action.NOTHING
        case _, Refused():
            return replace(state, cost=math.inf), Action.NOTHING
        case _, Disagreed(reason):
            return Rejected(reason), Action.PASS
    return state, Action.NOTHING


def _ran(
    state: Trial | Settled, tier: Tier, seconds: float, work: float
) -> tuple[EntryState, Action]:
    banked = state.banked + _CALL + work
    if isinstance(state, Trial):
        contest = state.contest.timed(tier, seconds)
        state = _decided(Trial(contest, banked, state.cost))
    else:
        state = Settled(state.tier, state.contest, banked, state.cost)
    if banked < max(_NATIVE_LEAST, state.cost):
        return state, Action.NOTHING
    # Asked for once: other threads may run the entry while native code is made.
    return replace(state, cost=math.inf), Action.MAKE_NATIVE


def _decided(state: Trial) -> Trial | Settled:
    """Settled, where no run is left that could change the winner."""
    if tier_to_run(state, None) is not None:
        return state
    return Settled(state.contest.winner(), state.contest, state.banked, state.cost)


def is_too_long(cost: float) -> bool:
    """Whether making native code takes longer than a call may stall for nobody's asking."""
    return _NATIVE_MOST < cost < math.inf


def tier_to_run(state: EntryState, default: Tier | None = Tier.PASSES) -> Tier | None:
    """The tier that answers the next call.

    Args:
        state: The state of an entry.
        default: The answer where nothing is left to be run.
    """
    if isinstance(state, Rejected):
        return Tier.PASSES
    if isinstance(state, Settled):
        return state.tier
    contest = state.contest
    too_slow = contest.predicted[Tier.PASSES] > _CLEAR * contest.fastest()
    skips = too_slow and Tier.PASSES not in contest.timings
    tier = contest.next(lambda t: not (skips and t is Tier.PASSES))
    return default if tier is None else tier


# The fast path.


@dataclass(frozen=True, slots=True)
class Misses:
    """Calls that the fast path could have answered, and did not.

    Attributes:
        count: How many there were since one was installed.
        until: How many there are when the next one is installed.
    """

    count: int = 0
    until: int = 1

    def more(self) -> tuple[Misses, Action]:
        """The state after one more miss, and whether another fast path is installed."""
        if self.count + 1 < self.until:
            return replace(self, count=self.count + 1), Action.NOTHING
        return Misses(0, min(2 * self.until, _SELDOM)), Action.INSTALL
