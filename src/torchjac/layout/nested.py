"""From blocks, or the values of a pattern, to a result nested as the user nests it.

What depends on shapes and pattern only is made once. Results share no memory with each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchjac._torch.pytree import TreeSpec, unflatten
from torchjac._torch.storage import copied_when_written
from torchjac.layout.sparse import csr_starts
from torchjac.sparsity.pattern import Pattern


def finisher(
    pattern: Pattern | None,
    layout: torch.layout,
    output_spec: TreeSpec,
    input_spec: TreeSpec,
) -> Callable[[Any], Any]:
    """What turns the parts of a result into the result."""
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
    row, column, kept = pattern.block(i, j)
    rows = torch.from_numpy(np.asarray(row, dtype=np.int64))
    columns = torch.from_numpy(np.asarray(column, dtype=np.int64)).clone()  # memory of torch's
    chosen = None if kept is None else torch.from_numpy(np.asarray(kept))
    size = (
        int(np.prod(pattern.row_shapes[i], dtype=np.int64)),
        int(np.prod(pattern.column_shapes[j], dtype=np.int64)),
    )
    if layout is torch.sparse_csr:
        starts = csr_starts(rows, size[0])

        def csr(values: Tensor) -> Tensor:
            mine = values if chosen is None else values[chosen]
            where = copied_when_written(starts), copied_when_written(columns)
            return torch.sparse_csr_tensor(*where, mine, size, check_invariants=False)

        return csr
    index = torch.stack([rows, columns])

    def coo(values: Tensor) -> Tensor:
        mine = values if chosen is None else values[chosen]
        where = copied_when_written(index)
        return torch.sparse_coo_tensor(where, mine, size, is_coalesced=True, check_invariants=False)

    return coo
