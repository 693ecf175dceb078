"""Making scalar expressions: none is there twice, numbers are folded, zeros and signs taken in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from torchjac.compiler.codegen.scalar_ir import (
    ONE,
    About,
    Argument,
    ArrayRef,
    Expression,
    Lanes,
    Load,
    Map,
    Places,
    Sizes,
    constant_of,
)
from torchjac.errors import PlanRefused

_P = TypeVar("_P")


class Expressions:
    """All expressions of a program; none is there twice.

    Args:
        most: How many there may be.
    """

    def __init__(self, most: int):
        """Begins with none."""
        self.all: list[Expression] = []
        self._most = most
        self._found: dict[object, int] = {}
        self._maps: dict[int, list[Map]] = {}

    def constant(self, value: float, dtype: str) -> int:
        """A number."""
        text = float(value).hex()  # tells 0 from -0
        return self._add(("constant", dtype, text), "constant", dtype, (), ONE, float(value))

    def load(self, array: ArrayRef, dtype: str, lanes: Lanes, step: int = 1, start: int = 0) -> int:
        """Elements of an array: one for each lane, so far apart, from the one at `start` on."""
        about = Load(array, step, start)
        return self._add(("load", about, id(lanes)), "load", dtype, (), lanes, about)

    def value(self, number: int) -> float | None:
        """The value of a constant; None of others."""
        found = self.all[number]
        return constant_of(found) if found.kind == "constant" else None

    def single(self, kind: str, dtype: str, arguments: Sequence[int]) -> int:
        """An operation on expressions of one lane."""
        kind, given, negative = self._signed(kind, [(a, None) for a in arguments], 1)
        arguments = [a for a, _ in given]
        if kind == "neg" and (twice := self._negated(arguments[0])) is not None:
            return twice
        if negative:
            made = self.single(kind, dtype, arguments)
            return made if self.value(made) == 0 else self.single("neg", dtype, [made])
        simple = self._simplified(kind, dtype, arguments)
        if isinstance(simple, int):
            return arguments[simple] if simple >= 0 else self.constant(0.0, dtype)
        if simple is not None:
            kind, arguments, dtype = simple
            if kind == "constant":
                return arguments[0]
        arguments = _ordered(kind, arguments)
        taken = tuple([(a, None) for a in arguments])
        return self._add((kind, dtype, taken), kind, dtype, taken, ONE, None)

    def many(
        self, kind: str, dtype: str, arguments: Sequence[tuple[int, Places]]
    ) -> tuple[int, Places]:
        """An operation on lanes of expressions: the result, and which lanes of it."""
        size = len(arguments[0][1])
        kind, arguments, negative = self._signed(kind, arguments, size)
        if kind == "neg" and (twice := self._negated(arguments[0][0])) is not None:
            return twice, arguments[0][1]
        if negative:
            made = self.many(kind, dtype, arguments)
            return made if self.value(made[0]) == 0 else self.many("neg", dtype, [made])
        numbers = [a for a, _ in arguments]
        simple = self._simplified(kind, dtype, numbers)
        if isinstance(simple, int):
            if simple >= 0:
                return arguments[simple]
            return self.constant(0.0, dtype), np.zeros(size, dtype=np.int64)
        if simple is not None:
            kind, kept, dtype = simple
            if kind == "constant":
                return kept[0], np.zeros(size, dtype=np.int64)
            arguments = [arguments[numbers.index(a)] for a in kept]
        if all(self.all[a].lanes is ONE for a, _ in arguments):
            return self.single(kind, dtype, [a for a, _ in arguments]), np.zeros(size, np.int64)
        if kind in _COMMUTATIVE:
            arguments = sorted(arguments, key=lambda a: a[0])
        lanes, maps = self._lanes(arguments)
        taken = tuple([(a, m) for (a, _), m in zip(arguments, maps, strict=True)])
        key = (kind, dtype, tuple([(a, id(m)) for a, m in taken]))
        return self._add(key, kind, dtype, taken, lanes, None), np.arange(size)

    def segments(self, argument: int, places: Places, starts: Places) -> int:
        """Sums over lanes of an expression: lane i over `places[starts[i] : starts[i + 1]]`."""
        lanes = Lanes(len(starts) - 1)
        dtype = self.all[argument].dtype
        key = ("segments", argument, places.tobytes(), starts.tobytes())
        return self._add(key, "segments", dtype, ((argument, Map(places)),), lanes, starts)

    def product(
        self,
        dtype: str,
        left: tuple[int, Places],
        right: tuple[int, Places],
        sizes: Sizes,
    ) -> int:
        """Products of matrices, as one: lanes are matrices, rows and columns, in that order.

        Args:
            dtype: Of the result.
            left: An expression, and the lane of it in each place of the left matrices.
            right: The same of the right ones.
            sizes: Theirs.
        """
        lanes = Lanes(sizes.matrices * sizes.rows * sizes.columns)
        key = ("product", *[(a, p.tobytes()) for a, p in (left, right)], sizes)
        taken = tuple([(a, Map(p)) for a, p in (left, right)])
        return self._add(key, "product", dtype, taken, lanes, sizes)

    def map_of(self, lanes: Lanes, places: Places) -> Map | None:
        """The map to these lanes, the same object for the same; None if it is the identity."""
        if lanes is ONE or is_identity(places, lanes.size):
            return None
        known = self._maps.setdefault(hash(places.tobytes()), [])
        for found in known:
            if np.array_equal(found.places, places):
                return found
        known.append(Map(places))
        return known[-1]

    def _lanes(self, arguments: Sequence[tuple[int, Places]]) -> tuple[Lanes, list[Map | None]]:
        """The lanes of an operation, and the maps from there to those of its arguments."""
        of = [self.all[a].lanes for a, _ in arguments]
        maps = [self.map_of(x, p) for x, (_, p) in zip(of, arguments, strict=True)]
        size = len(arguments[0][1])
        for lanes, found in zip(of, maps, strict=True):
            if lanes is not ONE and found is None:
                return lanes, maps
        for lanes, found in zip(of, maps, strict=True):
            for other, child in lanes.children.get(id(found), ()):
                if other is found:
                    return child, maps
        child = Lanes(size)
        for lanes, found in zip(of, maps, strict=True):
            if lanes is not ONE and found is not None:
                lanes.children.setdefault(id(found), []).append((found, child))
        return child, maps

    def _signed(
        self, kind: str, arguments: Sequence[tuple[int, _P]], size: int
    ) -> tuple[str, Sequence[tuple[int, _P]], bool]:
        """The same without changes of sign that cost; whether the result is to change its sign.

        A sum takes them in, a product passes them on: bit by bit the same, as rounding is
        symmetric, but for the sign of what is not a number.
        """
        if kind not in ("add", "sub", "mul", "div"):
            return kind, arguments, False
        (a, at), (b, to) = arguments
        first, second = self._negated(a), self._negated(b)
        if kind in ("mul", "div"):
            if first is not None and second is not None:
                return kind, [(first, at), (second, to)], False
            if first is not None and self.all[a].lanes.size == size:
                return kind, [(first, at), (b, to)], True
            if second is not None and self.all[b].lanes.size == size:
                return kind, [(a, at), (second, to)], True
        elif second is not None:
            return "sub" if kind == "add" else "add", [(a, at), (second, to)], False
        elif first is not None and kind == "add":
            return "sub", [(b, to), (first, at)], False
        return kind, arguments, False

    def _negated(self, number: int) -> int | None:
        """What an expression is the negative of."""
        found = self.all[number]
        if found.kind != "neg" or found.arguments[0][1] is not None:
            return None
        return found.arguments[0][0]

    def _simplified(
        self, kind: str, dtype: str, arguments: Sequence[int]
    ) -> int | tuple[str, Sequence[int], str] | None:
        """The argument that is the result, -1 for zero, or another operation; None if neither.

        A product with a zero that is known is zero, as everywhere in J.
        """
        values = [self.value(a) for a in arguments]
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
        if kind == "where" and arguments[1] == arguments[2] and self.all[arguments[1]].lanes is ONE:
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
        found = {
            "add": lambda: first + second,
            "sub": lambda: first - second,
            "mul": lambda: first * second,
            "div": lambda: first / second,
        }[kind]()
        if dtype == "float32":
            found = float(np.float32(found))
        return "constant", [self.constant(found, dtype)], dtype

    def _add(
        self,
        key: object,
        kind: str,
        dtype: str,
        arguments: tuple[Argument, ...],
        lanes: Lanes,
        about: About,
    ) -> int:
        number = self._found.get(key)
        if number is None:
            number = self._found[key] = len(self.all)
            if number >= self._most:
                raise PlanRefused(f"more than {self._most} scalar operations")
            self.all.append(Expression(kind, dtype, arguments, lanes, about))
        return number


_COMMUTATIVE = frozenset(("add", "mul"))


def _ordered(kind: str, arguments: Sequence[int]) -> Sequence[int]:
    return sorted(arguments) if kind in _COMMUTATIVE else arguments


def is_identity(places: Places, size: int) -> bool:
    """Whether lanes go together."""
    if len(places) != size or places[0] != 0 or places[-1] != size - 1:
        return False
    return bool((places[1:] - places[:-1] == 1).all())
