"""The dispatcher answers each call of a function by the tier that the state machine chooses.

The state machine (`jit.tiers`) decides, the dispatcher acts: it looks up the entry whose guard
holds, runs compiled code or passes, calls the compiler, and reports events with their run times.
"""

from __future__ import annotations

import logging
import threading
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
from torchjac.compiler.compile import Known, Operands, compile_jacobian
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
    warn,
)
from torchjac.guards.builder import Policy
from torchjac.guards.guard import Unguardable
from torchjac.guards.objects import inert
from torchjac.host.clock import now
from torchjac.host.memory import default_budget
from torchjac.jit import tiers
from torchjac.jit.cache import CaptureCache, GuardResult
from torchjac.jit.checking import is_checking
from torchjac.jit.eager import evaluate_passes
from torchjac.jit.entry import Entry
from torchjac.jit.fast_path import FastPath, build_fast_path, has_fast_path
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
        refused: Why there is no compiled code for the last call; None if there is some.
        report: The bug report of compiled code that disagreed with passes; None if none did.
        fast_path: The fast path for calls that its guard predicate passes; None if there is none.
    """

    def __init__(self, function: Callable[..., Any], argnums: Argnums, request: Request):
        """Starts in the state `Cold`.

        Args:
            function: The user's function.
            argnums: Positions of the arguments to differentiate.
            request: The options of the user.
        """
        self._function = function
        self._argnums = argnums
        self._request = request
        self._saved: tuple[Saved, ...] = ()
        self._entries: CaptureCache[Entry] = CaptureCache(policy=Policy(parameters="objects"))
        self._memos = Memos()
        self._identity = object()  # unique, unlike id(self), which Python uses again
        self._lock = threading.Lock()
        self._state: FunctionState = tiers.Cold()
        self._fast_path_misses = tiers.FastPathMisses()
        self.refused: str | None = None
        self.report: str | None = None
        self.fast_path: FastPath | None = None

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """One call of the function."""
        return Call(self._function, self._argnums, self._request.has_aux, args, kwargs)

    def __call__(self, call: Call, replayable: bool, is_value_read: bool) -> tuple[Any, Any]:
        """The return value of f, and the Jacobian.

        Args:
            call: The function and its arguments.
            replayable: Whether f may run once more.
            is_value_read: Whether the caller uses the return value; None stands for it if not.
        """
        request = self._request
        if inside_transform() or torch.compiler.is_compiling() or call.traced():
            return delegate(call, request)
        create_graph = request.create_graph or differentiating()
        check_graph(request.output, create_graph)
        entered = now()
        entry = None
        if self._may_compile():
            entry = self._lookup(call)
            if entry is not None and not is_checking():
                value = self._run_compiled(entry, call, entered)
                if value is not None:
                    return self._function_value(call, is_value_read, create_graph), value
        # A module in training mode updates statistics and counters: it must run once a call.
        stateful = isinstance(self._function, torch.nn.Module) and self._function.training
        return self._interpret(call, entry, create_graph, replayable and not stateful, entered)

    def _may_compile(self) -> bool:
        """Whether compiled code may answer a call.

        Passes answer under a forced plan, a pattern of the user, an outer graph or autocast.
        """
        output = self._request.output
        return (
            not (isinstance(output, Sparse) and output.user_pattern is not None)
            and not differentiating()
            and not is_forced()
            and not torch.is_autocast_enabled("cpu")
        )

    def _lookup(self, call: Call) -> Entry | None:
        """The entry whose guard holds for a call; None if there is none."""
        entry = self._entries.lookup(call) if len(self._entries) else None
        if entry is not None:
            self.refused = entry.refused
            if self.refused is None and not entry.was_hit:
                entry.was_hit = True
                self._step(tiers.FirstHit())
        return entry

    def _run_compiled(self, entry: Entry, call: Call, entered: float) -> Any:
        """The Jacobian by the compiled code of an entry; None if passes have to answer."""
        tier = entry.next_tier()
        if tier is Tier.PASSES:
            return None
        compiled = entry.compiled_for(tier)
        value = compiled(call)
        if value is None:
            entry.step(tiers.NotFinite())
            return None
        seconds = now() - entered
        entry.leave_record(compiled, self._request.entry, seconds)
        entry.observe(tier, seconds, call)
        self._count_fast_path_miss(entry, call)
        return value

    def _count_fast_path_miss(self, entry: Entry, call: Call) -> None:
        """Counts a call that missed the fast path, and installs a new one when it is due."""
        compiled = entry.settled_native()
        if self._request.create_graph or compiled is None or not has_fast_path(compiled):
            return
        self._fast_path_misses, action = self._fast_path_misses.add()
        if action is Action.INSTALL_FAST_PATH:
            latest = self._entries.latest()
            guard = latest[0] if latest is not None and latest[1] is entry else None
            run = partial(entry.record, compiled, self._request.entry)
            self.fast_path = build_fast_path(call, guard, compiled, run)

    def _interpret(
        self,
        call: Call,
        entry: Entry | None,
        create_graph: bool,
        replayable: bool,
        entered: float,
    ) -> tuple[Any, Any]:
        """Answers a call by its autograd graph: by passes, or by code compiled from it now."""
        request = self._request
        missed = entry is None and self._may_compile()
        guard = self._guard_if_due(call) if missed else None
        side_exit = entry is not None and entry.next_tier() is not Tier.PASSES
        graph, returned = capture_function(
            call, batched=request.batched, create_graph=create_graph, replayable=replayable
        )
        returned = returned if create_graph else detached(returned)
        if guard is not None:
            answer = self._compile(call, graph, guard, entered)
        else:
            answer = self._run_verified(entry, call, graph, entered) if is_checking() else None
        if answer is not None:
            return returned, answer[0]
        arranged = self._run_passes(call, graph)
        if missed:
            self._step(tiers.PassesAnswered(arranged.work))
        elif entry is not None and entry.refused is None and not side_exit:
            entry.observe(Tier.PASSES, now() - entered, call)
        return returned, arranged.value

    def _guard_if_due(self, call: Call) -> GuardResult | None:
        """The guard of a call that missed, built before f runs; None if compiling is not due.

        The guard is compared again after the run: a function that changes the state it reads is
        not compiled.
        """
        action = self._step(tiers.Missed(self._is_eager))
        return self._entries.build_guard(call) if action is Action.BUILD_GUARD else None

    @property
    def _is_eager(self) -> bool:
        """Whether the function is compiled at the first call: by request, or from loaded plans."""
        return self._request.compile or bool(self._saved)

    def _step(self, event: FunctionEvent) -> Action:
        with self._lock:
            self._state, action = tiers.step(self._state, event)  # type: ignore[assignment]
        return action

    def _compile(
        self, call: Call, graph: EagerGraph, guard: GuardResult, entered: float
    ) -> tuple[Any] | None:
        """The Jacobian at a call by code compiled now; None if that is not due, or refused."""
        nodes, seconds = self._predict(graph)
        is_batch = (graph.batch or 0) >= MANY
        action = self._step(tiers.Captured(nodes, seconds, is_batch, self._is_eager))
        if action is not Action.COMPILE or self._entries.lookup(call) is not None:
            return None
        if not _is_supported(graph):
            self._step(tiers.NotFinite())
            self.refused = "inputs or outputs are empty, unused, or not on the CPU"
            return None
        if isinstance(guard, Unguardable):
            self._record_refusal(guard.reason)
            return None
        value = None
        try:
            known = Known(seconds, self._saved)
            compiled, value = compile_jacobian(call, graph, self._request, known)
            entry = Entry.of(compiled, self._request.compile)
        except RefusedHere as refusal:  # at these values only: no failure is counted
            self._step(tiers.NotFinite())
            self.refused = str(refusal)
            return None
        except (CaptureRefused, PlanRefused) as refusal:
            entry = Entry(tiers.Rejected(str(refusal)))
            if isinstance(refusal, Disagrees):
                self.report = refusal.report
        except Exception as error:  # passes give the result; the record holds the error
            entry = Entry(tiers.Rejected(f"{type(error).__name__}: {error}"))
        changed = self._entries.insert(guard, call, entry)
        if entry.refused is not None or changed is not None:
            self._record_refusal(entry.refused or changed or "")
            return None
        self.refused = None
        self._step(tiers.Compiled())
        entry.leave_record(compiled, self._request.entry, now() - entered)
        return (value,)

    def _record_refusal(self, reason: str) -> None:
        """Records a refusal: passes answer until the next warm-up pays for another compilation."""
        self.refused = reason
        self._step(tiers.Refused(reason))

    def _run_verified(
        self, entry: Entry | None, call: Call, graph: EagerGraph, entered: float
    ) -> tuple[Any] | None:
        """The Jacobian by the code of an entry, compared with passes; None if there is none."""
        if entry is None or entry.refused is not None:
            return None
        compiled = entry.compiled
        try:
            value = compiled.checked(call, graph)
        except RefusedHere:
            return None
        except Disagrees as wrong:
            self._step(tiers.Disagreed(str(wrong)))
            self._entries.clear()
            self.fast_path = None
            _log.warning("compiled code of %r is not used any more: %s", self._function, wrong)
            self.refused = str(wrong)
            self.report = report(call, compiled.derivative, compiled.program, wrong)
            return None
        if value is None:
            return None
        entry.leave_record(compiled, self._request.entry, now() - entered)
        return (value,)

    def _run_passes(self, call: Call, graph: EagerGraph) -> Arranged:
        """The Jacobian by passes over an autograd graph."""
        request = self._request
        lookup_pattern = partial(self._memos.pattern, call, graph)
        output = with_pattern(request.output, graph, lookup_pattern)
        if output is not request.output:
            request = replace(request, output=output)
        dense_batch = request.batched and isinstance(output, Dense) and bool(graph.outputs)
        independent = dense_batch and self._memos.independent(call)
        started = now()
        arranged = evaluate_passes(graph, request, self._identity, independent)
        self._memos.add_run_time(now() - started)
        self._report_unused(graph, arranged)
        return arranged

    def _function_value(self, call: Call, is_read: bool, create_graph: bool) -> Any:
        """The return value of f; None, without a run of f, if the caller does not use it."""
        if not is_read:
            return None
        _, returned = capture_function(
            call, batched=self._request.batched, create_graph=create_graph, replayable=False
        )
        return returned if create_graph else detached(returned)

    def _report_unused(self, graph: EagerGraph, arranged: Arranged) -> None:
        if not arranged.unused:
            return
        if self._request.strict:
            raise UnusedInputError(unused_in_function(graph, arranged.unused))
        # The derivative of a constant Jacobian is rightly zero. The inner Jacobian has warned if
        # the input itself is unused.
        if (
            not isinstance(getattr(self._function, "_dispatcher", None), Dispatcher)
            and self._request.entry != "hessian"
        ):
            warn(unused_in_function(graph, arranged.unused), UnusedInputWarning)

    def _predict(self, graph: EagerGraph) -> tuple[int, float]:
        """Operations of an autograd graph, and predicted seconds of passes over it."""
        return plain_seconds(graph, self._request.memory_budget or default_budget(graph.device))

    def save(self, path: str | Path, call: Call) -> None:
        """Writes the tensor program for a call to a file; compiles the function if necessary.

        Raises:
            PlanError: The function cannot be compiled, or its program cannot be serialized.
        """
        Saved.of(self.compiled(call)).write(path)

    def compiled(self, call: Call, operands: Operands = "any") -> Compiled:
        """The compiled Jacobian for a call; compiles the function if necessary.

        Args:
            call: The function and its arguments.
            operands: The tensors that operations of the program may work on.

        Raises:
            PlanError: The function cannot be compiled.
        """
        entry = self._lookup(call) if self._may_compile() else None
        if entry is not None and entry.refused is None:
            compiled = entry.compiled
            if operands == "any" or compiled.program.samples is None:
                return compiled
        reason, guard = self.refused, self._entries.build_guard(call)
        graph, _ = capture_function(
            call, batched=self._request.batched, create_graph=False, replayable=False
        )
        if (entry is not None and entry.refused is not None) or not _is_supported(graph):
            raise PlanError(f"torchjac: there is no plan: {reason or 'not supported'}.")
        _, predicted = self._predict(graph)
        try:
            known = Known(predicted, self._saved, operands=operands)
            compiled, _ = compile_jacobian(call, graph, self._request, known)
        except (CaptureRefused, PlanRefused) as refusal:
            raise PlanError(f"torchjac: there is no plan: {refusal}.") from refusal
        if operands == "any":
            self._entries.insert(guard, call, Entry.of(compiled, self._request.compile))
        return compiled

    def load(self, path: str | Path) -> None:
        """Reads a saved program, for calls whose derivative is the one that it computes.

        Raises:
            PlanError: The file does not hold a plan.
        """
        self._saved = (*self._saved, Saved.read(path))
        self.fast_path = None


def _is_supported(graph: EagerGraph) -> bool:
    """Whether the compiler takes a graph: nonempty CPU tensors, every input used, no autocast."""
    leaves = (*graph.inputs, *graph.outputs)
    return (
        bool(graph.inputs)
        and len(graph.inputs) == len(graph.nest.inputs)
        and all(t.device.type == "cpu" and t.numel() for t in leaves)
        and not torch.is_autocast_enabled("cpu")
    )
