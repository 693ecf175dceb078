"""The request: the options of a call, and the specification of its output.

`Output` crosses all stages. Each stage depends on its class in one module: `passes.verify`,
`accumulate.output`, `layout.assemble`, `compiler.store`, `export`.
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
# Layouts of torch for results.
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
        """No description in the record."""
        return None

    def size(self, rows: int, columns: int) -> int:
        """The number of entries of a Jacobian of this shape."""
        return rows * columns


@dataclass(frozen=True, slots=True)
class Sparse:
    """The structural nonzeros of J: a matrix `(out.numel(), in.numel())` for each pair of leaves.

    With a batch each matrix is block diagonal: `(B out, B in)`.

    Attributes:
        layout: `torch.sparse_csr` or `torch.sparse_coo`.
        container: The SciPy class of each matrix; None for tensors.
        user_pattern: The structural nonzeros from the user; None to detect them.
        pattern: The structural nonzeros; None if they are unknown: then the result has the entries
            that are nonzero at the primal.
    """

    layout: torch.layout
    container: type | None = None
    user_pattern: Any = field(default=None, repr=False)
    pattern: Pattern | None = None

    @property
    def description(self) -> str | None:
        """The pattern in words, for the record; None without a pattern."""
        if self.pattern is None:
            return None
        origin = self.pattern.scope if self.user_pattern is None else "given"
        return f"{self.pattern.nnz} nonzeros, {origin}"

    def size(self, rows: int, columns: int) -> int:
        """The number of stored entries of a Jacobian of this shape."""
        return rows * columns if self.pattern is None else self.pattern.nnz

    def of_pattern(self, pattern: Pattern | None) -> Sparse:
        """The same output with another pattern; None removes the pattern."""
        return replace(self, pattern=pattern)

    def in_container(self, blocks: Iterable[Any]) -> list[Any]:
        """The blocks as matrices of the SciPy class, or unchanged without a class."""
        container = self.container
        return list(blocks) if container is None else [_to_scipy(b, container) for b in blocks]


Output = Dense | Sparse


def output_of(layout: Layout, pattern: Any = None) -> Output:
    """The output for the options `layout` and `pattern`.

    Raises:
        ArgumentError: The layout is unknown, or it is dense and there is a pattern.
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


def _to_scipy(block: Any, container: Any) -> Any:
    parts = (block.values(), block.col_indices(), block.crow_indices())
    arrays = tuple(p.cpu().numpy() for p in parts)
    return container(scipy.sparse.csr_array(arrays, shape=tuple(block.shape)))


@dataclass(frozen=True, slots=True)
class Request:
    """The options of `torchjac.jacobian`.

    Attributes:
        entry: The public call, for records and messages.
        output: The entries of the Jacobian to compute, and their layout.
        has_aux: Whether the function returns `(output, aux)`.
        batched: Whether leading axes are a batch of independent samples.
        strict: Whether an input that no output depends on is an error.
        create_graph: Whether the result can be differentiated.
        memory_budget: Largest number of bytes of intermediate values; None for the default.
        compile: Whether the first call compiles native code.
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
    """Refuses a sparse output that has to be differentiable.

    Raises:
        ArgumentError: The output is sparse, and `create_graph` is set.
    """
    if create_graph and not isinstance(output, Dense):
        raise ArgumentError(
            "torchjac: with create_graph=True or inside another Jacobian the result is dense only; "
            "use layout=torch.strided, and convert the result (.to_sparse()) where it is needed."
        )
