"""The algebra of local Jacobians: structured linear maps, closed under product and sum.

Every local Jacobian of a tensor operation is a sum of products of a few kinds of factor. None of
them is ever written out as a matrix here; what a class holds is what tells it from the others.

=============== ============================================ =============================
map             entries                                      made by
=============== ============================================ =============================
`Zero`          none                                         detach, an unused operand
`Scaled`        a multiple of the identity                   neg, mul by a number
`Diagonal`      one factor an element                        mul, where, tanh's backward
`IndexMap`      a one in each row, or none                   view, roll, pad, gather
`Scatter`       a one in each column: its transpose          index_add, scatter_add
`AxisSum`       ones along axes                              sum, the backward of expand
`Dense`         all pairs along axes, lanes elsewhere        solve, fft, an opaque operation
`Sum`           entries of its parts, added                  add, a stencil
`Product`       left to right, the rightmost acts first      mm, convolution, mean
=============== ============================================ =============================

The rest of the usual zoo are compositions: a stencil is a `Sum` of `Diagonal` x `IndexMap`; a
batched or Kronecker map is a product whose other axes are lanes; a low-rank map is a product
with a small middle (`rank_bound`); a matrix of fixed sparsity is `fixed` (scatter x diagonal x
gather).

`kinds` holds the classes, `build` makes them, `algebra` combines them, `factors` is what is known
of their entries.
"""

from torchjac.linear.maps.algebra import add, fixed, product, rank_bound, transpose
from torchjac.linear.maps.build import (
    axis_sum,
    broadcast,
    dense,
    diagonal,
    gather,
    identity,
    index_map,
    reshape,
    scatter,
)
from torchjac.linear.maps.factors import UNKNOWN, Factors, Numbers, Shape, on_support, plus, times
from torchjac.linear.maps.kinds import (
    AxisSum,
    Dense,
    Diagonal,
    IndexMap,
    LinearMap,
    Product,
    Scaled,
    Scatter,
    Sum,
    Zero,
)

__all__ = [
    "UNKNOWN",
    "AxisSum",
    "Dense",
    "Diagonal",
    "Factors",
    "IndexMap",
    "LinearMap",
    "Numbers",
    "Product",
    "Scaled",
    "Scatter",
    "Shape",
    "Sum",
    "Zero",
    "add",
    "axis_sum",
    "broadcast",
    "dense",
    "diagonal",
    "fixed",
    "gather",
    "identity",
    "index_map",
    "on_support",
    "plus",
    "product",
    "rank_bound",
    "reshape",
    "scatter",
    "times",
    "transpose",
]
