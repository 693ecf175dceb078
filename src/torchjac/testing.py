"""What tests of a Jacobian need: the oracle, finite differences, and plans of one's own choice."""

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

_ALL = 2**40  # more seeds than any Jacobian has rows or columns


def oracle(outputs: Any, inputs: Any, batched: bool = False) -> Any:
    """The Jacobian by definition: one `torch.autograd.grad` call per row. Not coded for speed.

    Args:
        outputs: A tensor or a pytree of tensors with a graph.
        inputs: A tensor or a pytree of tensors that require a gradient.
        batched: Whether to keep only the blocks of equal samples, `(B, *out, *in)`.

    Returns:
        Tensors nested as outputs x inputs; zeros where an output does not depend on an input.
    """
    outs, output_spec = flatten(outputs)
    ins, input_spec = flatten(inputs)
    rows = []
    for out in outs:
        lines = [_row(out, i, ins) for i in range(out.numel())]
        blocks = []
        for j, given in enumerate(ins):
            parts = [line[j].reshape(-1) for line in lines]
            flat = torch.stack(parts) if parts else given.new_zeros((0, given.numel()))
            block = flat.reshape((*out.shape, *given.shape))
            blocks.append(_diagonal(block, out, given) if batched else block)
        rows.append(unflatten(blocks, input_spec))
    return unflatten(rows, output_spec)


def oracle_jacobian(
    f: Callable[..., Any], argnums: Argnums = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """The Jacobian of a function by the row loop, nested as `torch.func.jacrev` nests it."""

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        several = isinstance(argnums, tuple)
        positions = [p % len(args) for p in (argnums if isinstance(argnums, tuple) else (argnums,))]
        given = list(args)
        leaves = []
        for position in positions:
            flat, spec = flatten(args[position])
            fresh = [t.detach().clone().requires_grad_() for t in flat]
            leaves.append(unflatten(fresh, spec))
            given[position] = leaves[-1]
        with torch.enable_grad():
            result = f(*given, **kwargs)
            output, aux = result if has_aux else (result, None)
            jacobian = oracle(output, tuple(leaves) if several else leaves[0])
        return (jacobian, aux) if has_aux else jacobian

    return evaluate


def finite_differences(
    f: Callable[..., Any], argnums: int = 0, step: float = 1e-6
) -> Callable[..., Tensor]:
    """The Jacobian of a function of tensors by central differences, in double precision."""

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
    """Makes every Jacobian in the context use this mode and chunk, or raise `PlanRefused`.

    Args:
        mode: `reverse`, `forward` or `replicated`.
        chunk: Seeds at once; 1 is a loop of plain passes, None takes all of them.
    """
    return forced_plan(Plan(mode, _ALL if chunk is None else chunk))


def check_plans() -> AbstractContextManager[None]:
    """Compares every Jacobian that a plan gives in this context with passes of autograd.

    A plan whose u'J or Jv differ by more than rounding, for random u and v, is given up; passes
    give the result, and `Jacobian.explain` says so, with a report. A call costs two passes more.

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


def _diagonal(block: Tensor, out: Tensor, given: Tensor) -> Tensor:
    samples = range(out.shape[0])
    if not samples:
        return block.new_zeros((0, *out.shape[1:], *given.shape[1:]))
    return torch.stack([block.select(out.ndim, b)[b] for b in samples])
