"""The request: which Jacobian a call asks for."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal

import scipy.sparse
import torch

from torchjac.errors import ArgumentError
from torchjac.host.memory import check_budget
from torchjac.sparsity.pattern import Pattern


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asks for: the options of `torchjac.jacobian`.

    Attributes:
        entry: The public call, for records and messages.
        has_aux: Whether the function returns `(output, aux)`.
        batched: Whether leading axes are a batch of independent samples.
        strict: Whether an input that no output depends on is an error.
        create_graph: Whether the result is to keep its graph.
        layout: Layout of the result: of torch, or a SciPy class.
        pattern: Structural nonzeros as the user gives them, or None.
        memory_budget: Bytes that intermediate values may take, or None for the default.
        compile: Whether native code is to be made at the first call.
    """

    entry: str = "jacobian"
    has_aux: bool = False
    batched: bool = False
    strict: bool = False
    create_graph: bool = False
    layout: Layout = torch.strided
    pattern: Any = None
    memory_budget: int | None = None
    compile: bool = False

    def check(self) -> Request:
        """The request itself, where it can be answered.

        Raises:
            ArgumentError: Layout, pattern and graph do not go together, or the budget is none.
        """
        check_layout(self.layout, self.create_graph, self.pattern)
        check_budget(self.memory_budget)
        return self

    def to_compiler(self) -> CompileRequest:
        """What the compiler is asked for."""
        return CompileRequest(
            torch_layout(self.layout),
            self.memory_budget,
            compiled=self.compile,
            differentiable=self.create_graph,
        )


@dataclass(frozen=True, slots=True)
class CompileRequest:
    """What a plan is made for.

    Attributes:
        layout: Layout of the result.
        budget: Bytes that intermediate values may take, or None for the default.
        predicted: Seconds that passes would take.
        compiled: Whether the operations are to be compiled.
        differentiable: Whether the result is to keep its graph.
        saved: Plans that were loaded.
        orders: Orders of elimination to try.
        whole: Whether operations are to be on whole tensors, not on a few samples of a batch.
    """

    layout: torch.layout = torch.strided
    budget: int | None = None
    predicted: float = 0.0
    compiled: bool = False
    differentiable: bool = False
    saved: tuple[Any, ...] = ()
    orders: tuple[Mode, ...] = ("reverse", "forward")
    whole: bool = False


Mode = Literal["reverse", "forward"]


# A torch layout, or a SciPy class of sparse matrices.
Layout = Any


# Layouts of torch that a result may have.
_LAYOUTS = frozenset({torch.strided, torch.sparse_csr, torch.sparse_coo})


def check_layout(layout: Layout, create_graph: bool, pattern: Any = None) -> None:
    """Refuses a layout that is not written.

    Raises:
        ArgumentError: It is not strided, CSR, COO or a class of SciPy, a sparse result must be
            differentiable, or there is a pattern for a dense one.
    """
    known = isinstance(layout, torch.layout) and layout in _LAYOUTS
    if not known and not _is_scipy(layout):
        raise ArgumentError(
            f"torchjac: layout must be torch.strided, torch.sparse_csr, torch.sparse_coo or a "
            f"SciPy class such as scipy.sparse.csr_array, got {layout!r}."
        )
    if pattern is not None and layout is torch.strided:
        raise ArgumentError(
            "torchjac: pattern= is for sparse results; pass layout=torch.sparse_csr (or another "
            "sparse layout) with it."
        )
    if create_graph and layout is not torch.strided:
        raise ArgumentError(
            "torchjac: with create_graph=True or inside another Jacobian the result is dense only; "
            "use layout=torch.strided, and convert the result (.to_sparse()) where it is needed."
        )


def _is_scipy(layout: Layout) -> bool:
    return isinstance(layout, type) and issubclass(
        layout, (scipy.sparse.sparray, scipy.sparse.spmatrix)
    )


def torch_layout(layout: Layout) -> torch.layout:
    """The layout in which a result is computed before it becomes what was asked for."""
    return torch.sparse_csr if _is_scipy(layout) else layout


@dataclass(frozen=True, slots=True)
class PassRequest:
    """What is asked for beside the program itself.

    Attributes:
        entry: The public call, for the record.
        layout: Layout of the result.
        pattern: Structural nonzeros, if they are known.
        pattern_given: Whether the user says so.
        independent: Whether the samples of the batch are proved to be independent.
        memory_budget: Bytes that a chunk may hold, or None for the default.
        key: Tells the functions of different callers apart, or None.
    """

    entry: str
    layout: torch.layout
    memory_budget: int | None
    key: Hashable | None
    pattern: Pattern | None = None
    pattern_given: bool = False
    independent: bool = False
