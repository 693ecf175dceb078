"""The request: what a call asks for, and the output that it asks for of the Jacobian.

`Output` is the specification that crosses the stages. Each stage has one place that goes by its
kind: `passes.verify`, `accumulate.output`, `layout.assemble`, `compiler.store`, `export`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import scipy.sparse
import torch

from torchjac.errors import ArgumentError
from torchjac.sparsity.pattern import Pattern

# Order of elimination: rows of J from the outputs, or columns of J from the inputs.
Mode = Literal["reverse", "forward"]
# A torch layout, or a SciPy class of sparse matrices.
Layout = Any
# Layouts of torch that a result may have.
_LAYOUTS = frozenset({torch.strided, torch.sparse_csr, torch.sparse_coo})


@dataclass(frozen=True, slots=True)
class Dense:
    """Every entry of J: a tensor `([B,] *out, *in)` for each output and input leaf."""

    @property
    def layout(self) -> torch.layout:
        """The layout of each block."""
        return torch.strided

    @property
    def pattern(self) -> None:
        """No pattern: every entry is computed."""
        return None

    @property
    def description(self) -> None:
        """No words for the record."""
        return None

    def size(self, rows: int, columns: int) -> int:
        """The number of entries of a Jacobian of these rows and columns."""
        return rows * columns


@dataclass(frozen=True, slots=True)
class Sparse:
    """The structural nonzeros of J: a matrix `(out.numel(), in.numel())` for each pair of leaves.

    With a batch each matrix is block diagonal: `(B out, B in)`.

    Attributes:
        layout: `torch.sparse_csr` or `torch.sparse_coo`.
        container: The SciPy class of each matrix; None for tensors.
        user_pattern: The structural nonzeros as the user wrote them; None to find them.
        pattern: The structural nonzeros; None while they are not known. Then the entries that are
            nonzero at the primal are the result.
    """

    layout: torch.layout
    container: type | None = None
    user_pattern: Any = field(default=None, repr=False)
    pattern: Pattern | None = None

    @property
    def description(self) -> str | None:
        """The pattern in words, for the record."""
        if self.pattern is None:
            return None
        origin = self.pattern.scope if self.user_pattern is None else "given"
        return f"{self.pattern.nnz} nonzeros, {origin}"

    def size(self, rows: int, columns: int) -> int:
        """The number of entries of a Jacobian of these rows and columns."""
        return rows * columns if self.pattern is None else self.pattern.nnz

    def of_pattern(self, pattern: Pattern | None) -> Sparse:
        """The same output with its structural nonzeros filled in, or taken out."""
        return replace(self, pattern=pattern)

    def in_container(self, blocks: Iterable[Any]) -> list[Any]:
        """The blocks, as matrices of the SciPy class if there is one."""
        container = self.container
        return list(blocks) if container is None else [_in_scipy(b, container) for b in blocks]


Output = Dense | Sparse


def output_of(layout: Layout, pattern: Any = None) -> Output:
    """The output for the options `layout` and `pattern`.

    Raises:
        ArgumentError: There is no such layout, or the pattern is for a dense one.
    """
    if layout is torch.strided:
        if pattern is not None:
            raise ArgumentError(
                "torchjac: pattern= is for sparse results; pass layout=torch.sparse_csr (or "
                "another sparse layout) with it."
            )
        return Dense()
    if isinstance(layout, torch.layout) and layout in _LAYOUTS:
        return Sparse(layout, None, pattern)
    if isinstance(layout, type) and issubclass(
        layout, (scipy.sparse.sparray, scipy.sparse.spmatrix)
    ):
        return Sparse(torch.sparse_csr, layout, pattern)
    raise ArgumentError(
        f"torchjac: layout must be torch.strided, torch.sparse_csr, torch.sparse_coo or a "
        f"SciPy class such as scipy.sparse.csr_array, got {layout!r}."
    )


def options_of(output: Output) -> dict[str, Any]:
    """The options `layout` and `pattern` of an output: the inverse of `output_of`."""
    if isinstance(output, Dense):
        return {"layout": torch.strided, "pattern": None}
    return {"layout": output.container or output.layout, "pattern": output.user_pattern}


def _in_scipy(block: Any, container: Any) -> Any:
    parts = (block.values(), block.col_indices(), block.crow_indices())
    arrays = tuple(p.cpu().numpy() for p in parts)
    return container(scipy.sparse.csr_array(arrays, shape=tuple(block.shape)))


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asks for: the options of `torchjac.jacobian`.

    Attributes:
        entry: The public call, for records and messages.
        output: What of the Jacobian is computed, and in which form.
        has_aux: Whether the function returns `(output, aux)`.
        batched: Whether leading axes are a batch of independent samples.
        strict: Whether an input that no output depends on is an error.
        create_graph: Whether the result keeps its graph.
        memory_budget: Bytes that intermediate values may take; None for the default.
        compile: Whether native code is made at the first call.
    """

    entry: str = "jacobian"
    output: Output = Dense()
    has_aux: bool = False
    batched: bool = False
    strict: bool = False
    create_graph: bool = False
    memory_budget: int | None = None
    compile: bool = False


def check_graph(output: Output, create_graph: bool) -> None:
    """Refuses an output whose graph cannot be kept.

    Raises:
        ArgumentError: A sparse result would have to be differentiable.
    """
    if create_graph and not isinstance(output, Dense):
        raise ArgumentError(
            "torchjac: with create_graph=True or inside another Jacobian the result is dense only; "
            "use layout=torch.strided, and convert the result (.to_sparse()) where it is needed."
        )
