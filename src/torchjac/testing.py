"""Tools to test Jacobians: the oracle, finite differences, forced plans and checked plans."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from torchjac._torch.pytree import flatten, unflatten
from torchjac.call import Argnums
from torchjac.jit.checking import checking
from torchjac.passes.plan import Mode, Plan
from torchjac.passes.race import forced_plan

_ALL_SEEDS = 2**40  # seeds: more than any Jacobian has rows or columns


def oracle(outputs: Any, inputs: Any, batched: bool = False) -> Any:
    """The Jacobian by definition: one `torch.autograd.grad` call for each row. Slow.

    Args:
        outputs: A tensor or a pytree of tensors with a graph.
        inputs: A tensor or a pytree of tensors that require a gradient.
        batched: Whether to return the blocks of equal samples only, `(B, *out, *in)`.

    Returns:
        Tensors of shape `out.shape + in.shape`, nested as outputs x inputs; zeros where an output
        does not depend on an input.

    Example:
        >>> q = torch.tensor([1., 2.], requires_grad=True)
        >>> torchjac.testing.oracle(q * q, q)
        tensor([[2., 0.],
                [0., 4.]])
    """
    outs, output_spec = flatten(outputs)
    ins, input_spec = flatten(inputs)
    rows = []
    for out in outs:
        lines = [_row(out, i, ins) for i in range(out.numel())]
        blocks = []
        for j, leaf in enumerate(ins):
            parts = [line[j].reshape(-1) for line in lines]
            flat = torch.stack(parts) if parts else leaf.new_zeros((0, leaf.numel()))
            block = flat.reshape((*out.shape, *leaf.shape))
            blocks.append(_diagonal(block, out, leaf) if batched else block)
        rows.append(unflatten(blocks, input_spec))
    return unflatten(rows, output_spec)


def oracle_jacobian(
    f: Callable[..., Any], argnums: Argnums = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """The Jacobian of a function by `oracle`, nested as `torch.func.jacrev` nests it.

    Args:
        f: A function of pytrees of tensors.
        argnums: Positions of the arguments to differentiate.
        has_aux: Whether f returns `(output, aux)`.

    Returns:
        A function of the arguments of f; it returns J, or `(J, aux)` with `has_aux`.
    """

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        several = isinstance(argnums, tuple)
        positions = [p % len(args) for p in (argnums if isinstance(argnums, tuple) else (argnums,))]
        values = list(args)
        leaves = []
        for position in positions:
            flat, spec = flatten(args[position])
            fresh = [t.detach().clone().requires_grad_() for t in flat]
            leaves.append(unflatten(fresh, spec))
            values[position] = leaves[-1]
        with torch.enable_grad():
            result = f(*values, **kwargs)
            output, aux = result if has_aux else (result, None)
            jacobian = oracle(output, tuple(leaves) if several else leaves[0])
        return (jacobian, aux) if has_aux else jacobian

    return evaluate


def finite_differences(
    f: Callable[..., Any], argnums: int = 0, step: float = 1e-6
) -> Callable[..., Tensor]:
    """The Jacobian of a function of tensors by central differences, in double precision.

    Args:
        f: A function that returns one tensor.
        argnums: Position of the tensor to differentiate with respect to.
        step: Half the distance of the two points of a difference.

    Returns:
        A function of the arguments of f; it returns a tensor `out.shape + in.shape` of float64.
    """

    def evaluate(*args: Any, **kwargs: Any) -> Tensor:
        x = args[argnums].detach().to(torch.float64)
        columns: list[Tensor] = []
        with torch.no_grad():
            for number in range(x.numel()):
                values = []
                for sign in (1, -1):
                    moved = x.clone()
                    moved.view(-1)[number] += sign * step
                    values.append(f(*args[:argnums], moved, *args[argnums + 1 :], **kwargs))
                columns.append((values[0] - values[1]) / (2 * step))
            if not columns:
                y = f(*args, **kwargs)
                return torch.zeros((*y.shape, *x.shape), dtype=x.dtype)
        return torch.stack(columns, -1).reshape((*columns[0].shape, *x.shape))

    return evaluate


def force_plan(mode: Mode, chunk: int | None = None) -> AbstractContextManager[None]:
    """Forces one mode and chunk on every Jacobian in the context; others raise `PlanRefused`.

    Args:
        mode: `reverse`, `forward` or `replicated`.
        chunk: Number of seeds in a pass; 1 is a loop of plain passes, None stands for all seeds.
    """
    return forced_plan(Plan(mode, _ALL_SEEDS if chunk is None else chunk))


def check_plans() -> AbstractContextManager[None]:
    """Compares every Jacobian that compiled code computes in this context with autograd.

    The products u'J and Jv are compared, for random u and v: two more passes a call. If they differ
    by more than rounding the compiled code is discarded, passes compute the result, and
    `Jacobian.explain` reports the difference.

    Example:
        >>> J = torchjac.jacobian(f)
        >>> with torchjac.testing.check_plans():
        ...     J(x)
    """
    return checking()


def _row(out: Tensor, number: int, inputs: list[Tensor]) -> list[Tensor]:
    seed = torch.zeros(out.numel(), dtype=out.dtype, device=out.device)
    seed[number] = 1
    if not out.requires_grad:
        return [torch.zeros_like(t) for t in inputs]
    grads = torch.autograd.grad(
        out, inputs, seed.reshape(out.shape), retain_graph=True, allow_unused=True
    )
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs, strict=True)]


def _diagonal(block: Tensor, out: Tensor, leaf: Tensor) -> Tensor:
    samples = range(out.shape[0])
    if not samples:
        return block.new_zeros((0, *out.shape[1:], *leaf.shape[1:]))
    return torch.stack([block.select(out.ndim, b)[b] for b in samples])
