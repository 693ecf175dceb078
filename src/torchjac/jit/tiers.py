"""The state machine of the tiers: it decides which code answers a call, and when to compile.

Tier 0 (passes) evaluates the autograd graph of the call. Tier 1 (program) is a straight line of
tensor operations. Tier 2 (native) is machine code. A *function* is `Cold` or `Warming` for calls
that miss the capture cache. An *entry* of the cache is compiled code with its guard: its state is
`Trial`, `Settled` or `Rejected`.

`step` is a pure function of state and event, without torch and without a clock: events carry the
predicted and the measured seconds. `docs/architecture.md` has the table of states and events, and
`tests/test_tiers.py` tests it row by row. The models are the header of HotSpot's compilation policy
(banks of work), LuaJIT (penalties for traces that fail) and PyPy (guards and side exits).
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace

from torchjac.host.contest import Contest, Rules

# Predicted seconds of tracing, accumulating and verifying any function.
_COMPILE_SECONDS = 25e-3
# Predicted seconds of compiling for each operation of the autograd graph.
_COMPILE_SECONDS_PER_NODE = 0.8e-3
# Predicted seconds of compiling the native code of one sample, for any function.
_SAMPLE_KERNEL_SECONDS = 0.3
# Predicted seconds of compiling the native code of one sample, for each operation.
_SAMPLE_KERNEL_SECONDS_PER_NODE = 4e-3
# The next three predict a call by passes (2 quiet cores, torch 2.13, float64: 0.10 ms for 5
# operations, 0.82 for 101, 3.0 for 423; batches and hidden layers take up to 2.5 times as long).
# Predicted seconds of any call.
_CALL_SECONDS = 80e-6
# Predicted seconds of a call for each operation of the autograd graph.
_CALL_SECONDS_PER_NODE = 4e-6
# Predicted seconds of a call for each predicted second of its passes.
_CALL_SECONDS_PER_PASS_SECOND = 1.5
# Timed runs of a tier in a trial, after the warm-up run of a new tier.
_TRIAL_RUNS = 3
# The trial skips passes that are predicted this many times slower than the new tier measured.
_SKIP_FACTOR = 4.0
# The trial stops a tier that is measured this many times slower than the fastest one.
_STOP_FACTOR = 20.0
# Seconds of work that an entry banks, at least, before native code is compiled.
_MIN_NATIVE_BANK = 0.3
# Predicted seconds: longer native compilations run only with `compile=True`.
_MAX_NATIVE_STALL = 30.0
# After this many refusals in a row `compile=True` waits for a warm-up as well.
_MAX_REFUSALS = 3
# After this many entries in a row without a hit, or compilations without a result because values
# were not finite, `compile=True` waits for a warm-up as well.
_MAX_UNUSED = 8
# A warm-up takes at most 2^this times the cost of compiling.
_MAX_DOUBLINGS = 10
# At most this many calls miss the fast path before another one is installed.
_MAX_FAST_PATH_BACKOFF = 256


class Tier(enum.IntEnum):
    """The kind of code that answers a call."""

    PASSES = 0
    PROGRAM = 1
    NATIVE = 2


class Action(enum.Enum):
    """The next action of the dispatcher."""

    NOTHING = "nothing"
    RUN_PASSES = "answer the call by passes"
    BUILD_GUARD = "build the guard of the call, then answer it by passes or compile"
    COMPILE = "compile the function, and answer the call by the result"
    COMPILE_NATIVE = "make native code of the entry's program"
    INSTALL_FAST_PATH = "install the fast path"


# States.


@dataclass(frozen=True, slots=True)
class Cold:
    """No call of the function has missed the cache yet."""


@dataclass(frozen=True, slots=True)
class Warming:
    """Passes answer the calls that miss the cache, until their work pays for compiling.

    Attributes:
        nodes: Operations of the autograd graph that was captured last.
        cost: Predicted seconds of compiling that graph.
        work: Predicted seconds of the last call.
        banked: Predicted seconds of the calls since the last compilation.
        refusals: Compilations in a row that were refused.
        unused: Compilations since an entry had its first hit.
        undecided: Compilations in a row without a result, because values were not finite.
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
        cost: Predicted seconds of compiling native code; infinite if that is under way, done,
            refused or impossible.
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
        cost: As in `Trial`.
    """

    tier: Tier
    contest: Contest[Tier]
    banked: float = 0.0
    cost: float = math.inf


@dataclass(frozen=True, slots=True)
class Rejected:
    """Passes answer all calls of an entry, or of a function.

    Attributes:
        reason: Why there is no compiled code.
    """

    reason: str


FunctionState = Cold | Warming | Rejected
EntryState = Trial | Settled | Rejected
State = FunctionState | EntryState


# Events of a function.


@dataclass(frozen=True, slots=True)
class Missed:
    """A call has missed the cache.

    Attributes:
        eager: Whether to compile at the first call: by request, or from loaded plans.
    """

    eager: bool = False


@dataclass(frozen=True, slots=True)
class Captured:
    """The autograd graph of a call that missed the cache is captured.

    Attributes:
        nodes: Operations of the graph.
        passes: Predicted seconds of its passes.
        is_batch: Whether it has many samples: compiling includes the native code of one sample.
        eager: As in `Missed`.
    """

    nodes: int
    passes: float
    is_batch: bool = False
    eager: bool = False


@dataclass(frozen=True, slots=True)
class PassesAnswered:
    """Passes answered a call that missed the cache.

    Attributes:
        passes: Predicted seconds of the passes; 0 without a prediction.
    """

    passes: float = 0.0


@dataclass(frozen=True, slots=True)
class Compiled:
    """The function is compiled: the cache has a new entry."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A compilation of the function, or of native code of an entry, was refused.

    Attributes:
        reason: Why it was refused.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class FirstHit:
    """The guard of an entry with compiled code holds for a call for the first time."""


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
    """A side exit: compiled code returned a result that is not finite.

    As an event of a function: the compiler does not take these inputs, or compiled code could not
    be compared with passes at these values.
    """


@dataclass(frozen=True, slots=True)
class NativeArrived:
    """The native code of an entry is compiled.

    Attributes:
        predicted: Predicted seconds of a run.
    """

    predicted: float


@dataclass(frozen=True, slots=True)
class Disagreed:
    """Compiled code returned a result that differs from that of passes.

    Attributes:
        reason: The compared products, and their difference.
    """

    reason: str


FunctionEvent = (
    Missed | Captured | PassesAnswered | Compiled | Refused | FirstHit | NotFinite | Disagreed
)
EntryEvent = Ran | NotFinite | NativeArrived | Refused | Disagreed
Event = FunctionEvent | EntryEvent


def compile_cost(nodes: int, is_batch: bool) -> float:
    """Predicted seconds of compiling a function.

    Args:
        nodes: Operations of its autograd graph.
        is_batch: Whether it has many samples: compiling includes the native code of one sample.
    """
    cost = _COMPILE_SECONDS + _COMPILE_SECONDS_PER_NODE * nodes
    return (
        cost + _SAMPLE_KERNEL_SECONDS + _SAMPLE_KERNEL_SECONDS_PER_NODE * nodes
        if is_batch
        else cost
    )


def call_work(nodes: int, passes: float) -> float:
    """Predicted seconds of a call that passes answer.

    Args:
        nodes: Operations of its autograd graph.
        passes: Predicted seconds of the passes.
    """
    return _CALL_SECONDS + _CALL_SECONDS_PER_NODE * nodes + _CALL_SECONDS_PER_PASS_SECOND * passes


def begin_trial(tier: Tier, predicted: float, passes: float, cost: float = math.inf) -> Trial:
    """The trial of a new entry.

    Args:
        tier: The tier of its compiled code.
        predicted: Predicted seconds of a run of this tier.
        passes: Predicted seconds of passes.
        cost: Predicted seconds of compiling native code; infinite if that is done or impossible.
    """
    rules = Rules(runs=_TRIAL_RUNS, beaten=_STOP_FACTOR)
    contest = Contest({Tier.PASSES: _CALL_SECONDS + _CALL_SECONDS_PER_PASS_SECOND * passes}, rules)
    return Trial(contest.with_candidate(tier, predicted, warmups=1), cost=cost)


def step(state: State, event: Event) -> tuple[State, Action]:
    """The state after an event, and the next action of the dispatcher."""
    if isinstance(state, (Cold, Warming)):
        return _step_function(state, event)
    return _step_entry(state, event)


def _step_function(state: Cold | Warming, event: Event) -> tuple[State, Action]:
    match state, event:
        case Cold(), Missed():
            return state, Action.BUILD_GUARD
        case Warming(), Missed(eager):
            return state, Action.BUILD_GUARD if _is_due(state, eager) else Action.RUN_PASSES
        case _, Captured(nodes, passes, is_batch, eager):
            cost, work = compile_cost(nodes, is_batch), call_work(nodes, passes)
            if isinstance(state, Cold):
                state = Warming(nodes, cost, work)
            else:
                state = replace(state, nodes=nodes, cost=cost, work=work)
            return state, Action.COMPILE if _is_due(state, eager) else Action.RUN_PASSES
        case Warming(), PassesAnswered(passes):
            work = call_work(state.nodes, passes) if passes else state.work
            warmer = Warming(  # runs at every call: takes a third of the time of `replace`
                state.nodes,
                state.cost,
                work,
                state.banked + work,
                state.refusals,
                state.unused,
                state.undecided,
            )
            return warmer, Action.NOTHING
        case Warming(), NotFinite():  # empties the bank, counts no refusal
            return replace(state, banked=0.0, undecided=state.undecided + 1), Action.RUN_PASSES
        case _, Disagreed(reason):
            return Rejected(reason), Action.RUN_PASSES
        case Warming(), Compiled():
            compiled = Warming(state.nodes, state.cost, state.work, unused=state.unused + 1)
            return compiled, Action.NOTHING
        case Warming(), Refused():
            return replace(state, banked=0.0, refusals=state.refusals + 1), Action.NOTHING
        case Warming(), FirstHit():
            return (replace(state, unused=0) if state.unused else state), Action.NOTHING
    return state, Action.NOTHING


def _is_due(state: Warming, eager: bool) -> bool:
    """Whether the work of this call and of those before pays for compiling."""
    if (
        eager
        and state.refusals < _MAX_REFUSALS
        and max(state.unused, state.undecided) < _MAX_UNUSED
    ):
        return True
    doublings = min(state.refusals + state.unused, _MAX_DOUBLINGS)
    warmup: float = state.cost * 2**doublings
    return state.banked + state.work >= warmup


def _step_entry(state: EntryState, event: Event) -> tuple[State, Action]:
    match state, event:
        case Rejected(), _:
            return state, Action.RUN_PASSES
        case _, Ran(tier, seconds, work):
            return _step_run(state, tier, seconds, work)
        case _, NotFinite():
            return state, Action.RUN_PASSES
        case _, NativeArrived(predicted):
            contest = state.contest.with_candidate(Tier.NATIVE, predicted, 1)
            return Trial(contest, state.banked), Action.NOTHING
        case _, Refused():
            return replace(state, cost=math.inf), Action.NOTHING
        case _, Disagreed(reason):
            return Rejected(reason), Action.RUN_PASSES
    return state, Action.NOTHING


def _step_run(
    state: Trial | Settled, tier: Tier, seconds: float, work: float
) -> tuple[EntryState, Action]:
    banked = state.banked + _CALL_SECONDS + work
    if isinstance(state, Trial):
        contest = state.contest.timed(tier, seconds)
        state = _settle_if_decided(Trial(contest, banked, state.cost))
    else:
        state = Settled(state.tier, state.contest, banked, state.cost)
    if banked < max(_MIN_NATIVE_BANK, state.cost):
        return state, Action.NOTHING
    # Only once: other threads may run the entry while native code is compiled.
    return replace(state, cost=math.inf), Action.COMPILE_NATIVE


def _settle_if_decided(state: Trial) -> Trial | Settled:
    """The state after a trial: `Settled` if no further run could change the winner."""
    if tier_to_run(state, None) is not None:
        return state
    return Settled(state.contest.winner(), state.contest, state.banked, state.cost)


def stalls_too_long(cost: float) -> bool:
    """Whether compiling native code stalls a call for too long without `compile=True`."""
    return _MAX_NATIVE_STALL < cost < math.inf


def tier_to_run(state: EntryState, default: Tier | None = Tier.PASSES) -> Tier | None:
    """The tier that answers the next call.

    Args:
        state: The state of an entry.
        default: The result for a trial without a tier left to run.
    """
    if isinstance(state, Rejected):
        return Tier.PASSES
    if isinstance(state, Settled):
        return state.tier
    contest = state.contest
    too_slow = contest.predicted[Tier.PASSES] > _SKIP_FACTOR * contest.fastest()
    skips = too_slow and Tier.PASSES not in contest.timings
    tier = contest.next(lambda t: not (skips and t is Tier.PASSES))
    return default if tier is None else tier


# The fast path.


@dataclass(frozen=True, slots=True)
class FastPathMisses:
    """Counts calls that a fast path could have answered, with exponential backoff.

    Attributes:
        count: Misses since a fast path was installed.
        backoff: Misses until the next one is installed.
    """

    count: int = 0
    backoff: int = 1

    def add(self) -> tuple[FastPathMisses, Action]:
        """The state after one more miss, and the next action of the dispatcher."""
        if self.count + 1 < self.backoff:
            return replace(self, count=self.count + 1), Action.NOTHING
        return FastPathMisses(
            0, min(2 * self.backoff, _MAX_FAST_PATH_BACKOFF)
        ), Action.INSTALL_FAST_PATH
