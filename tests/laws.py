"""The laws every Jacobian is held to, and the slow oracle they are checked against.

The oracle is written here a second time, apart from ``torchjac.testing``, so that the library
never marks its own homework: one ``torch.autograd.grad`` call per output element, nothing else.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

import torchjac
from torchjac.testing import force_plan

# Every plan a caller can force; a chunk beyond the number of seeds takes them all at once.
PLANS: list[tuple[str, int]] = [
    ("reverse", 1000),
    ("reverse", 1),
    ("reverse", 2),
    ("forward", 1000),
    ("forward", 1),
    ("forward", 2),
    ("replicated", 1000),
    ("replicated", 2),
]
PLAN_IDS = [f"{mode}-{chunk}" for mode, chunk in PLANS]


def rows(out: Tensor, leaves: list[Tensor], create_graph: bool = False) -> list[Tensor]:
    """The Jacobian blocks of one output: one reverse pass per element, zeros where unused."""
    live = [i for i, x in enumerate(leaves) if x.requires_grad]
    blocks: list[list[Tensor]] = [[] for _ in leaves]
    for k in range(out.numel()):
        grads: list[Tensor | None] = [None] * len(leaves)
        if out.requires_grad and live:
            seed = torch.zeros(out.numel(), dtype=out.dtype)
            seed[k] = 1
            got = torch.autograd.grad(
                out,
                [leaves[i] for i in live],
                seed.view(out.shape),
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
            )
            for i, grad in zip(live, got, strict=True):
                grads[i] = grad
        for i, (x, grad) in enumerate(zip(leaves, grads, strict=True)):
            dense = torch.zeros(x.shape, dtype=x.dtype) if grad is None else grad.to_dense()
            blocks[i].append(dense)
    return [
        torch.stack(got).reshape(out.shape + x.shape) if got else x.new_zeros(out.shape + x.shape)
        for got, x in zip(blocks, leaves, strict=True)
    ]


def oracle(outputs: Any, inputs: Any, batched: bool = False, create_graph: bool = False) -> Any:
    """The Jacobian of an existing graph, nested outputs x inputs."""
    outs, out_spec = pytree.tree_flatten(outputs)
    leaves, in_spec = pytree.tree_flatten(inputs)
    nested = []
    for out in outs:
        with torch.enable_grad():
            blocks = rows(out, leaves, create_graph)
        if batched:
            blocks = [diagonal_blocks(b, out.dim()) for b in blocks]
        nested.append(pytree.tree_unflatten(blocks, in_spec))
    return pytree.tree_unflatten(nested, out_spec)


def diagonal_blocks(block: Tensor, out_dim: int) -> Tensor:
    """(B, *out, B, *in) -> (B, *out, *in): sample i against sample i."""
    return block.diagonal(dim1=0, dim2=out_dim).movedim(-1, 0)


def oracle_jacobian(
    f: Callable[..., Any], argnums: int | tuple[int, ...] = 0, *, batched: bool = False
) -> Callable[..., Any]:
    """Like ``torch.func.jacrev(f, argnums)``, by the row loop."""

    def jacobian(*args: Any, **kwargs: Any) -> Any:
        args_list = list(args)
        nums = (argnums,) if isinstance(argnums, int) else argnums
        for i in nums:
            args_list[i] = pytree.tree_map(
                lambda x: x.detach().clone(memory_format=torch.preserve_format).requires_grad_(),
                args[i],
            )
        picked = (
            args_list[argnums] if isinstance(argnums, int) else tuple(args_list[i] for i in argnums)
        )
        with torch.enable_grad():
            outputs = f(*args_list, **kwargs)
        return oracle(outputs, picked, batched)

    return jacobian


def same(actual: Any, expected: Any, rtol: float | None = None, atol: float | None = None) -> None:
    """Same nesting, dtypes, shapes and values; NaN equals NaN; sparse is compared dense."""
    got, got_spec = pytree.tree_flatten(actual)
    want, want_spec = pytree.tree_flatten(expected)
    assert got_spec == want_spec, f"nesting {got_spec} is not {want_spec}"
    for g, w in zip(got, want, strict=True):
        assert isinstance(g, Tensor)
        assert g.shape == w.shape, f"shape {tuple(g.shape)} is not {tuple(w.shape)}"
        assert g.dtype == w.dtype, f"dtype {g.dtype} is not {w.dtype}"
        r, a = rtol, atol
        if r is None or a is None:
            # Batched and single kernels round differently; scale by the size of the block.
            finite = w[w.isfinite()].abs()
            scale = max(1.0, finite.max().item()) if finite.numel() else 1.0
            r = 1e-7 if w.dtype == torch.float64 else 2e-3
            a = (1e-10 if w.dtype == torch.float64 else 2e-4) * scale
        torch.testing.assert_close(
            g.detach().to_dense(), w.detach(), rtol=r, atol=a, equal_nan=True
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the two warnings that announce right results (zeros, the row loop)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torchjac.UnusedInputWarning)
        warnings.simplefilter("ignore", torchjac.LoopWarning)
        yield


def under_plan(mode: str, chunk: int, compute: Callable[[], Any]) -> Any:
    """What compute gives under a forced plan; None where the plan refuses, with a reason."""
    with quiet(), force_plan(mode=mode, chunk=chunk):
        try:
            return compute()
        except torchjac.errors.PlanRefused as refusal:
            if not str(refusal):
                raise AssertionError("a refusal without a reason") from refusal
            return None


def leaf(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """A random leaf that requires grad; the same one for the same seed and shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=dtype, generator=generator).requires_grad_()


def value(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """A random tensor without a graph."""
    return leaf(*shape, dtype=dtype, seed=seed).detach()


def check_both(f: Callable[..., Any], *args: Tensor, seed: int | None = None) -> None:
    """Law: ``jac`` on f's graph and ``jacobian`` of f both equal the row loop, f32 or f64.

    ``seed`` is set before each run of f, for programs that draw random numbers.
    """

    def run(*xs: Tensor) -> Any:
        if seed is not None:
            torch.manual_seed(seed)
        return f(*xs)

    argnums = tuple(range(len(args)))
    with quiet():
        leaves = tuple(x.detach().clone().requires_grad_() for x in args)
        outputs = run(*leaves)
        expected = oracle(outputs, leaves)
        same(torchjac.jac(outputs, leaves, allow_unused=True), expected)
        # The graph survives the read, so a second read gives the same again.
        same(torchjac.jac(outputs, leaves, allow_unused=True), expected)
        plain = tuple(x.detach() for x in args)
        same(torchjac.jacobian(run, argnums)(*plain), oracle_jacobian(run, argnums)(*plain))
