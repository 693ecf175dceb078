"""The algebra of local Jacobians: structured linear maps, closed under product and sum.

Every local Jacobian of a tensor operation is a sum of products of a few kinds of factor. No map
is ever materialized as a matrix here: a class holds only the parameters of its kind.

=============== ============================================ =============================
map             entries                                      operations
=============== ============================================ =============================
`Zero`          none                                         detach, an unused operand
`Scaled`        a multiple of the identity                   neg, mul by a number
`Diagonal`      one factor per element                       mul, where, tanh's backward
`IndexMap`      at most a single one in each row             view, roll, pad, gather
`Scatter`       a single one in each column                  index_add, scatter_add
`AxisSum`       ones along axes                              sum, the backward of expand
`Dense`         all pairs along axes, lanes elsewhere        solve, fft, an opaque operation
`Sum`           the sum of the entries of its parts          add, a stencil
`Product`       a product; the rightmost factor acts first   mm, convolution, mean
=============== ============================================ =============================

All further structures are compositions. A stencil is a `Sum` of `Diagonal` x `IndexMap`. A batched
or Kronecker map is a product with lanes on the remaining axes. A low-rank map is a product with a
small inner dimension (`rank_bound`). A sparse matrix is scatter x diagonal x gather
(`sparse_matrix`).

`kinds` defines the classes, `build` constructs them, `algebra` combines them, and `factors` is the
arithmetic of their entries.
"""

from torchjac.linear.maps.algebra import add, product, rank_bound, sparse_matrix, transpose
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
from torchjac.linear.maps.factors import (
    UNKNOWN,
    ComputedFactors,
    Factors,
    Shape,
    map_unexpanded,
    plus,
    times,
)
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
    "ComputedFactors",
    "Dense",
    "Diagonal",
    "Factors",
    "IndexMap",
    "LinearMap",
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
    "gather",
    "identity",
    "index_map",
    "map_unexpanded",
    "plus",
    "product",
    "rank_bound",
    "reshape",
    "scatter",
    "sparse_matrix",
    "times",
    "transpose",
]
