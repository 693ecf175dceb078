"""The Jacobian of a function as a callable object, with its pattern, record, plans and exports."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from torchjac.call import Argnums, check_argnums
from torchjac.errors import ArgumentError, LocalPatternWarning, warn
from torchjac.export import export, is_package
from torchjac.host.memory import check_budget
from torchjac.jit.dispatcher import Dispatcher
from torchjac.record import Record, last_run
from torchjac.request import Layout, Request, check_graph, options_of, output_of
from torchjac.sparsity.detect import pattern_of_function
from torchjac.sparsity.pattern import Pattern


class Jacobian:
    """The Jacobian of a function, as a callable object; `torchjac.jacobian` creates it.

    Example:
        >>> J = torchjac.jacobian(lambda q: q * q)
        >>> J(torch.tensor([1., 2.]))
        tensor([[2., 0.],
                [0., 4.]])
    """

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
        """The Jacobian at the arguments of f; `(J, aux)` with `has_aux=True`.

        Returns:
            Tensors `out.shape + in.shape`, nested as outputs x inputs; sparse matrices
            `(out.numel(), in.numel())` with a sparse layout.

        Raises:
            TorchjacError: As for `torchjac.jacobian`; errors of f pass through.
        """
        fast_path = self._dispatcher.fast_path
        if fast_path is not None and not kwargs:
            jacobian = fast_path(args)
            if jacobian is not None:
                return jacobian
        has_aux = self._request.has_aux
        value, jacobian = self._evaluate(args, kwargs, not has_aux, is_value_read=has_aux)
        return (jacobian, value[1]) if has_aux else jacobian

    def value_and(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The return value and the Jacobian from one run of f.

        Returns:
            `(f(x), J)`; `((output, aux), J)` with `has_aux=True`.
        """
        return self._evaluate(args, kwargs, replayable=False, is_value_read=True)

    def explain(self, *args: Any, **kwargs: Any) -> Record:
        """Computes the Jacobian once, and returns the record of this run.

        Returns:
            A `Record`: engine, mode, passes, chunk, seconds, refused plans; print it.
        """
        self._evaluate(args, kwargs, replayable=not self._request.has_aux)
        record = last_run()
        assert record is not None, "every evaluation leaves a record"
        reason = self._dispatcher.refused
        if reason is None or record.engine == "accumulate":
            return record
        refusals = (*record.refusals, ("accumulate", reason))
        return replace(record, refusals=refusals, report=self._dispatcher.report)

    def pattern(self, *args: Any, **kwargs: Any) -> Pattern:
        """The sparsity pattern for all inputs of the shapes of these arguments.

        f runs once as usual. Then its derivative is traced without values, and analyzed operation
        by operation. The pattern holds for any values of floating-point arguments, and for the
        current values of integer and bool arguments and of other tensors that f reads. Where shapes
        or control flow depend on values, the pattern holds for the values of these arguments only,
        and a `LocalPatternWarning` gives the reason.

        Returns:
            A `Pattern` of `out.numel()` rows and `in.numel()` columns; print it, or see its `blame`
            for the operations that made it dense.

        Raises:
            CaptureRefused: The derivative cannot be traced.
        """
        call = self._dispatcher.call(args, kwargs)
        pattern = pattern_of_function(call)
        if pattern.scope == "local":
            warn(
                f"torchjac: the pattern holds for these values only, because {pattern.reason}.",
                LocalPatternWarning,
            )
        return pattern

    def save(self, path: str | Path, *args: Any, **kwargs: Any) -> None:
        """Writes the plan for these arguments to a file, which spares other processes the search.

        The file is data only (JSON and arrays): loading executes no code. It holds the constants
        that f reads, but neither values of arguments nor tensors that require a gradient. A plan
        determines the computed Jacobian: load only files from sources that you trust.

        Args:
            path: The file; it is replaced.
            *args: Arguments of f.
            **kwargs: Keyword arguments of f.

        Raises:
            PlanError: Calls with these arguments have no plan; the message is the reason.

        Example:
            >>> J = torchjac.jacobian(f)
            >>> J.save("f.plan", x)
            >>> J = torchjac.jacobian(f).load("f.plan")  # in another process
        """
        call = self._dispatcher.call(args, kwargs)
        self._dispatcher.save(path, call)

    def load(self, path: str | Path) -> Jacobian:
        """Reads a plan that `save` wrote.

        The plan is used for calls in which f runs the same operations as when the plan was saved.
        Its first use is verified against passes, as that of any plan. Other calls ignore it.

        Args:
            path: The file.

        Returns:
            This Jacobian.

        Raises:
            PlanError: The file holds no plan, or a plan for another version of torch.
            OSError: The file cannot be read.
        """
        self._dispatcher.load(path)
        return self

    def export(self, path: str | Path, *args: Any, **kwargs: Any) -> list[Path]:
        """Exports f and its Jacobian to C or C++.

        *Plain C* (any suffix but `.pt2`): a `.c` and a `.h` without dependencies, and a `.hpp` that
        calls them with tensors of libtorch. The C function takes dense arrays of the shapes and
        dtypes of these arguments, and writes J and `f(x)`. Of a sparse J it writes the entries, row
        by row; constant arrays hold the pattern. With `batched=True` and 32 samples or more the
        function takes any number of samples. Many threads may call it at once. The header documents
        all arrays.

        *AOTInductor package* (`.pt2`): `AOTIModelPackageLoader` loads it in C++, and
        `torch._inductor.aoti_load_package` in Python. It returns the outputs of f, then the blocks
        of J, row by row, or the entries of a sparse J. With `batched=True` and 32 samples or more
        it takes any number of samples, unless operations depend on this number; all other sizes are
        those of these arguments. Compiling takes half a minute.

        Both hold the current values of parameters and of other tensors that f reads.

        Args:
            path: The suffix selects the format; the stem names the files and the function.
            *args: Arguments of f.
            **kwargs: Keyword arguments of f.

        Returns:
            The files.

        Raises:
            PlanError: Calls with these arguments have no plan, or the plan cannot be exported; the
                message is the reason.

        Example:
            >>> torchjac.jacobian(f).export("build/arm", q)  # arm.c, arm.h, arm.hpp
            >>> torchjac.jacobian(f).export("build/arm.pt2", q)
        """
        call = self._dispatcher.call(args, kwargs)
        packaged = is_package(Path(path))
        compiled = self._dispatcher.compiled(call, "whole tensors" if packaged else "any")
        return export(Path(path), call, compiled)

    def spy(self, *args: Any, path: str | Path | None = None, **kwargs: Any) -> Any:
        """Plots the pattern at these arguments; see `Pattern.spy`."""
        return self.pattern(*args, **kwargs).spy(path)

    def __reduce__(self) -> Any:
        """Copies and pickles hold the function and the options, but no captures and timings."""
        return _rebuild, (type(self), self._function, self._argnums, self._request)

    def __repr__(self) -> str:
        """The name of the function, and the positions of the differentiated arguments."""
        name = getattr(self._function, "__qualname__", repr(self._function))
        return f"torchjac.{self._request.entry}({name}, argnums={self._argnums})"

    def _evaluate(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        replayable: bool,
        is_value_read: bool = False,
    ) -> tuple[Any, Any]:
        """The return value of f, and the Jacobian.

        Args:
            args: Positional arguments of f.
            kwargs: Keyword arguments of f.
            replayable: Whether f may run once more.
            is_value_read: Whether the caller uses the return value; None stands for it if not.
        """
        dispatcher = self._dispatcher
        return dispatcher(dispatcher.call(args, kwargs), replayable, is_value_read)


def _rebuild(
    kind: type[Jacobian], function: Callable[..., Any], argnums: Argnums, request: Request
) -> Jacobian:
    """A Jacobian from the state of a pickle."""
    options = {f.name: getattr(request, f.name) for f in fields(request) if f.name != "output"}
    return kind(function, argnums, **options, **options_of(request.output))


class Hessian(Jacobian):
    """The Hessian of a function f: the Jacobian of its gradient; `value_and` returns `f(x)`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The Hessian at the arguments of f, of shape `out.shape + in.shape + in.shape`."""
        return self._evaluate(args, kwargs, replayable=False)[1]

    def value_and(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The return value and the Hessian, `(f(x), H)`, from one run of f."""
        (_, value), hessian = self._evaluate(args, kwargs, replayable=False, is_value_read=True)
        return value, hessian
