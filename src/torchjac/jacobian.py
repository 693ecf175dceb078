"""The Jacobian of a function, as an object: callable, reusable, inspectable."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from torchjac._torch.vmap import inside_transform
from torchjac.call import Argnums, Call, check_argnums
from torchjac.capture.checks import unused_in_function
from torchjac.capture.eager import capture_function, detached
from torchjac.capture.eager_graph import Program
from torchjac.capture.nesting import differentiating
from torchjac.errors import ArgumentError, LocalPatternWarning, UnusedInputError, UnusedInputWarning
from torchjac.export import export, is_package
from torchjac.host.clock import now
from torchjac.host.memory import check_budget
from torchjac.jit.dispatcher import Accumulation, is_checking
from torchjac.jit.eager import solve
from torchjac.jit.entry import accumulate, note
from torchjac.jit.fast_path import is_for_a_kernel, shortcut
from torchjac.jit.functorch import delegate
from torchjac.jit.patterns import Remembered, with_pattern
from torchjac.layout.arrange import Arranged, converted
from torchjac.passes.race import is_forced
from torchjac.record import Record, last_run
from torchjac.request import Layout, Request, Wanted, check_layout, torch_layout
from torchjac.sparsity.detect import pattern_of_function
from torchjac.sparsity.pattern import Pattern


class Jacobian:
    """The Jacobian of a function: callable, reusable, inspectable. Made by `torchjac.jacobian`."""

    def __init__(
        self,
        function: Callable[..., Any],
        argnums: Argnums = 0,
        *,
        has_aux: bool = False,
        batched: bool = False,
        strict: bool = False,
        create_graph: bool = False,
        layout: Layout = torch.strided,
        pattern: Any = None,
        memory_budget: int | None = None,
        compile: bool = False,
        entry: str = "jacobian",
    ):
        self._options = {
            "has_aux": has_aux,
            "batched": batched,
            "strict": strict,
            "create_graph": create_graph,
            "layout": layout,
            "pattern": pattern,
            "memory_budget": memory_budget,
            "compile": compile,
            "entry": entry,
        }
        if not callable(function):
            raise ArgumentError(
                f"torchjac: {entry} takes a function, got {type(function).__name__}. For tensors "
                f"that are already computed use torchjac.jac(outputs, inputs)."
            )
        check_layout(layout, create_graph, pattern)
        check_argnums(argnums)
        self._function = function
        self._argnums = argnums
        self._has_aux = has_aux
        self._batched = batched
        self._strict = strict
        self._create_graph = create_graph
        self._layout = layout
        self._given = pattern
        self._remembered = Remembered()
        self._memory_budget = check_budget(memory_budget)
        self._accumulation = Accumulation(
            Wanted(
                torch_layout(layout),
                self._memory_budget,
                compiled=compile,
                differentiable=create_graph,
            )
        )
        self._entry = entry
        self._identity = object()  # unlike id(self), never another Jacobian's
        functools.update_wrapper(self, function, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The Jacobian at these arguments; `(J, aux)` with `has_aux=True`."""
        shortcut = self._accumulation.shortcut
        if shortcut is not None and not kwargs:
            found = shortcut(args)
            if found is not None:
                return found
        value, jacobian = self._evaluate(
            args, kwargs, replayable=not self._has_aux, beside=self._has_aux
        )
        return (jacobian, value[1]) if self._has_aux else jacobian

    def value_and(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """`(f(x), J)` from one forward pass; `((output, aux), J)` with `has_aux=True`."""
        return self._evaluate(args, kwargs, replayable=False, beside=True)

    def explain(self, *args: Any, **kwargs: Any) -> Record:
        """Computes the Jacobian once and tells how: engine, mode, passes, chunk, time, refusals."""
        self._evaluate(args, kwargs, replayable=not self._has_aux)
        record = last_run()
        assert record is not None, "every evaluation leaves a record"
        reason = self._accumulation.refused
        if reason is None or record.engine == "accumulate":
            return record
        refusals = (*record.refusals, ("accumulate", reason))
        return replace(record, refusals=refusals, report=self._accumulation.report)

    def pattern(self, *args: Any, **kwargs: Any) -> Pattern:
        """The sparsity pattern, valid for every input of the shapes of these arguments.

        f runs once as usual; then the derivative that PyTorch would run is traced without values
        and read operation by operation. Floating-point arguments may take any value; integer and
        bool arguments, and tensors that the function reads from elsewhere, count as they are now.
        Where shapes or control flow depend on values the pattern is that of these values, and says
        so.

        Returns:
            A `Pattern`; print it, or see its `blame` for the operations that made it dense.

        Raises:
            CaptureRefused: The derivative cannot be traced.
        """
        call = Call(self._function, self._argnums, self._has_aux, args, kwargs)
        found = pattern_of_function(call)
        if found.scope == "local":
            warnings.warn(
                f"torchjac: the pattern holds for these values only, because {found.reason}.",
                LocalPatternWarning,
                stacklevel=2,
            )
        return found

    def save(self, path: str | Path, *args: Any, **kwargs: Any) -> None:
        """Writes the plan for these arguments to a file, so that it need not be found again.

        Data only (JSON and arrays): nothing in it is executed on load. Constants that the function
        reads are in it; values of arguments, and tensors that require a gradient, are not. It says
        what is computed, though: load files of those whom you trust to give the right Jacobian.

        Args:
            path: The file; it is replaced.
            *args: Arguments of f.
            **kwargs: Keyword arguments of f.

        Raises:
            PlanError: Calls with these arguments cannot be planned; the message says why.

        Example:
            >>> J = torchjac.jacobian(f)
            >>> J.save("f.plan", x)
            >>> J = torchjac.jacobian(f).load("f.plan")  # in another process
        """
        call = Call(self._function, self._argnums, self._has_aux, args, kwargs)
        self._accumulation.save(path, call, lambda: self._captured(call))

    def load(self, path: str | Path) -> Jacobian:
        """Reads a plan that `save` wrote, for calls like the one it was made for.

        It is used where the function does what it did then, operation by operation; its first use
        is checked as that of any plan. For other calls it is as if it were not there.

        Returns:
            This Jacobian.

        Raises:
            PlanError: The file holds something else, or a plan for another version of torch.
            OSError: The file cannot be read.
        """
        self._accumulation.load(path)
        return self

    def export(self, path: str | Path, *args: Any, **kwargs: Any) -> list[Path]:
        """Writes f and its Jacobian for other programs: the way to C and C++.

        As *plain C* (any suffix but `.pt2`): a `.c` and a `.h` with no dependency at all, and a
        `.hpp` that calls them with tensors of libtorch. The function in them takes dense arrays of
        the shapes and dtypes of these arguments and writes J and `f(x)`; of a sparse result the
        entries, row by row, with the pattern beside them in constant arrays. With `batched=True`
        and 32 samples or more it takes the number of samples, which need not be that of these
        arguments. Many threads may call it at once. The header says what is where.

        As an *AOTInductor package* (`.pt2`): what `AOTIModelPackageLoader` loads in C++ and
        `torch._inductor.aoti_load_package` in Python. It gives the outputs of f, then the blocks
        of J, row by row, or the entries of a sparse result. With `batched=True` and 32 samples or
        more it takes any number of samples, unless operations depend on how many there are; all
        other sizes are those of these arguments. Compiling takes half a minute.

        Parameters and other tensors that f reads are in either as they are now.

        Args:
            path: Its suffix says what is written; its stem names the files and the function.
            *args: Arguments of f.
            **kwargs: Keyword arguments of f.

        Returns:
            The files.

        Raises:
            PlanError: Calls with these arguments have no plan, or it cannot be written so; the
                message says why.

        Example:
            >>> torchjac.jacobian(f).export("build/arm", q)  # arm.c, arm.h, arm.hpp
            >>> torchjac.jacobian(f).export("build/arm.pt2", q)
        """
        call = Call(self._function, self._argnums, self._has_aux, args, kwargs)
        packaged = is_package(Path(path))
        plan = self._accumulation.made(call, lambda: self._captured(call), whole=packaged)
        return export(Path(path), call, plan)

    def _captured(self, call: Call) -> Program:
        return capture_function(call, batched=self._batched, create_graph=False, replayable=False)[
            0
        ]

    def spy(self, *args: Any, path: str | Path | None = None, **kwargs: Any) -> Any:
        """Plots the pattern at these arguments; see `Pattern.spy`."""
        return self.pattern(*args, **kwargs).spy(path)

    def __reduce__(self) -> Any:
        """Copies and pickles hold the function and the options, not what calls have shown."""
        return _again, (type(self), self._function, self._argnums, self._options)

    def __repr__(self) -> str:
        """Names the function and what is differentiated."""
        name = getattr(self._function, "__qualname__", repr(self._function))
        return f"torchjac.{self._entry}({name}, argnums={self._argnums})"

    def _evaluate(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], replayable: bool, beside: bool = False
    ) -> tuple[Any, Any]:
        """What f returned, and the Jacobian.

        Args:
            args: Positional arguments of f.
            kwargs: Keyword arguments of f.
            replayable: Whether f may run once more.
            beside: Whether anybody looks at what f returned.
        """
        call = Call(self._function, self._argnums, self._has_aux, args, kwargs)
        if inside_transform() or torch.compiler.is_compiling() or call.traced():
            return delegate(call, self._batched, torch_layout(self._layout), self._entry)
        create_graph = self._create_graph or differentiating()
        check_layout(self._layout, create_graph, self._given)
        layout = torch_layout(self._layout)
        entered = now()
        accumulates = not differentiating() and self._given is None and not is_forced()
        plan = self._accumulation.find(call) if accumulates else None
        if plan is not None and plan.wins() and not is_checking():
            value = accumulate(plan, call, self._entry, layout)
            if value is not None:
                if layout is self._layout and not create_graph and is_for_a_kernel(plan):
                    latest = self._accumulation.latest()
                    make = functools.partial(shortcut, call, latest, plan, self._entry, layout)
                    self._accumulation.missed(make)
                return self._returned(call, beside, create_graph), converted(value, self._layout)
        # A module in training mode keeps statistics and counters: it must run once a call.
        stateful = isinstance(self._function, torch.nn.Module) and self._function.training
        replayable = replayable and not stateful
        before = self._accumulation.before(call) if accumulates and plan is None else None
        program, returned = capture_function(
            call, batched=self._batched, create_graph=create_graph, replayable=replayable
        )
        if accumulates and (plan is None or is_checking()):
            planned = self._accumulation.checked(plan, call, program, before)
            if planned is not None:
                plan, value = planned
                note(plan, self._entry, layout, now() - entered)
                returned = returned if create_graph else detached(returned)
                return returned, converted(value, self._layout)
        request = Request(self._entry, layout, self._memory_budget, self._identity)
        if layout is not torch.strided:
            find = functools.partial(self._remembered.pattern, call, program)
            request = with_pattern(request, program, self._given, find)
        elif self._batched and program.outputs:
            request = replace(request, independent=self._remembered.independent(call))
        started = now()
        arranged = solve(program, request)
        self._remembered.spent(now() - started)
        self._accumulation.spent(now() - started)
        if plan is not None:
            plan.passed(now() - entered, call)
        self._report_unused(program, arranged)
        value = converted(arranged.value, self._layout)
        return (returned if create_graph else detached(returned)), value

    def _returned(self, call: Call, wanted: bool, create_graph: bool) -> Any:
        """What f returns; not evaluated where nobody looks at it."""
        if not wanted:
            return None
        _, returned = capture_function(
            call, batched=self._batched, create_graph=create_graph, replayable=False
        )
        return returned if create_graph else detached(returned)

    def _report_unused(self, program: Program, arranged: Arranged) -> None:
        if not arranged.unused:
            return
        if self._strict:
            raise UnusedInputError(unused_in_function(program, arranged.unused))
        # The derivative of a Jacobian that is constant is zero without anything being amiss; the
        # inner Jacobian has spoken if the input itself is unused.
        if not isinstance(self._function, Jacobian) and self._entry != "hessian":
            warnings.warn(
                unused_in_function(program, arranged.unused), UnusedInputWarning, stacklevel=4
            )


def _again(kind: type[Jacobian], *given: Any) -> Jacobian:
    """A Jacobian like another one."""
    function, argnums, options = given
    return kind(function, argnums, **options)


class Hessian(Jacobian):
    """The Hessian of a function: the Jacobian of a gradient, whose value is the function's."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The Hessian at these arguments."""
        return self._evaluate(args, kwargs, replayable=False)[1]

    def value_and(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """`(f(x), H)` from one forward pass."""
        (_, value), hessian = self._evaluate(args, kwargs, replayable=False, beside=True)
        return value, hessian
