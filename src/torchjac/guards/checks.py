"""Checks of checks: of the parts of a value, of several conditions, of an object met again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Any

from torchjac.guards.rules import (
    Access,
    Check,
    Leaf,
    Mismatch,
    Seen,
    constant,
    emit_constant,
    frozen,
)

if TYPE_CHECKING:
    from torchjac.guards.predicate import GuardCode


@frozen
class At(Check):
    """A check of one part of a value."""

    access: Access
    check: Check

    def explain(self, x: Any, seen: Seen) -> Mismatch | None:
        """The mismatch of the part."""
        part, test = self.access.get(x), self.check.test
        return None if test is not None and test(part) else self.check.explain(part, seen)

    def emit(self, code: GuardCode, place: str) -> None:
        """Writes the check of the part."""
        access = self.access
        self.check.emit(code, access.at(code, place))


@frozen
class Parts(Check):
    """Checks of several parts of a value, read in one way.

    Attributes:
        access: How parts are read.
        keys: The key of each part.
        checks: The check of each part.
        absent: The reason of a mismatch where a part cannot be read, with `{key}`. It is empty
            where an earlier check ensures that all parts can be read.
        labels: The keys in words, where the keys themselves are numbers.
    """

    access: Access
    keys: Sequence[Any]
    checks: Sequence[Check]
    absent: str = ""
    labels: Sequence[str] = ()

    def explain(self, x: Any, seen: Seen) -> Mismatch | None:
        """The mismatch of the first part that has one."""
        try:
            return self.access.explain(x, self.keys, self.checks, seen)
        except Exception:
            return self._absent(x, seen)

    def _absent(self, x: Any, seen: Seen) -> Mismatch | None:
        """The first mismatch, part by part, where a part cannot be read."""
        labels = self.labels or self.keys
        for key, label, check in zip(self.keys, labels, self.checks, strict=True):
            try:
                (part,) = self.access.parts(x, (key,))
            except Exception:
                if not self.absent:
                    raise
                return Mismatch(self.absent.replace("{key}", str(label)))
            mismatch = check.explain(part, seen)
            if mismatch is not None:
                return mismatch
        return None

    def emit(self, code: GuardCode, place: str) -> None:
        """Writes the check of each part."""
        base = self.access.base(code, place)
        for key, check in zip(self.keys, self.checks, strict=True):
            check.emit(code, self.access.at(code, base, key))


@frozen
class Constants(Check):
    """Constants among the parts of a value. `explain` compares all of them at once.

    Attributes:
        access: How parts are read.
        keys: The key of each part.
        values: The constant at each key, compared by type and `==`.
        kinds: The type of each constant.
        path: The path of the value.
    """

    access: Access
    keys: Sequence[Any]
    values: list[Any]
    kinds: list[type]
    path: str

    def explain(self, x: Any, seen: Seen) -> Mismatch | None:
        """The mismatch of the first part that has one."""
        parts = self.access.parts(x, self.keys)
        if list(map(type, parts)) == self.kinds and parts == self.values:
            return None
        label = self.access.label
        pairs = zip(self.keys, self.values, strict=True)
        leaves = [constant(value, label(self.path, key)) for key, value in pairs]
        return Parts(self.access, self.keys, leaves).explain(x, seen)

    def emit(self, code: GuardCode, place: str) -> None:
        """Writes the check of each part."""
        base = self.access.base(code, place)
        for key, value in zip(self.keys, self.values, strict=True):
            emit_constant(code, self.access.at(code, base, key), value)


@frozen
class Compound(Check):
    """A leaf, and then further checks of the same value."""

    leaf: Leaf
    checks: Sequence[Check]

    def explain(self, x: Any, seen: Seen) -> Mismatch | None:
        """The first mismatch."""
        if not self.leaf.test(x):
            mismatch = self.leaf.explain(x, seen)
            if mismatch is not None:
                return mismatch
        for check in self.checks:
            mismatch = check.explain(x, seen)
            if mismatch is not None:
                return mismatch
        return None

    def emit(self, code: GuardCode, place: str) -> None:
        """Writes each check, of one variable."""
        x = code.variable(place)
        for check in (self.leaf, *self.checks):
            check.emit(code, x)


@frozen
class All(Check):
    """Several checks of the same value."""

    checks: Sequence[Check]

    def explain(self, x: Any, seen: Seen) -> Mismatch | None:
        """The first mismatch."""
        for check in self.checks:
            test = check.test
            if test is None or not test(x):
                mismatch = check.explain(x, seen)
                if mismatch is not None:
                    return mismatch
        return None

    def emit(self, code: GuardCode, place: str) -> None:
        """Writes each check, of one variable."""
        x = code.variable(place)
        for check in self.checks:
            check.emit(code, x)


@frozen
class Sufficient(Check):
    """A cheap leaf that implies another check.

    The predicate tests the leaf alone. `explain` passes a value for which either holds; the check
    has the words of a mismatch.

    Attributes:
        leaf: The leaf.
        check: The check that the leaf implies.
        test: The test of the leaf.
    """

    leaf: Leaf
    check: Check
    test: Callable[[Any], Any] = field(repr=False)

    def explain(self, x: Any, seen: Seen) -> Mismatch | None:
        """The mismatch of the check, where the leaf does not hold."""
        return None if self.test(x) else self.check.explain(x, seen)

    def emit(self, code: GuardCode, place: str) -> None:
        """Writes the leaf."""
        self.leaf.emit(code, place)


@frozen
class Numbered(Check):
    """An object that may be met again: `Again` refers to it by number."""

    number: int
    check: Check

    def explain(self, x: Any, seen: Seen) -> Mismatch | None:
        """The mismatch of the object."""
        seen[self.number] = x
        test = self.check.test
        return None if test is not None and test(x) else self.check.explain(x, seen)

    def emit(self, code: GuardCode, place: str) -> None:
        """Writes the check of a variable, and registers the variable."""
        x = code.variable(place)
        code.record(self.number, x)
        self.check.emit(code, x)


@frozen
class Again(Check):
    """The same object in a second place, or within itself.

    Attributes:
        number: The number of the object.
        path: The second place.
        first: The path of the first place.
    """

    number: int
    path: str
    first: str

    def explain(self, x: Any, seen: Seen) -> Mismatch | None:
        """The mismatch of another object in the second place."""
        if seen.get(self.number, seen) is x:
            return None
        return Mismatch(f"{self.path} and {self.first} are no longer the same object")

    def emit(self, code: GuardCode, place: str) -> None:
        """Writes the comparison with the variable of the first place."""
        code.need(f"{place} is {code.recorded(self.number)}")
