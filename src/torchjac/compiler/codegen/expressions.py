"""The table of scalar expressions: hash consing, constant folding, zero and sign simplification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from torchjac.compiler.codegen.scalar_ir import (
    SCALAR,
    Argument,
    ArrayRef,
    Attribute,
    Domain,
    Expression,
    IndexMap,
    Indices,
    Load,
    MatmulSizes,
    constant_of,
)
from torchjac.errors import PlanRefused

_P = TypeVar("_P")


class Expressions:
    """All expressions of a program, each once.

    Args:
        most: The number of expressions that is allowed.
    """

    def __init__(self, most: int):
        """Begins with an empty table."""
        self.all: list[Expression] = []
        self._most = most
        self._numbers: dict[object, int] = {}
        self._maps: dict[int, list[IndexMap]] = {}

    def constant(self, value: float, dtype: str) -> int:
        """The number of a constant expression."""
        text = float(value).hex()  # tells 0 from -0
        return self._add(("constant", dtype, text), "constant", dtype, (), SCALAR, float(value))

    def load(
        self, array: ArrayRef, dtype: str, domain: Domain, step: int = 1, start: int = 0
    ) -> int:
        """A load from an array.

        Args:
            array: The array.
            dtype: The dtype of its elements.
            domain: The points, one for each element.
            step: The distance between elements of consecutive points.
            start: The element of the first point.
        """
        about = Load(array, step, start)
        return self._add(("load", about, id(domain)), "load", dtype, (), domain, about)

    def constant_value(self, number: int) -> float | None:
        """The value of a constant; None for other expressions."""
        item = self.all[number]
        return constant_of(item) if item.kind == "constant" else None

    def scalar(self, kind: str, dtype: str, arguments: Sequence[int]) -> int:
        """An operation on scalar expressions."""
        kind, operands, negative = self._signed(kind, [(a, None) for a in arguments], 1)
        arguments = [a for a, _ in operands]
        if kind == "neg" and (twice := self._negated(arguments[0])) is not None:
            return twice
        if negative:
            positive = self.scalar(kind, dtype, arguments)
            return (
                positive
                if self.constant_value(positive) == 0
                else self.scalar("neg", dtype, [positive])
            )
        simple = self._simplified(kind, dtype, arguments)
        if isinstance(simple, int):
            return arguments[simple] if simple >= 0 else self.constant(0.0, dtype)
        if simple is not None:
            kind, arguments, dtype = simple
            if kind == "constant":
                return arguments[0]
        arguments = _ordered(kind, arguments)
        pairs = tuple([(a, None) for a in arguments])
        return self._add((kind, dtype, pairs), kind, dtype, pairs, SCALAR, None)

    def pointwise(
        self, kind: str, dtype: str, arguments: Sequence[tuple[int, Indices]]
    ) -> tuple[int, Indices]:
        """An operation on points of expressions: the result, and the points of the result."""
        size = len(arguments[0][1])
        kind, arguments, negative = self._signed(kind, arguments, size)
        if kind == "neg" and (twice := self._negated(arguments[0][0])) is not None:
            return twice, arguments[0][1]
        if negative:
            positive = self.pointwise(kind, dtype, arguments)
            return (
                positive
                if self.constant_value(positive[0]) == 0
                else self.pointwise("neg", dtype, [positive])
            )
        numbers = [a for a, _ in arguments]
        simple = self._simplified(kind, dtype, numbers)
        if isinstance(simple, int):
            if simple >= 0:
                return arguments[simple]
            return self.constant(0.0, dtype), np.zeros(size, dtype=np.int64)
        if simple is not None:
            kind, chosen, dtype = simple
            if kind == "constant":
                return chosen[0], np.zeros(size, dtype=np.int64)
            arguments = [arguments[numbers.index(a)] for a in chosen]
        if all(self.all[a].domain is SCALAR for a, _ in arguments):
            return self.scalar(kind, dtype, [a for a, _ in arguments]), np.zeros(size, np.int64)
        if kind in _COMMUTATIVE:
            arguments = sorted(arguments, key=lambda a: a[0])
        domain, maps = self._domain_of(arguments)
        pairs = tuple([(a, m) for (a, _), m in zip(arguments, maps, strict=True)])
        key = (kind, dtype, tuple([(a, id(m)) for a, m in pairs]))
        return self._add(key, kind, dtype, pairs, domain, None), np.arange(size)

    def segment_sum(self, argument: int, indices: Indices, starts: Indices) -> int:
        """Sums over segments: point i adds `indices[starts[i] : starts[i + 1]]`."""
        domain = Domain(len(starts) - 1)
        dtype = self.all[argument].dtype
        key = ("segments", argument, indices.tobytes(), starts.tobytes())
        return self._add(key, "segments", dtype, ((argument, IndexMap(indices)),), domain, starts)

    def matmul(
        self,
        dtype: str,
        left: tuple[int, Indices],
        right: tuple[int, Indices],
        sizes: MatmulSizes,
    ) -> int:
        """A batch of matrix products as one expression; its points are matrices x rows x columns.

        Args:
            dtype: The dtype of the result.
            left: The expression of the left factor, and the point of each of its elements.
            right: The expression of the right factor, and the point of each of its elements.
            sizes: The sizes of the products.
        """
        domain = Domain(sizes.matrices * sizes.rows * sizes.columns)
        key = ("product", *[(a, p.tobytes()) for a, p in (left, right)], sizes)
        pairs = tuple([(a, IndexMap(p)) for a, p in (left, right)])
        return self._add(key, "product", dtype, pairs, domain, sizes)

    def index_map(self, domain: Domain, indices: Indices) -> IndexMap | None:
        """The index map into a domain, one object for equal maps; None for the identity."""
        if domain is SCALAR or is_identity(indices, domain.size):
            return None
        known = self._maps.setdefault(hash(indices.tobytes()), [])
        for item in known:
            if np.array_equal(item.indices, indices):
                return item
        known.append(IndexMap(indices))
        return known[-1]

    def _domain_of(
        self, arguments: Sequence[tuple[int, Indices]]
    ) -> tuple[Domain, list[IndexMap | None]]:
        """The domain of an operation, and the index map of each argument."""
        of = [self.all[a].domain for a, _ in arguments]
        maps = [self.index_map(x, p) for x, (_, p) in zip(of, arguments, strict=True)]
        size = len(arguments[0][1])
        for domain, item in zip(of, maps, strict=True):
            if domain is not SCALAR and item is None:
                return domain, maps
        for domain, item in zip(of, maps, strict=True):
            for other, child in domain.children.get(id(item), ()):
                if other is item:
                    return child, maps
        child = Domain(size)
        for domain, item in zip(of, maps, strict=True):
            if domain is not SCALAR and item is not None:
                domain.children.setdefault(id(item), []).append((item, child))
        return child, maps

    def _signed(
        self, kind: str, arguments: Sequence[tuple[int, _P]], size: int
    ) -> tuple[str, Sequence[tuple[int, _P]], bool]:
        """The operation without sign changes of its arguments, and whether the result changes sign.

        A sum absorbs a sign, a product passes the sign on. The result is the same bit by bit, but
        for the sign of NaN, because rounding is symmetric.
        """
        if kind not in ("add", "sub", "mul", "div"):
            return kind, arguments, False
        (a, at), (b, to) = arguments
        first, second = self._negated(a), self._negated(b)
        if kind in ("mul", "div"):
            if first is not None and second is not None:
                return kind, [(first, at), (second, to)], False
            if first is not None and self.all[a].domain.size == size:
                return kind, [(first, at), (b, to)], True
            if second is not None and self.all[b].domain.size == size:
                return kind, [(a, at), (second, to)], True
        elif second is not None:
            return "sub" if kind == "add" else "add", [(a, at), (second, to)], False
        elif first is not None and kind == "add":
            return "sub", [(b, to), (first, at)], False
        return kind, arguments, False

    def _negated(self, number: int) -> int | None:
        """The argument of a negation; None for other expressions."""
        item = self.all[number]
        if item.kind != "neg" or item.arguments[0][1] is not None:
            return None
        return item.arguments[0][0]

    def _simplified(
        self, kind: str, dtype: str, arguments: Sequence[int]
    ) -> int | tuple[str, Sequence[int], str] | None:
        """The index of the argument that is the result, -1 for zero, or another operation.

        None: the operation stays. A product with a known zero is zero, as everywhere in J.
        """
        values = [self.constant_value(a) for a in arguments]
        if kind == "truth" and values[0] is not None:
            return "constant", [self.constant(float(values[0] != 0), dtype)], dtype
        if kind == "cast":
            return 0 if self.all[arguments[0]].dtype == dtype else self._cast(values[0], dtype)
        if kind in ("add", "sub", "mul", "div"):
            return self._arithmetic(kind, dtype, arguments, values)
        if kind == "neg" and values[0] is not None:
            return "constant", [self.constant(-values[0], dtype)], dtype
        if kind == "where" and values[0] is not None:
            return 1 if values[0] else 2
        if (
            kind == "where"
            and arguments[1] == arguments[2]
            and self.all[arguments[1]].domain is SCALAR
        ):
            return 1
        return None

    def _cast(self, value: float | None, dtype: str) -> tuple[str, Sequence[int], str] | None:
        if value is None:
            return None
        if dtype == "float32":
            value = float(np.float32(value))
        return "constant", [self.constant(value, dtype)], dtype

    def _arithmetic(
        self, kind: str, dtype: str, arguments: Sequence[int], values: Sequence[float | None]
    ) -> int | tuple[str, Sequence[int], str] | None:
        first, second = values
        if first is not None and second is not None:
            return self._folded(kind, dtype, first, second)
        if kind == "add":
            return 1 if first == 0 else 0 if second == 0 else None
        if kind == "sub":
            if first == 0:
                return "neg", [arguments[1]], dtype
            return 0 if second == 0 else None
        if kind == "mul" and (first == 0 or second == 0):
            return -1
        if kind == "div" and first == 0:
            return -1
        if second == 1:
            return 0
        if second == -1:
            return "neg", [arguments[0]], dtype
        if kind == "mul" and first == 1:
            return 1
        if kind == "mul" and first == -1:
            return "neg", [arguments[1]], dtype
        return None

    def _folded(
        self, kind: str, dtype: str, first: float, second: float
    ) -> tuple[str, Sequence[int], str] | None:
        if kind == "div" and second == 0:
            return None
        folded = {
            "add": lambda: first + second,
            "sub": lambda: first - second,
            "mul": lambda: first * second,
            "div": lambda: first / second,
        }[kind]()
        if dtype == "float32":
            folded = float(np.float32(folded))
        return "constant", [self.constant(folded, dtype)], dtype

    def _add(
        self,
        key: object,
        kind: str,
        dtype: str,
        arguments: tuple[Argument, ...],
        domain: Domain,
        about: Attribute,
    ) -> int:
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self.all)
            if number >= self._most:
                raise PlanRefused(f"more than {self._most} scalar operations")
            self.all.append(Expression(kind, dtype, arguments, domain, about))
        return number


_COMMUTATIVE = frozenset(("add", "mul"))


def _ordered(kind: str, arguments: Sequence[int]) -> Sequence[int]:
    return sorted(arguments) if kind in _COMMUTATIVE else arguments


def is_identity(indices: Indices, size: int) -> bool:
    """Whether an index map is the identity."""
    if len(indices) != size or indices[0] != 0 or indices[-1] != size - 1:
        return False
    return bool((indices[1:] - indices[:-1] == 1).all())
