"""Scalar expressions over lanes: what is computed alike for many elements is one expression.

An *expression* is an operation on other expressions, a number, or an element of an array. It has
*lanes*: how often it is computed, each time from other elements. Which lane of an argument belongs
to which lane of the expression is a *map*. No axis is looked at: elements of tensors that are made
by the same operations are lanes of one expression, wherever they lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchjac.compiler.codegen.scalar_ops import COSTLY

Places = NDArray[np.int64]


class Deployment(Enum):
    """Where a program runs.

    Attributes:
        PROCESS: In this process: each call reads the parameters anew, and threads may share loops.
        STANDALONE: Outside of torch: parameters are constants, and one thread runs it.
    """

    PROCESS = "process"
    STANDALONE = "standalone"


class Granularity(Enum):
    """Which elements share an expression.

    Attributes:
        ELEMENTS: None: each element is an expression of its own.
        SAMPLES: The same element of all samples; one sample is written out.
        LANES: All elements that are computed alike.
        MATRICES: The same, and matrix products stay whole.
    """

    ELEMENTS = "elements"
    SAMPLES = "samples"
    LANES = "lanes"
    MATRICES = "matrices"

    @property
    def unrolls(self) -> bool:
        """Whether reductions are scalar statements, whatever their length."""
        return self in (Granularity.ELEMENTS, Granularity.SAMPLES)


class Lanes:
    """How often expressions are computed; two of the same object go together lane by lane."""

    __slots__ = ("children", "size")

    def __init__(self, size: int):
        """Lanes without others that are taken from them."""
        self.size = size
        self.children: dict[int, list[tuple[Map, Lanes]]] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Map:
    """For every lane of an expression the lane of its argument; compared as an object.

    Attributes:
        places: The lanes.
    """

    places: Places


# What an array is for: inputs, parameters that may change, constants, results, values on the way,
# results where they do not vary, places of elements.
ArrayKind = Literal["in", "live", "table", "out", "kept", "fixed", "p"]


@dataclass(frozen=True, slots=True)
class ArrayRef:
    """An array that a program reads or writes; its text is its name.

    Attributes:
        kind: What it is for.
        number: Which one of these.
    """

    kind: ArrayKind
    number: int

    def __str__(self) -> str:
        """The name."""
        return f"{self.kind}{self.number}"


# Kinds of expressions that are no scalar operation.
STRUCTURAL = frozenset(("constant", "load", "segments", "product"))


class Load(NamedTuple):
    """Which elements of an array the lanes of an expression are.

    Attributes:
        array: The array.
        step: From lane to lane.
        start: Where the first one is.
    """

    array: ArrayRef
    step: int
    start: int


class Sizes(NamedTuple):
    """Sizes of products of matrices.

    Attributes:
        matrices: How many products.
        rows: Of each left operand.
        inner: Numbers that are multiplied and added for each element.
        columns: Of each right operand.
    """

    matrices: int
    rows: int
    inner: int
    columns: int


# What is known of an expression beside its arguments: of a constant its value, of sums of segments
# where they begin.
About = float | Load | Sizes | Places | None
# An argument: an expression, and the map; None where lanes go together.
Argument = tuple[int, Map | None]


@dataclass(frozen=True, slots=True, eq=False)
class Expression:
    """One operation.

    Attributes:
        kind: A pointwise operation, or `constant`, `load`, `segments`, `product`.
        dtype: Of its result.
        arguments: What it takes.
        lanes: How often.
        about: What else is known of it; `constant_of`, `loaded`, `summed` and `multiplied` read it.
        cost: Of this one operation, in products.
    """

    kind: str
    dtype: str
    arguments: tuple[Argument, ...]
    lanes: Lanes
    about: About = None

    @property
    def cost(self) -> int:
        """What the operation costs, in products."""
        return 0 if self.kind in ("constant", "load") else COSTLY.get(self.kind, 1)


ONE = Lanes(1)
HERE = np.zeros(1, dtype=np.int64)


def summed(expression: Expression) -> tuple[int, Places, Places]:
    """What a sum of segments adds up, which lanes of it, and where each segment begins."""
    ((argument, by),), starts = expression.arguments, expression.about
    assert by is not None
    assert isinstance(starts, np.ndarray)
    return argument, by.places, starts


def constant_of(expression: Expression) -> float:
    """The value of a constant."""
    assert isinstance(expression.about, float)
    return expression.about


def loaded(expression: Expression) -> Load:
    """What a load reads."""
    assert isinstance(expression.about, Load)
    return expression.about


def multiplied(expression: Expression) -> Sizes:
    """The sizes of a product."""
    assert isinstance(expression.about, Sizes)
    return expression.about
