"""The Jacobian of a function, as an object: callable, reusable, inspectable."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from torchjac.call import Argnums, check_argnums
from torchjac.errors import ArgumentError, LocalPatternWarning
from torchjac.export import export, is_package
from torchjac.host.memory import check_budget
from torchjac.jit.dispatcher import Dispatcher
from torchjac.record import Record, last_run
from torchjac.request import Layout, Request, check_graph, options_of, output_of
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
        if not callable(function):
            raise ArgumentError(
                f"torchjac: {entry} takes a function, got {type(function).__name__}. For tensors "
                f"that are already computed use torchjac.jac(outputs, inputs)."
            )
        self._request = Request(
            entry=entry,
            output=output_of(layout, pattern),
            has_aux=has_aux,
            batched=batched,
            strict=strict,
            create_graph=create_graph,
            memory_budget=check_budget(memory_budget),
            compile=compile,
        )
        check_graph(self._request.output, create_graph)
        check_argnums(argnums)
        self._function = function
        self._argnums = argnums
        self._dispatcher = Dispatcher(function, argnums, self._request)
        functools.update_wrapper(self, function, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The Jacobian at these arguments; `(J, aux)` with `has_aux=True`."""
        fast_path = self._dispatcher.fast_path
        if fast_path is not None and not kwargs:
            jacobian = fast_path(args)
            if jacobian is not None:
                return jacobian
        has_aux = self._request.has_aux
        value, jacobian = self._evaluate(args, kwargs, not has_aux, is_value_read=has_aux)
        return (jacobian, value[1]) if has_aux else jacobian

    def value_and(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """`(f(x), J)` from one forward pass; `((output, aux), J)` with `has_aux=True`."""
        return self._evaluate(args, kwargs, replayable=False, is_value_read=True)

    def explain(self, *args: Any, **kwargs: Any) -> Record:
        """Computes the Jacobian once and tells how: engine, mode, passes, chunk, time, refusals."""
        self._evaluate(args, kwargs, replayable=not self._request.has_aux)
        record = last_run()
        assert record is not None, "every evaluation leaves a record"
        reason = self._dispatcher.refused
        if reason is None or record.engine == "accumulate":
            return record
        refusals = (*record.refusals, ("accumulate", reason))
        return replace(record, refusals=refusals, report=self._dispatcher.report)

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
        call = self._dispatcher.call(args, kwargs)
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
        call = self._dispatcher.call(args, kwargs)
        self._dispatcher.save(path, call)

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
        self._dispatcher.load(path)
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
        call = self._dispatcher.call(args, kwargs)
        packaged = is_package(Path(path))
        plan = self._dispatcher.compiled(call, "whole tensors" if packaged else "any")
        return export(Path(path), call, plan)

    def spy(self, *args: Any, path: str | Path | None = None, **kwargs: Any) -> Any:
        """Plots the pattern at these arguments; see `Pattern.spy`."""
        return self.pattern(*args, **kwargs).spy(path)

    def __reduce__(self) -> Any:
        """Copies and pickles hold the function and the options, not what calls have shown."""
        return _again, (type(self), self._function, self._argnums, self._request)

    def __repr__(self) -> str:
        """Names the function and what is differentiated."""
        name = getattr(self._function, "__qualname__", repr(self._function))
        return f"torchjac.{self._request.entry}({name}, argnums={self._argnums})"

    def _evaluate(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        replayable: bool,
        is_value_read: bool = False,
    ) -> tuple[Any, Any]:
        """What f returned, and the Jacobian.

        Args:
            args: Positional arguments of f.
            kwargs: Keyword arguments of f.
            replayable: Whether f may run once more.
            is_value_read: Whether anybody reads what f returned.
        """
        dispatcher = self._dispatcher
        return dispatcher(dispatcher.call(args, kwargs), replayable, is_value_read)


def _again(kind: type[Jacobian], *given: Any) -> Jacobian:
    """A Jacobian like another one."""
    function, argnums, request = given
    options = {f.name: getattr(request, f.name) for f in fields(request) if f.name != "output"}
    return kind(function, argnums, **options, **options_of(request.output))


class Hessian(Jacobian):
    """The Hessian of a function: the Jacobian of a gradient, whose value is the function's."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The Hessian at these arguments."""
        return self._evaluate(args, kwargs, replayable=False)[1]

    def value_and(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """`(f(x), H)` from one forward pass."""
        (_, value), hessian = self._evaluate(args, kwargs, replayable=False, is_value_read=True)
        return value, hessian
