"""The public calls: `jac` of tensors that exist, `jacobian` and `hessian` of functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from torchjac.call import Argnums
from torchjac.capture.checks import unused_in_graph
from torchjac.capture.eager import capture_graph
from torchjac.capture.nesting import differentiating
from torchjac.errors import UnusedInputError
from torchjac.host.memory import check_budget
from torchjac.jacobian import Hessian, Jacobian
from torchjac.jit.eager import evaluate_passes
from torchjac.jit.patterns import pattern_if_it_pays, with_pattern
from torchjac.request import Layout, Request, check_graph, output_of
from torchjac.sparsity.detect import pattern_of_graph
from torchjac.sparsity.pattern import Pattern


def jac(
    outputs: Any,
    inputs: Any,
    *,
    retain_graph: bool = True,
    create_graph: bool = False,
    allow_unused: bool = False,
    batched: bool = False,
    layout: Layout = torch.strided,
    pattern: Any = None,
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
        layout: `torch.strided` for dense blocks; `torch.sparse_csr`, `torch.sparse_coo` or a SciPy
            class (`scipy.sparse.csr_array`, `coo_array`, ...) for 2-D `(out.numel(), in.numel())`
            matrices. Their pattern is found first, and rows or columns that share no entry share
            a pass.
        pattern: With a sparse layout, the structural nonzeros, where they are known: a `Pattern`,
            a SciPy matrix or a tensor. Its first use is checked.
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
    output = output_of(layout, pattern)
    check_graph(output, create_graph)
    check_budget(memory_budget)
    program = capture_graph(
        outputs, inputs, batched=batched, retain_graph=retain_graph, create_graph=create_graph
    )
    output = with_pattern(output, program, lambda: pattern_if_it_pays(program))
    request = Request("jac", output, create_graph=create_graph, memory_budget=memory_budget)
    arranged = evaluate_passes(program, request)
    if arranged.unused and not allow_unused:
        raise UnusedInputError(unused_in_graph(program, arranged.unused))
    return arranged.value


def pattern(outputs: Any, inputs: Any) -> Pattern:
    """Sparsity pattern of the Jacobian of tensors that already have a graph.

    The backward pass is traced once and read: nothing is sampled, an entry that is left out is
    zero for a reason. What the graph saved counts as it is, so the pattern holds for these values
    (scope `local`); `jacobian(f).pattern(x)` gives one that holds for every input.

    Args:
        outputs: As for `jac`.
        inputs: As for `jac`. An input that no output depends on has no entries.

    Returns:
        A `Pattern` of `out.numel()` rows and `in.numel()` columns, all leaves together.

    Raises:
        ArgumentError, DtypeError: As for `jac`.
        CaptureRefused: The backward pass cannot be traced.

    Example:
        >>> q = torch.tensor([1., 2.], requires_grad=True)
        >>> torchjac.pattern(torch.cat([2*q, 4*q*q], -1), q).to_dense()
        tensor([[ True, False],
                [False,  True],
                [ True, False],
                [False,  True]])
    """
    program = capture_graph(outputs, inputs, batched=False, retain_graph=True, create_graph=False)
    return pattern_of_graph(program)


def jacobian(
    f: Callable[..., Any],
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
) -> Jacobian:
    """Jacobian of a function.

    Stands beside `torch.func.jacrev(f, argnums, has_aux=...)` and gives the same for every input
    on which that works. f runs as it is, once a call, on PyTorch's usual graph: data-dependent
    control flow, in-place writes, hooks, checkpointing, old-style `autograd.Function`s, dropout
    and BatchNorm in training mode mean what they mean in a training step. A function that is called
    again and again and always does the same is not run any more: its Jacobian is computed by the
    operations that it takes, as long as nothing that f reads has changed.

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
        pattern: As for `jac`.
        memory_budget: As for `jac`.
        compile: Whether to compile what computes the Jacobian of a function that can be captured:
            the first call takes seconds, later ones a fraction. Where that fails it runs as it is,
            and `explain` says why.

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
        pattern=pattern,
        memory_budget=memory_budget,
        compile=compile,
    )


def hessian(
    f: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    batched: bool = False,
    strict: bool = False,
    create_graph: bool = False,
    layout: Layout = torch.strided,
    pattern: Any = None,
    memory_budget: int | None = None,
    compile: bool = False,
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
        pattern: As for `jac`.
        memory_budget: As for `jac`.
        compile: As for `jacobian`.

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
        pattern=pattern,
        memory_budget=memory_budget,
        compile=compile,
        entry="hessian",
    )
