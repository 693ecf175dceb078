"""The ways to a Jacobian in PyTorch, each as "prepare once, then call".

A method turns a workload and its arguments into a call without arguments; only that call is
timed. Its result is a tensor, or a tuple of one tensor per differentiated argument, in the shapes
of `torch.func.jacrev` (batched: of `vmap(jacrev)`), or 2-D sparse blocks.

On batched workloads the methods that know no batches take the usual trick of summing the output
over the batch: the samples are independent, so the derivative of the sum holds every block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import functional

from benchmarks.workloads import Workload

Arguments = tuple[Tensor, ...]
Call = Callable[[], Any]

CALL_LIMIT = 20.0
"""Seconds one call may take before it is recorded as too slow."""
COMPILE_LIMIT = 120.0
"""Seconds the first call of a compiling method may take."""


@dataclass(frozen=True)
class Method:
    """One column of the table.

    Attributes:
        key: Name on the command line and in the JSON file.
        title: Head of the column.
        prepare: ``(workload, arguments) -> call``; None for a method of the peers' Python.
        applies: Whether the method makes sense for a workload.
        compiles: The first call may take as long as a compiler.
    """

    key: str
    title: str
    prepare: Callable[[Workload, Arguments], Call] | None
    applies: Callable[[Workload], bool]
    compiles: bool = False


def torchjac_dense(w: Workload, args: Arguments) -> Call:
    """`torchjac.jacobian`, or `torchjac.jac` where the outputs exist already."""
    import torchjac

    if w.graph:
        out, inputs = graph_of(w, args)
        wanted = inputs[0] if isinstance(w.argnums, int) else inputs
        return lambda: torchjac.jac(out, wanted, batched=w.batched)
    jacobian = torchjac.jacobian(w.f, w.argnums, batched=w.batched)
    return lambda: jacobian(*args)


def torchjac_compiled(w: Workload, args: Arguments) -> Call:
    """`torchjac.jacobian` with `compile=True`."""
    import torchjac

    jacobian = torchjac.jacobian(w.f, w.argnums, batched=w.batched, compile=True)
    return lambda: jacobian(*args)


def torchjac_csr_compiled(w: Workload, args: Arguments) -> Call:
    """`torchjac.jacobian` with `compile=True` and a sparse result."""
    import torchjac

    jacobian = torchjac.jacobian(w.f, w.argnums, layout=torch.sparse_csr, compile=True)
    return lambda: jacobian(*args)


def torchjac_csr(w: Workload, args: Arguments) -> Call:
    """`torchjac.jacobian` with a sparse result."""
    import torchjac

    jacobian = torchjac.jacobian(w.f, w.argnums, layout=torch.sparse_csr)
    return lambda: jacobian(*args)


def transform(w: Workload, of: Callable[..., Any]) -> Callable[..., Any]:
    """``of(f)``, under `vmap` for a batched workload."""
    inner = of(w.f, w.argnums)
    return torch.func.vmap(inner) if w.batched else inner  # type: ignore[no-any-return]


def jacrev(w: Workload, args: Arguments) -> Call:
    """`torch.func.jacrev`."""
    f = transform(w, torch.func.jacrev)
    return lambda: f(*args)


def jacfwd(w: Workload, args: Arguments) -> Call:
    """`torch.func.jacfwd`."""
    f = transform(w, torch.func.jacfwd)
    return lambda: f(*args)


def compiled(w: Workload, args: Arguments) -> Call:
    """`torch.compile` around `jacrev`."""
    f = torch.compile(transform(w, torch.func.jacrev))
    return lambda: f(*args)


def functional_jacobian(**options: Any) -> Callable[[Workload, Arguments], Call]:
    """`torch.autograd.functional.jacobian` with `options`."""

    def prepare(w: Workload, args: Arguments) -> Call:
        inputs = args[0] if isinstance(w.argnums, int) and len(args) == 1 else args

        def batch_summed(*xs: Tensor) -> Tensor:
            return w.f(*xs).sum(0)

        f = batch_summed if w.batched else w.f

        def call() -> Any:
            result = functional.jacobian(f, inputs, **options)
            if not w.batched:
                return result
            # (m, B, n) -> (B, m, n): a view, no time.
            blocks = result if isinstance(result, tuple) else (result,)
            return tuple(block.movedim(1, 0) for block in blocks)

        return call

    return prepare


def graph_of(w: Workload, args: Arguments) -> tuple[Tensor, Arguments]:
    """The output and the differentiated inputs with a graph between them."""
    leaves = [x.detach().requires_grad_() if i in w.positions else x for i, x in enumerate(args)]
    return w.f(*leaves), tuple(leaves[i] for i in w.positions)


def seeds(w: Workload, out: Tensor) -> Tensor:
    """One cotangent a row; for a batch, the same one in every sample."""
    eye = torch.eye(w.m, dtype=out.dtype)
    if w.batched:
        return eye.unsqueeze(1).expand(w.m, out.shape[0], w.m)
    return eye.view(w.m, *out.shape)


def gathered(w: Workload, rows: Sequence[Tensor], out: Tensor) -> tuple[Tensor, ...]:
    """Stacked rows -> Jacobians: ``(B, m, n)`` of a batch, else ``out.shape + in.shape``."""
    if w.batched:
        return tuple(row.movedim(1, 0) for row in rows)
    return tuple(row.view(*out.shape, *row.shape[1:]) for row in rows)


def by_grad(pull: Callable[[Tensor, Arguments, Tensor], Sequence[Tensor]]) -> Any:
    """A method from ``pull(out, inputs, seeds) -> stacked rows``; builds the graph if it must."""

    def prepare(w: Workload, args: Arguments) -> Call:
        if w.graph:
            out, inputs = graph_of(w, args)
            return lambda: gathered(w, pull(out, inputs, seeds(w, out)), out)

        def call() -> Any:
            out, inputs = graph_of(w, args)
            return gathered(w, pull(out, inputs, seeds(w, out)), out)

        return call

    return prepare


def pull_rows(out: Tensor, inputs: Arguments, cotangents: Tensor) -> Sequence[Tensor]:
    """One `torch.autograd.grad` a row."""
    rows = [torch.autograd.grad(out, inputs, c, retain_graph=True) for c in cotangents]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def pull_batched(out: Tensor, inputs: Arguments, cotangents: Tensor) -> Sequence[Tensor]:
    """All rows in one call with ``is_grads_batched=True``."""
    return torch.autograd.grad(out, inputs, cotangents, retain_graph=True, is_grads_batched=True)


def _always(w: Workload) -> bool:
    return True


def _from_function(w: Workload) -> bool:
    return not w.graph


def _all_arguments(w: Workload) -> bool:
    return not w.graph and len(w.positions) in (1, 3)


def _forward_functional(w: Workload) -> bool:
    # A sum over the batch has one output row but B * n columns: no sense in forward mode.
    return _all_arguments(w) and not w.batched


def _sparse(w: Workload) -> bool:
    return w.sparse and not w.graph and not w.batched


METHODS: tuple[Method, ...] = (
    Method("torchjac", "torchjac", torchjac_dense, _always),
    Method("torchjac-csr", "torchjac CSR", torchjac_csr, _sparse),
    Method("torchjac-compiled", "torchjac compiled", torchjac_compiled, _from_function, True),
    Method("torchjac-csr-compiled", "torchjac CSR compiled", torchjac_csr_compiled, _sparse, True),
    Method("jacrev", "jacrev", jacrev, _from_function),
    Method("jacfwd", "jacfwd", jacfwd, _from_function),
    Method("compile", "compile(jacrev)", compiled, _from_function, compiles=True),
    Method("functional", "functional", functional_jacobian(), _all_arguments),
    Method(
        "functional-vec",
        "functional vectorized",
        functional_jacobian(vectorize=True),
        _all_arguments,
    ),
    Method(
        "functional-fwd",
        "functional forward",
        functional_jacobian(vectorize=True, strategy="forward-mode"),
        _forward_functional,
    ),
    Method("grad-batched", "grad batched", by_grad(pull_batched), _always),
    Method("grad-rows", "grad row loop", by_grad(pull_rows), _always),
)
"""The methods of this Python, in the order of the columns."""


LARGE = 2**26
"""Sparse matrices with more elements than this are never written out."""


def _triplets(blocks: Sequence[Tensor]) -> dict[str, Any]:
    """Entries of sparse blocks side by side."""
    parts = [b.detach().to_sparse(layout=torch.sparse_coo).coalesce() for b in blocks]
    first = np.cumsum([0, *(p.shape[1] for p in parts)])
    index = [p.indices().numpy() for p in parts]
    return {
        "row": np.concatenate([i[0] for i in index]),
        "column": np.concatenate([i[1] + f for i, f in zip(index, first, strict=False)]),
        "value": np.concatenate([p.values().numpy() for p in parts]),
        "shape": np.array([parts[0].shape[0], first[-1]]),
    }


def matrix(w: Workload, result: Any) -> Any:
    """A result of any method as one dense ``(m, n)`` or ``(B, m, n)`` array for comparison.

    Of a large sparse one the entries: `row`, `column`, `value`, `shape`.
    """
    blocks = result if isinstance(result, (tuple, list)) else (result,)
    if blocks[0].layout != torch.strided and w.m * w.n > LARGE:
        return _triplets(blocks)
    shape = (w.m, -1) if w.batch is None else (w.batch, w.m, -1)
    dense = [b.detach() if b.layout == torch.strided else b.detach().to_dense() for b in blocks]
    return torch.cat([b.reshape(shape) for b in dense], -1).numpy()
