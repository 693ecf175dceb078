"""The dispatcher: it answers each call by the tier that the state machine names.

`jit.tiers` decides, the dispatcher acts: it finds the entry whose guard holds, runs compiled code
or passes, calls the compiler, and tells the state machine how long runs took.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from torchjac._torch.vmap import inside_transform
from torchjac.call import Argnums, Call
from torchjac.capture.checks import unused_in_function
from torchjac.capture.eager import capture_function, detached
from torchjac.capture.eager_graph import EagerGraph
from torchjac.capture.nesting import differentiating
from torchjac.compiler.batch_invariance import MANY
from torchjac.compiler.bug_report import report
from torchjac.compiler.compile import Known, Operands, planned
from torchjac.compiler.compiled import Compiled
from torchjac.compiler.store import Saved
from torchjac.errors import (
    CaptureRefused,
    Disagrees,
    PlanError,
    PlanRefused,
    RefusedHere,
    UnusedInputError,
    UnusedInputWarning,
)
from torchjac.guards.builder import Policy
from torchjac.guards.guard import Unguardable
from torchjac.guards.objects import inert
from torchjac.host.clock import now
from torchjac.host.memory import default_budget
from torchjac.jit import tiers
from torchjac.jit.cache import Before, CaptureCache
from torchjac.jit.checking import is_checking
from torchjac.jit.eager import solve
from torchjac.jit.entry import Entry
from torchjac.jit.fast_path import FastPath, fast_path, has_fast_path
from torchjac.jit.functorch import delegate
from torchjac.jit.patterns import Memos, with_pattern
from torchjac.jit.tiers import Action, FunctionEvent, FunctionState, Tier
from torchjac.layout.arrange import Arranged
from torchjac.passes.candidates import plain_seconds
from torchjac.passes.race import is_forced
from torchjac.request import Dense, Request, Sparse, check_graph

_log = logging.getLogger("torchjac")


@inert
class Dispatcher:
    """Answers the calls of one function.

    Attributes:
        refused: Why there is no compiled code for the last call, where there is none.
        report: What the issue tracker needs to know of compiled code that was wrong.
        fast_path: The fast path to the result of calls like the last one, if there is one.
    """

    def __init__(self, function: Callable[..., Any], argnums: Argnums, request: Request):
        """Begins cold.

        Args:
            function: The user's function.
            argnums: Positions of the arguments to differentiate.
            request: What the user asks for.
        """
        self._function = function
        self._argnums = argnums
        self._request = request
        self._saved: tuple[Saved, ...] = ()
        self._entries: CaptureCache[Entry] = CaptureCache(policy=Policy(parameters="objects"))
        self._patterns = Memos()
        self._identity = object()  # unlike id(self), never another dispatcher's
        self._lock = threading.Lock()
        self._state: FunctionState = tiers.Cold()
        self._misses = tiers.Misses()
        self.refused: str | None = None
        self.report: str | None = None
        self.fast_path: FastPath | None = None

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """One call of the function."""
        return Call(self._function, self._argnums, self._request.has_aux, args, kwargs)

    def __call__(self, call: Call, replayable: bool, is_value_read: bool) -> tuple[Any, Any]:
        """What f returns, and the Jacobian.

        Args:
            call: The function and its arguments.
            replayable: Whether f may run once more.
            is_value_read: Whether anybody reads what f returns.
        """
        request = self._request
        if inside_transform() or torch.compiler.is_compiling() or call.traced():
            return delegate(call, request)
        create_graph = request.create_graph or differentiating()
        check_graph(request.output, create_graph)
        entered = now()
        entry = None
        if self._may_compile():
            entry = self._find(call)
            if entry is not None and not is_checking():
                value = self._run(entry, call, entered)
                if value is not None:
                    return self._returned(call, is_value_read, create_graph), value
        # A module in training mode keeps statistics and counters: it must run once a call.
        stateful = isinstance(self._function, torch.nn.Module) and self._function.training
        return self._interpret(call, entry, create_graph, replayable and not stateful, entered)

    def _may_compile(self) -> bool:
        """Whether compiled code may answer: not where passes are asked for, or graphs recorded."""
        output = self._request.output
        return (
            not (isinstance(output, Sparse) and output.user_pattern is not None)
            and not differentiating()
            and not is_forced()
            and not torch.is_autocast_enabled("cpu")
        )

    def _find(self, call: Call) -> Entry | None:
        """The entry whose guard holds for a call."""
        entry = self._entries.lookup(call) if len(self._entries) else None
        if entry is not None:
            self.refused = entry.refused
            if self.refused is None and not entry.was_hit:
                entry.was_hit = True
                self._step(tiers.Hit())
        return entry

    def _run(self, entry: Entry, call: Call, entered: float) -> Any:
        """The Jacobian by compiled code; None where passes are to answer."""
        tier = entry.tier()
        if tier is Tier.PASSES:
            return None
        compiled = entry.of_tier(tier)
        value = compiled(call)
        if value is None:
            entry.step(tiers.NotFinite())
            return None
        seconds = now() - entered
        entry.leave_record(compiled, self._request.entry, seconds)
        entry.ran(tier, seconds, call)
        self._missed_fast_path(entry, call)
        return value

    def _missed_fast_path(self, entry: Entry, call: Call) -> None:
        """Installs a fast path, now and then, for calls that could have taken one."""
        compiled = entry.settled_native()
        if self._request.create_graph or compiled is None or not has_fast_path(compiled):
            return
        self._misses, action = self._misses.more()
        if action is Action.INSTALL:
            latest = self._entries.latest()
            guard = latest[0] if latest is not None and latest[1] is entry else None
            run = partial(entry.record, compiled, self._request.entry)
            self.fast_path = fast_path(call, guard, compiled, run)

    def _interpret(
        self,
        call: Call,
        entry: Entry | None,
        create_graph: bool,
        replayable: bool,
        entered: float,
    ) -> tuple[Any, Any]:
        """Answers a call by its autograd graph: by passes, or by code that is compiled now."""
        request = self._request
        missed = entry is None and self._may_compile()
        guard = self._watch(call) if missed else None
        side_exit = entry is not None and entry.tier() is not Tier.PASSES
        program, returned = capture_function(
            call, batched=request.batched, create_graph=create_graph, replayable=replayable
        )
        returned = returned if create_graph else detached(returned)
        if guard is not None:
            answer = self._compile(call, program, guard, entered)
        else:
            answer = self._checked(entry, call, program, entered) if is_checking() else None
        if answer is not None:
            return returned, answer[0]
        arranged = self._pass(call, program)
        if missed:
            self._step(tiers.Passed(arranged.work))
        elif entry is not None and entry.refused is None and not side_exit:
            entry.ran(Tier.PASSES, now() - entered, call)
        return returned, arranged.value

    def _watch(self, call: Call) -> Before | None:
        """The guard of a call, where the function may be compiled once it has run.

        A function that changes what it reads, by whatever means, does something each time it runs:
        it is not compiled.
        """
        action = self._step(tiers.Missed(self._is_eager))
        return self._entries.before(call) if action is Action.WATCH else None

    @property
    def _is_eager(self) -> bool:
        """Whether the function is compiled at the first call."""
        return self._request.compile or bool(self._saved)

    def _step(self, event: FunctionEvent) -> Action:
        with self._lock:
            self._state, action = tiers.step(self._state, event)  # type: ignore[assignment]
        return action

    def _compile(
        self, call: Call, program: EagerGraph, guard: Before, entered: float
    ) -> tuple[Any] | None:
        """The Jacobian at a call by code that is compiled now, where that is due."""
        nodes, seconds = self._predicted(program)
        is_batch = (program.batch or 0) >= MANY
        action = self._step(tiers.Captured(nodes, seconds, is_batch, self._is_eager))
        if action is not Action.COMPILE or self._entries.lookup(call) is not None:
            return None
        if not _is_supported(program):
            self._step(tiers.NotFinite())
            self.refused = "inputs or outputs are empty, unused, or not on the CPU"
            return None
        if isinstance(guard, Unguardable):
            self._give_up(guard.reason)
            return None
        value = None
        try:
            known = Known(seconds, self._saved)
            compiled, value = planned(call, program, self._request, known)
            entry = Entry.of(compiled, self._request.compile)
        except RefusedHere as refusal:  # it says nothing of other values
            self._step(tiers.NotFinite())
            self.refused = str(refusal)
            return None
        except (CaptureRefused, PlanRefused) as refusal:
            entry = Entry(tiers.Rejected(str(refusal)))
            if isinstance(refusal, Disagrees):
                self.report = refusal.report
        except Exception as error:  # passes give the result; the record says what went wrong
            entry = Entry(tiers.Rejected(f"{type(error).__name__}: {error}"))
        changed = self._entries.keep(guard, call, entry)
        if entry.refused is not None or changed is not None:
            self._give_up(entry.refused or changed or "")
            return None
        self.refused = None
        self._step(tiers.Compiled())
        entry.leave_record(compiled, self._request.entry, now() - entered)
        return (value,)

    def _give_up(self, reason: str) -> None:
        """Leaves the function to passes until the next warm-up has paid for another try."""
        self.refused = reason
        self._step(tiers.Refused(reason))

    def _checked(
        self, entry: Entry | None, call: Call, program: EagerGraph, entered: float
    ) -> tuple[Any] | None:
        """The Jacobian at a call by the code of an entry, compared with passes."""
        if entry is None or entry.refused is not None:
            return None
        compiled = entry.compiled
        try:
            value = compiled.checked(call, program)
        except RefusedHere:
            return None
        except Disagrees as wrong:
            self._step(tiers.Disagreed(str(wrong)))
            self._entries.clear()
            self.fast_path = None
            _log.warning("compiled code of %r is not used any more: %s", self._function, wrong)
            self.refused = str(wrong)
            self.report = report(call, compiled.derivative, compiled.emitted, wrong)
            return None
        if value is None:
            return None
        entry.leave_record(compiled, self._request.entry, now() - entered)
        return (value,)

    def _pass(self, call: Call, program: EagerGraph) -> Arranged:
        """The Jacobian by passes over a graph."""
        request = self._request
        find = partial(self._patterns.pattern, call, program)
        output = with_pattern(request.output, program, find)
        if output is not request.output:
            request = replace(request, output=output)
        dense_batch = request.batched and isinstance(output, Dense) and bool(program.outputs)
        independent = dense_batch and self._patterns.independent(call)
        started = now()
        arranged = solve(program, request, self._identity, independent)
        self._patterns.spent(now() - started)
        self._report_unused(program, arranged)
        return arranged

    def _returned(self, call: Call, is_read: bool, create_graph: bool) -> Any:
        """What f returns; not evaluated where nobody reads it."""
        if not is_read:
            return None
        _, returned = capture_function(
            call, batched=self._request.batched, create_graph=create_graph, replayable=False
        )
        return returned if create_graph else detached(returned)

    def _report_unused(self, program: EagerGraph, arranged: Arranged) -> None:
        if not arranged.unused:
            return
        if self._request.strict:
            raise UnusedInputError(unused_in_function(program, arranged.unused))
        # The derivative of a Jacobian that is constant is zero without anything being amiss; the
        # inner Jacobian has spoken if the input itself is unused.
        if (
            not isinstance(getattr(self._function, "_dispatcher", None), Dispatcher)
            and self._request.entry != "hessian"
        ):
            warnings.warn(
                unused_in_function(program, arranged.unused), UnusedInputWarning, stacklevel=6
            )

    def _predicted(self, program: EagerGraph) -> tuple[int, float]:
        """Operations of a graph, and predicted seconds of passes over it."""
        return plain_seconds(program, self._request.memory_budget or default_budget(program.device))

    def save(self, path: str | Path, call: Call) -> None:
        """Writes the compiled code for a call to a file; it is compiled now if there is none.

        Raises:
            PlanError: There is no compiled code, or it cannot be written down.
        """
        Saved.of(self.compiled(call)).write(path)

    def compiled(self, call: Call, operands: Operands = "any") -> Compiled:
        """The compiled Jacobian for a call; it is compiled now if there is none.

        Args:
            call: The function and its arguments.
            operands: What its operations work on.

        Raises:
            PlanError: There is none.
        """
        entry = self._find(call) if self._may_compile() else None
        if entry is not None and entry.refused is None:
            compiled = entry.compiled
            if operands == "any" or compiled.emitted.samples is None:
                return compiled
        why, guard = self.refused, self._entries.before(call)
        program, _ = capture_function(
            call, batched=self._request.batched, create_graph=False, replayable=False
        )
        if (entry is not None and entry.refused is not None) or not _is_supported(program):
            raise PlanError(f"torchjac: there is no plan: {why or 'not supported'}.")
        _, predicted = self._predicted(program)
        try:
            known = Known(predicted, self._saved, operands=operands)
            compiled, _ = planned(call, program, self._request, known)
        except (CaptureRefused, PlanRefused) as refusal:
            raise PlanError(f"torchjac: there is no plan: {refusal}.") from refusal
        if operands == "any":
            self._entries.keep(guard, call, Entry.of(compiled, self._request.compile))
        return compiled

    def load(self, path: str | Path) -> None:
        """Reads compiled code, to be used for the calls that it was made for.

        Raises:
            PlanError: The file holds something else.
        """
        self._saved = (*self._saved, Saved.read(path))
        self.fast_path = None


def _is_supported(program: EagerGraph) -> bool:
    leaves = (*program.inputs, *program.outputs)
    return (
        bool(program.inputs)
        and len(program.inputs) == len(program.nest.inputs)
        and all(t.device.type == "cpu" and t.numel() for t in leaves)
        and not torch.is_autocast_enabled("cpu")
    )
