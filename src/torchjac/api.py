"""The public calls: `jac` of tensors that exist, `jacobian` and `hessian` of functions."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

from torchjac._torch.vmap import inside_transform
from torchjac.capture import Call, Program, capture_function, capture_graph, differentiating
from torchjac.capture.function import Argnums, check_argnums, detached
from torchjac.errors import ArgumentError, UnusedInputError, UnusedInputWarning
from torchjac.explain import Record, last_run
from torchjac.layout import Arranged, check_layout
from torchjac.plan.memory import check_budget
from torchjac.solve import Request, solve
from torchjac.transform import delegate


def jac(
    outputs: Any,
    inputs: Any,
    *,
    retain_graph: bool = True,
    create_graph: bool = False,
    allow_unused: bool = False,
    batched: bool = False,
    layout: torch.layout = torch.strided,
    memory_budget: int | None = None,
) -> Any:
    """Jacobian of tensors that already have a graph, in one call.

    Stands beside `torch.autograd.grad(outputs, inputs)`, which gives the *sum* of the rows.

    Args:
        outputs: A tensor, or any pytree of tensors, computed from the inputs. Real floating-point.
        inputs: A tensor, or any pytree of tensors, that require a gradient; leaves or not.
        retain_graph: Whether the graph survives. It does by default, as users expect of a read;
            False frees it with the last pass.
        create_graph: Whether the result can be differentiated again.
        allow_unused: Whether an input that no output depends on gives zeros, instead of an error.
        batched: Whether the leading axis of every input and output is a batch of independent
            samples; the result is then `(B, *out, *in)`. Independence is checked.
        layout: `torch.strided` for dense blocks; `torch.sparse_csr` or `torch.sparse_coo` for 2-D
            `(out.numel(), in.numel())` matrices of the entries that are nonzero here.
        memory_budget: Bytes that may be held beside the result; a quarter of the free memory by
            default. The number of rows evaluated at once follows from it.

    Returns:
        Tensors of shape `out.shape + in.shape` and of the input's dtype, nested as outputs x
        inputs: with a dict of outputs and a list of inputs a dict of lists. Row by row what
        `torch.autograd.grad` gives. Blocks may share memory and need not be contiguous.

    Raises:
        UnusedInputError: No output depends on an input; the message names it.
        CoupledBatchError: `batched=True`, and samples are not independent.
        DtypeError: A tensor is integer, bool or complex.
        ArgumentError: Something is not a tensor, or leading axes do not fit.

    Example:
        >>> q = torch.tensor([1., 2.], requires_grad=True)
        >>> x = torch.cat([2*q, 4*q*q], -1)
        >>> torchjac.jac(x, q)
        tensor([[ 2.,  0.],
                [ 0.,  2.],
                [ 8.,  0.],
                [ 0., 16.]])
    """
    create_graph = create_graph or differentiating()
    check_layout(layout, create_graph)
    check_budget(memory_budget)
    program = capture_graph(
        outputs, inputs, batched=batched, retain_graph=retain_graph, create_graph=create_graph
    )
    arranged = solve(program, Request("jac", layout, memory_budget, None))
    if arranged.unused and not allow_unused:
        raise UnusedInputError(_unused_in_graph(program, arranged.unused))
    return arranged.value


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
        layout: torch.layout = torch.strided,
        memory_budget: int | None = None,
        entry: str = "jacobian",
    ):
        if not callable(function):
            raise ArgumentError(
                f"torchjac: {entry} takes a function, got {type(function).__name__}. For tensors "
                f"that are already computed use torchjac.jac(outputs, inputs)."
            )
        check_layout(layout, create_graph)
        check_argnums(argnums)
        self._function = function
        self._argnums = argnums
        self._has_aux = has_aux
        self._batched = batched
        self._strict = strict
        self._create_graph = create_graph
        self._layout = layout
        self._memory_budget = check_budget(memory_budget)
        self._entry = entry
        self._identity = object()  # unlike id(self), never another Jacobian's
        functools.update_wrapper(self, function, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The Jacobian at these arguments; `(J, aux)` with `has_aux=True`."""
        value, jacobian = self._evaluate(args, kwargs, replayable=not self._has_aux)
        return (jacobian, value[1]) if self._has_aux else jacobian

    def value_and(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """`(f(x), J)` from one forward pass; `((output, aux), J)` with `has_aux=True`."""
        return self._evaluate(args, kwargs, replayable=False)

    def explain(self, *args: Any, **kwargs: Any) -> Record:
        """Computes the Jacobian once and tells how: engine, mode, passes, chunk, time, refusals."""
        self._evaluate(args, kwargs, replayable=not self._has_aux)
        record = last_run()
        assert record is not None, "every evaluation leaves a record"
        return record

    def __repr__(self) -> str:
        """Names the function and what is differentiated."""
        name = getattr(self._function, "__qualname__", repr(self._function))
        return f"torchjac.{self._entry}({name}, argnums={self._argnums})"

    def _evaluate(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], replayable: bool
    ) -> tuple[Any, Any]:
        """What f returned, and the Jacobian; `replayable` says whether f may run once more."""
        call = Call(self._function, self._argnums, self._has_aux, args, kwargs)
        if inside_transform() or torch.compiler.is_compiling() or call.traced():
            return delegate(call, self._batched, self._layout, self._entry)
        create_graph = self._create_graph or differentiating()
        check_layout(self._layout, create_graph)
        # A module in training mode keeps statistics and counters: it must run once a call.
        stateful = isinstance(self._function, torch.nn.Module) and self._function.training
        replayable = replayable and not stateful
        program, returned = capture_function(
            call, batched=self._batched, create_graph=create_graph, replayable=replayable
        )
        request = Request(self._entry, self._layout, self._memory_budget, self._identity)
        arranged = solve(program, request)
        self._report_unused(program, arranged)
        return (returned if create_graph else detached(returned)), arranged.value

    def _report_unused(self, program: Program, arranged: Arranged) -> None:
        if not arranged.unused:
            return
        if self._strict:
            raise UnusedInputError(_unused_in_function(program, arranged.unused))
        # The derivative of a Jacobian that is constant is zero without anything being amiss; the
        # inner Jacobian has spoken if the input itself is unused.
        if not isinstance(self._function, Jacobian) and self._entry != "hessian":
            warnings.warn(
                _unused_in_function(program, arranged.unused), UnusedInputWarning, stacklevel=4
            )


class Hessian(Jacobian):
    """The Hessian of a function: the Jacobian of a gradient, whose value is the function's."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The Hessian at these arguments."""
        return self._evaluate(args, kwargs, replayable=False)[1]

    def value_and(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """`(f(x), H)` from one forward pass."""
        (_, value), hessian = self._evaluate(args, kwargs, replayable=False)
        return value, hessian


def jacobian(
    f: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    batched: bool = False,
    strict: bool = False,
    create_graph: bool = False,
    layout: torch.layout = torch.strided,
    memory_budget: int | None = None,
) -> Jacobian:
    """Jacobian of a function.

    Stands beside `torch.func.jacrev(f, argnums, has_aux=...)` and gives the same for every input
    on which that works. f runs as it is, once a call, on PyTorch's usual graph: data-dependent
    control flow, in-place writes, hooks, checkpointing, old-style `autograd.Function`s, dropout
    and BatchNorm in training mode mean what they mean in a training step.

    Args:
        f: A function of tensors (any pytrees; other arguments are passed through) that returns
            a tensor or a pytree of tensors.
        argnums: Which positional arguments to differentiate: an int, or a tuple of ints.
        has_aux: Whether f returns `(output, aux)`; aux is not differentiated.
        batched: Whether the leading axis of every differentiated argument and of every output is a
            batch of independent samples: f takes the whole batch `(B, ...)`, the result is
            `(B, *out, *in)`, at the cost of `out` passes, not `B * out`. Independence is checked.
        strict: Whether an input that no output depends on is an error, instead of zeros and a
            warning.
        create_graph: Whether the result can be differentiated again by `torch.autograd`. Inside
            another torchjac call or a torch.func transform it always can.
        layout: As for `jac`.
        memory_budget: As for `jac`.

    Returns:
        A `Jacobian`: call it with f's arguments. Also `.value_and(*args)` and `.explain(*args)`.

    Raises:
        ArgumentError: f is not callable, or the layout or the budget is not one.

    Example:
        >>> J = torchjac.jacobian(lambda q: torch.cat([2*q, 4*q*q], -1))
        >>> J(torch.tensor([1., 2.]))
        tensor([[ 2.,  0.],
                [ 0.,  2.],
                [ 8.,  0.],
                [ 0., 16.]])
    """
    return Jacobian(
        f,
        argnums,
        has_aux=has_aux,
        batched=batched,
        strict=strict,
        create_graph=create_graph,
        layout=layout,
        memory_budget=memory_budget,
    )


def hessian(
    f: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    batched: bool = False,
    strict: bool = False,
    create_graph: bool = False,
    layout: torch.layout = torch.strided,
    memory_budget: int | None = None,
) -> Jacobian:
    """Hessian of a function: the Jacobian of its gradient (of its Jacobian, if f is not scalar).

    Stands beside `torch.func.hessian(f, argnums)`. Reverse over reverse; for a scalar f the result
    is symmetric to rounding.

    Args:
        f: As for `jacobian`; with `batched=True` a scalar function of a sample returns `(B,)`.
        argnums: As for `jacobian`; with a tuple the result is nested argnums x argnums.
        batched: As for `jacobian`.
        strict: As for `jacobian`.
        create_graph: As for `jacobian`.
        layout: As for `jac`.
        memory_budget: As for `jac`.

    Returns:
        A `Jacobian` of shape `out.shape + in.shape + in.shape`.

    Example:
        >>> torchjac.hessian(lambda x: (x ** 3).sum())(torch.tensor([1., 2.]))
        tensor([[ 6.,  0.],
                [ 0., 12.]])
    """
    if not callable(f):
        Jacobian(f, entry="hessian")  # raises
    gradient = Jacobian(
        f, argnums, batched=batched, strict=strict, memory_budget=memory_budget, entry="gradient"
    )

    @functools.wraps(f)
    def gradient_and_value(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        value, slope = gradient.value_and(*args, **kwargs)
        return slope, value

    return Hessian(
        gradient_and_value,
        argnums,
        has_aux=True,
        batched=batched,
        create_graph=create_graph,
        layout=layout,
        memory_budget=memory_budget,
        entry="hessian",
    )


def _unused_in_graph(program: Program, positions: tuple[int, ...]) -> str:
    names = [program.nest.name_input(p) for p in positions]
    ungraphed = [p for p in positions if not program.nest.inputs[p].requires_grad]
    if inside_transform():
        cause = (
            "inside torch.vmap or a torch.func transform, tensors do not carry the graph of the "
            "tensors they stand for; use torchjac.jacobian(f) there"
        )
    elif not program.outputs:
        cause = (
            "the outputs have no graph at all (they were computed under no_grad, from detached "
            "tensors, or before requires_grad was set)"
        )
    elif ungraphed:
        cause = (
            f"{program.nest.name_input(ungraphed[0])} does not require a gradient; call "
            f".requires_grad_() on it before the outputs are computed"
        )
    else:
        cause = (
            "its name may have been rebound to a new tensor (x = x * 2), or the outputs use a "
            "detached copy"
        )
    return (
        f"torchjac.jac: no output depends on {', '.join(names)}. Usual cause: {cause}. Pass "
        f"allow_unused=True to get zeros."
    )


def _unused_in_function(program: Program, positions: tuple[int, ...]) -> str:
    names = ", ".join(program.nest.name_input(p) for p in positions)
    return (
        f"torchjac: no output depends on {names}: its Jacobian is zero. Usual causes: the function "
        f"uses the tensor through a closure (jacobian(lambda x: y, x) with a y computed before) "
        f"instead of its argument, or detaches it. For outputs that are already computed use "
        f"torchjac.jac(outputs, inputs)."
    )
