"""Known factors after arithmetic in half precision."""

from __future__ import annotations

import numpy as np
import torch
from scipy import sparse

from torchjac.linear.maps import UNKNOWN
from torchjac.linear.maps.factors import Known, map_unexpanded
from torchjac.sparsity.dependence import Dependence, Term


def round_to_half(value: Dependence) -> Dependence:
    """The dependence, computed in half precision: only factors of 1 and -1 remain known.

    In float16, 2049 rounds to 2048, so 2049 - 2048 - 1 may be nonzero.
    """
    return Dependence(
        value.shape,
        value.m,
        tuple(Term(t.positions, _factors(t.factors), _table(t.table)) for t in value.terms),
    )


def _factors(factors: Known) -> Known:
    if isinstance(factors, float):
        return factors if abs(factors) == 1 else UNKNOWN
    return map_unexpanded(lambda t: torch.where((t.abs() == 1) | (t == 0), t, UNKNOWN), factors)


def _table(table: sparse.csr_array | None) -> sparse.csr_array | None:
    if table is None:
        return None
    known = np.abs(table.data) == 1
    if (known | np.isnan(table.data)).all():
        return table
    data = np.where(known, table.data, UNKNOWN)
    return sparse.csr_array((data, table.indices, table.indptr), shape=table.shape)
