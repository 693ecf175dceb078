"""The public functions: `jac` and `pattern` of tensors, `jacobian` and `hessian` of functions."""

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
    """Jacobian of tensors that already have a graph.

    The counterpart of `torch.autograd.grad(outputs, inputs)`, which returns the *sum* of the rows.

    Args:
        outputs: A tensor, or any pytree of tensors, computed from the inputs. Real floating-point.
        inputs: A tensor, or any pytree of tensors, that require a gradient; leaves or not.
        retain_graph: Whether the graph survives the call; False frees the graph with the last pass.
        create_graph: Whether the result can be differentiated again.
        allow_unused: Whether an input without any dependent output has the Jacobian zero, instead
            of raising an error.
        batched: Whether the leading axis of every input and output is a batch of independent
            samples; then the result is `(B, *out, *in)`. The independence is checked.
        layout: `torch.strided` for dense blocks; `torch.sparse_csr`, `torch.sparse_coo` or a SciPy
            class (`scipy.sparse.csr_array`, `coo_array`, ...) for 2-D `(out.numel(), in.numel())`
            matrices. The pattern is detected first, and rows or columns without a common entry
            share a pass.
        pattern: The structural nonzeros of a sparse layout, if known: a `Pattern`, a SciPy matrix
            or a tensor. Its first use is checked.
        memory_budget: Largest number of bytes of intermediate values, without the result; a quarter
            of the free memory by default. It limits the number of rows evaluated at once.

    Returns:
        Tensors of shape `out.shape + in.shape` and of the input's dtype, nested as outputs x
        inputs: with a dict of outputs and a list of inputs a dict of lists. Each row equals the
        result of `torch.autograd.grad`. Blocks may share memory, and need not be contiguous.

    Raises:
        UnusedInputError: No output depends on an input; the message names the input.
        CoupledBatchError: With `batched=True`, samples are not independent.
        DtypeError: A tensor is integer, bool or complex.
        ArgumentError: A leaf is not a tensor, or leading axes differ.

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
    graph = capture_graph(
        outputs, inputs, batched=batched, retain_graph=retain_graph, create_graph=create_graph
    )
    output = with_pattern(output, graph, lambda: pattern_if_it_pays(graph))
    request = Request("jac", output, create_graph=create_graph, memory_budget=memory_budget)
    arranged = evaluate_passes(graph, request)
    if arranged.unused and not allow_unused:
        raise UnusedInputError(unused_in_graph(graph, arranged.unused))
    return arranged.value


def pattern(outputs: Any, inputs: Any) -> Pattern:
    """Sparsity pattern of the Jacobian of tensors that already have a graph.

    The backward pass is traced once and analyzed, without sampling: every entry outside the pattern
    is proved to be zero. Tensors that the graph saved are constants, so the pattern holds for their
    values only (scope `local`); `jacobian(f).pattern(x)` returns one for every input.

    Args:
        outputs: As for `jac`.
        inputs: As for `jac`. An input without any dependent output has no entries.

    Returns:
        A `Pattern` of `out.numel()` rows and `in.numel()` columns, over all leaves.

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
    graph = capture_graph(outputs, inputs, batched=False, retain_graph=True, create_graph=False)
    return pattern_of_graph(graph)


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

    The counterpart of `torch.func.jacrev(f, argnums, has_aux=...)`, with the same result for every
    input for which jacrev works. f runs unchanged, once a call, on PyTorch's usual graph:
    data-dependent control flow, in-place writes, hooks, checkpointing, old-style
    `autograd.Function`s, dropout and BatchNorm in training mode mean the same as in training.
    The Jacobian of a function that is called repeatedly is compiled. While the state that f reads
    is unchanged, compiled code computes the Jacobian, and f does not run.

    Args:
        f: A function of tensors (any pytrees; arguments of other types pass through) that returns
            a tensor or a pytree of tensors. Real floating-point.
        argnums: Positions of the arguments to differentiate: an int, or a tuple of ints.
        has_aux: Whether f returns `(output, aux)`; aux is not differentiated.
        batched: Whether the leading axis of every differentiated argument and of every output is a
            batch of independent samples: f takes the whole batch `(B, ...)`, the result is
            `(B, *out, *in)`, at the cost of `out` passes, not `B * out`. Independence is checked.
        strict: Whether an input without any dependent output raises an error, instead of zeros and
            a warning.
        create_graph: Whether the result can be differentiated again by `torch.autograd`. Inside
            another torchjac call or a torch.func transform every result can.
        layout: As for `jac`.
        pattern: As for `jac`.
        memory_budget: As for `jac`.
        compile: Whether to compile native code at the first call, which then takes seconds; later
            calls take a fraction. If compilation fails, passes compute the Jacobian, and `explain`
            reports the reason.

    Returns:
        A `Jacobian`: call it with the arguments of f. Also `.value_and(*args)` and
        `.explain(*args)`.

    Raises:
        ArgumentError: f is not callable, or `argnums`, the layout or the budget is invalid.

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

    The counterpart of `torch.func.hessian(f, argnums)`, by reverse over reverse mode. For a scalar
    f the result is symmetric up to rounding.

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
        A `Jacobian` whose results have the shape `out.shape + in.shape + in.shape`.

    Raises:
        ArgumentError: As for `jacobian`.

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
        value, gradients = gradient.value_and(*args, **kwargs)
        return gradients, value

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
