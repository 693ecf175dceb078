"""Nests the blocks, or pattern values, of compiled code by the user's specs.

Indices and specs are prepared once. Results share no memory with each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchjac._torch.pytree import TreeSpec, unflatten
from torchjac._torch.storage import lazy_copy
from torchjac.layout.sparse import csr_starts
from torchjac.sparsity.pattern import Pattern


def finisher(
    pattern: Pattern | None,
    layout: torch.layout,
    output_spec: TreeSpec,
    input_spec: TreeSpec,
) -> Callable[[Any], Any]:
    """A function from the parts that compiled code computes to the nested Jacobian.

    Args:
        pattern: Pattern of the Jacobian, whose values are the only part; None if the parts are
            dense blocks, row by row.
        layout: Layout of each block.
        output_spec: Spec of the outputs.
        input_spec: Spec of the differentiated inputs.
    """
    outputs, inputs = output_spec.num_leaves, input_spec.num_leaves
    simple = outputs == inputs == 1 and output_spec.is_leaf() and input_spec.is_leaf()
    if pattern is None:
        if simple:
            return lambda parts: parts[0]

        def nested(parts: Any) -> Any:
            rows = [
                unflatten(list(parts[i * inputs : (i + 1) * inputs]), input_spec)
                for i in range(outputs)
            ]
            return unflatten(rows, output_spec)

        return nested
    blocks = [[_sparse_block(pattern, i, j, layout) for j in range(inputs)] for i in range(outputs)]
    if simple:
        only = blocks[0][0]
        return lambda parts: only(parts[0])
    return lambda parts: unflatten(
        [unflatten([make(parts[0]) for make in line], input_spec) for line in blocks], output_spec
    )


def _sparse_block(
    pattern: Pattern, i: int, j: int, layout: torch.layout
) -> Callable[[Tensor], Tensor]:
    """A function from the values of a pattern to the sparse block of output i and input j."""
    row, column, numbers = pattern.block(i, j)
    rows = torch.from_numpy(np.asarray(row, dtype=np.int64))
    columns = torch.from_numpy(np.asarray(column, dtype=np.int64)).clone()  # memory that torch owns
    selection = None if numbers is None else torch.from_numpy(np.asarray(numbers))
    size = (
        int(np.prod(pattern.row_shapes[i], dtype=np.int64)),
        int(np.prod(pattern.column_shapes[j], dtype=np.int64)),
    )
    if layout is torch.sparse_csr:
        starts = csr_starts(rows, size[0])

        def csr(values: Tensor) -> Tensor:
            own = values if selection is None else values[selection]
            index = lazy_copy(starts), lazy_copy(columns)
            return torch.sparse_csr_tensor(*index, own, size, check_invariants=False)

        return csr
    index = torch.stack([rows, columns])

    def coo(values: Tensor) -> Tensor:
        own = values if selection is None else values[selection]
        return torch.sparse_coo_tensor(
            lazy_copy(index), own, size, is_coalesced=True, check_invariants=False
        )

    return coo
