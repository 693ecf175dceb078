"""Scalar expressions over domains: elements that are computed alike share one expression.

An *expression* is an operation on other expressions, a constant, or an element of an array. The
*domain* of an expression is the set of its points: each point is one element of some tensor. An
*index map* gives, for each point of an expression, the point of its argument. No tensor axis
matters here: elements that the same operations compute share an expression, wherever they lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchjac.compiler.codegen.scalar_ops import COSTS

Indices = NDArray[np.int64]


class Deployment(Enum):
    """The place where a program runs.

    Attributes:
        PROCESS: This process: each call reads the parameters anew, and threads may share loops.
        STANDALONE: A program without torch: parameters are constants, and one thread runs it.
    """

    PROCESS = "process"
    STANDALONE = "standalone"


class Granularity(Enum):
    """The elements that share an expression.

    Attributes:
        ELEMENTS: Each element is an expression of its own.
        SAMPLES: An element is shared by all samples; one sample is unrolled.
        DOMAINS: All elements that are computed alike share an expression.
        MATRICES: As DOMAINS, and matrix products stay whole.
    """

    ELEMENTS = "elements"
    SAMPLES = "samples"
    DOMAINS = "domains"
    MATRICES = "matrices"

    @property
    def unrolls(self) -> bool:
        """Whether reductions of any length become scalar statements."""
        return self in (Granularity.ELEMENTS, Granularity.SAMPLES)


class Domain:
    """The points of expressions; expressions of one domain object go together point by point."""

    __slots__ = ("children", "size")

    def __init__(self, size: int):
        """Begins without derived domains."""
        self.size = size
        self.children: dict[int, list[tuple[IndexMap, Domain]]] = {}


@dataclass(frozen=True, slots=True, eq=False)
class IndexMap:
    """For each point of an expression the point of its argument; compared by identity.

    Attributes:
        indices: The points of the argument.
    """

    indices: Indices


# The role of an array: input, live parameter, constant table, output, buffer between loops,
# constant part of an output, table of indices.
ArrayKind = Literal["in", "live", "table", "out", "buffer", "fixed", "p"]


@dataclass(frozen=True, slots=True)
class ArrayRef:
    """An array that a program reads or writes; its text is its name.

    Attributes:
        kind: The role of the array.
        number: The position among arrays of this role.
    """

    kind: ArrayKind
    number: int

    def __str__(self) -> str:
        """The name of the array."""
        return f"{self.kind}{self.number}"


# Kinds of expressions that are not scalar operations.
STRUCTURAL = frozenset(("constant", "load", "segments", "product"))


class Load(NamedTuple):
    """The elements of an array that an expression reads.

    Attributes:
        array: The array.
        step: The distance between elements of consecutive points.
        start: The element of the first point.
    """

    array: ArrayRef
    step: int
    start: int


class MatmulSizes(NamedTuple):
    """The sizes of a batch of matrix products.

    Attributes:
        matrices: The number of products.
        rows: The rows of each left factor.
        inner: The length of the contracted axis.
        columns: The columns of each right factor.
    """

    matrices: int
    rows: int
    inner: int
    columns: int


# The attribute of an expression: the value of a constant, the elements of a load, the sizes of a
# matrix product, or the starts of segments.
Attribute = float | Load | MatmulSizes | Indices | None
# An argument: an expression and an index map; None is the identity.
Argument = tuple[int, IndexMap | None]


@dataclass(frozen=True, slots=True, eq=False)
class Expression:
    """One operation.

    Attributes:
        kind: A scalar operation, or `constant`, `load`, `segments`, `product`.
        dtype: The dtype of the result.
        arguments: The arguments.
        domain: The points.
        attribute: Data of a constant, load, segment sum or matrix product.
        cost: The cost of one point, in scalar products.
    """

    kind: str
    dtype: str
    arguments: tuple[Argument, ...]
    domain: Domain
    attribute: Attribute = None

    @property
    def cost(self) -> int:
        """The cost of one point, in scalar products."""
        return 0 if self.kind in ("constant", "load") else COSTS.get(self.kind, 1)


SCALAR = Domain(1)


def segments_of(expression: Expression) -> tuple[int, Indices, Indices]:
    """The argument of a segment sum, the points that are added, and the start of each segment."""
    ((argument, by),), starts = expression.arguments, expression.attribute
    assert by is not None
    assert isinstance(starts, np.ndarray)
    return argument, by.indices, starts


def constant_of(expression: Expression) -> float:
    """The value of a constant."""
    assert isinstance(expression.attribute, float)
    return expression.attribute


def load_of(expression: Expression) -> Load:
    """The elements that a load reads."""
    assert isinstance(expression.attribute, Load)
    return expression.attribute


def matmul_sizes_of(expression: Expression) -> MatmulSizes:
    """The sizes of a matrix product."""
    assert isinstance(expression.attribute, MatmulSizes)
    return expression.attribute
