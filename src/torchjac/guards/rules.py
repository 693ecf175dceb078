"""Guards as data: the conditions on a value, and two interpreters of the conditions.

A *check* is a frozen value. Its method `explain` walks a value of a later call and names the first
mismatch. Its method `emit` writes the source of the guard predicate, which is compiled once. Both
read one text, so no condition is written twice:

- a `Clause` is one condition: a Python expression, with the words of its mismatch;
- a `Rule` is a kind of check: the clauses of a value, and the names of their constants;
- a `Leaf` is a rule with constants, for the value at one path;
- an `Access` is a Python expression that reads a part of a value.

A new kind of check is a rule, or an access, or checks put together (`guards.checks`).
"""

from __future__ import annotations

import builtins
import functools
import keyword
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from torchjac.guards.constants import shown

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform

    from torchjac.guards.predicate import GuardCode
else:

    def dataclass_transform(**_: Any) -> Any:
        """For type checkers only."""
        return lambda function: function


T = TypeVar("T")

# Objects of the walk so far, by number.
Seen = dict[int, Any]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A value that is not as it was.

    Attributes:
        reason: The value, and the change from old to new.
        final: Whether the value can never be as it was again.
    """

    reason: str
    final: bool = False


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(cls: type[T]) -> type[T]:
    """A dataclass that is frozen for type checkers; at run time that would cost 0.3 us a value."""
    return dataclass(slots=True, eq=False)(cls)


class Check:
    """A condition on a value. Subclasses are data: frozen, and without a reference to the value."""

    __slots__ = ()

    # A function that is true for no value that `explain` refuses; None where there is no fast one.
    test: Callable[[Any], Any] | None = None

    def explain(self, x: Any, seen: Seen) -> Mismatch | None:
        """The first mismatch of a value; None if it passes."""
        raise NotImplementedError

    def emit(self, code: GuardCode, place: str) -> None:
        """Writes the condition for the value of an expression.

        The predicate passes no more than `explain`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Clause:
    """One condition, as text over `x`, the value, and the constants of its rule.

    Attributes:
        text: A Python expression, without comprehensions and strings.
        words: The reason of a mismatch, as text of an f-string; `path` and `shown` are names too.
        strict: An expression that implies `text` and costs less, or empty. The predicate tests
            `strict` alone; `explain` passes a value for which either holds.
        final: An expression: whether the mismatch is for ever.
    """

    text: str
    words: str = ""
    strict: str = ""
    final: str = "False"

    @property
    def accepts(self) -> str:
        """The condition that `explain` tests."""
        return f"({self.strict} or {self.text})" if self.strict else f"({self.text})"

    def emit(self, code: GuardCode, condition: str, x: str, constants: Mapping[str, Any]) -> None:
        """Writes the condition that the predicate tests.

        Args:
            code: The source.
            condition: `strict` or `text`, in the names of the source.
            x: The variable of the value.
            constants: The constants of the rule.
        """
        code.need(condition)


_NAME = re.compile(r"(?<![\w.])[A-Za-z_]\w*")
_PYTHON = {*keyword.kwlist, *dir(builtins)}


@functools.cache
def _template(text: str) -> str:
    """An expression with its own names in braces: `type({x}) is {kind}`."""
    escaped = text.replace("{", "{{").replace("}", "}}")
    return _NAME.sub(lambda m: m[0] if m[0] in _PYTHON else f"{{{m[0]}}}", escaped)


def _lambda(parameters: Sequence[str], body: str, helpers: dict[str, Any]) -> Any:
    return eval(f"lambda {', '.join(parameters)}: {body}", {**helpers, "shown": shown})


class Rule:
    """A kind of check: conditions on one value.

    Args:
        names: The constants of the clauses.
        clauses: The conditions, in order.
        helpers: Functions and classes that the clauses use.
    """

    def __init__(self, names: str, /, *clauses: Clause, **helpers: Any):
        self.names = names.split()
        self.clauses = clauses
        self.helpers = helpers

    def __call__(self, path: str, *constants: Any) -> Leaf:
        """The check of the value at a path, with the constants in the order of their names."""
        return Leaf(self, path, constants, self._bind(*constants))

    @functools.cached_property
    def _bind(self) -> Callable[..., Callable[[Any], Any]]:
        """From the constants to a function of a value: whether all clauses accept the value."""
        accepts = " and ".join(clause.accepts for clause in self.clauses)
        return _lambda(self.names, f"lambda x: {accepts}", self.helpers)  # type: ignore[no-any-return]

    @functools.cached_property
    def explain(self) -> Callable[..., Mismatch | None]:
        """From a value, its path and the constants to the mismatch of the first clause."""
        lines = [
            f"    if not {clause.accepts}: return Mismatch(f{clause.words!r}, {clause.final})"
            for clause in self.clauses
        ]
        source = "\n".join([f"def function({', '.join(['x', 'path', *self.names])}):", *lines])
        space = {**self.helpers, "Mismatch": Mismatch, "shown": shown}
        exec(source, space)
        return space["function"]  # type: ignore[no-any-return]

    @functools.cached_property
    def _templates(self) -> list[tuple[Clause, str]]:
        """The clauses with the conditions that the predicate tests, names in braces."""
        return [(clause, _template(clause.strict or clause.text)) for clause in self.clauses]

    @functools.cached_property
    def _used(self) -> tuple[list[str], list[str], bool]:
        """The constants and helpers in the templates; whether the value stands there twice."""
        text = " ".join(template for _, template in self._templates)
        constants = [name for name in self.names if f"{{{name}}}" in text]
        helpers = [name for name in self.helpers if f"{{{name}}}" in text]
        return constants, helpers, text.count("{x}") > 1

    def emit(self, code: GuardCode, place: str, constants: Sequence[Any]) -> None:
        """Writes each clause for the value of an expression."""
        used, helpers, often = self._used
        values = dict(zip(self.names, constants, strict=True))
        x = code.variable(place) if often else place
        names = {"x": x}
        for name in used:
            names[name] = code.constant(values[name])
        for name in helpers:
            names[name] = code.hold(self.helpers[name])
        for clause, template in self._templates:
            clause.emit(code, template.format_map(names), x, values)


@frozen
class Leaf(Check):
    """A rule for the value at one path.

    Attributes:
        rule: The kind of check.
        path: The name of the value in words.
        constants: The constants of the rule.
        test: Whether the value passes.
    """

    rule: Rule
    path: str
    constants: tuple[Any, ...]
    test: Callable[[Any], Any] = field(repr=False)

    def explain(self, x: Any, seen: Seen) -> Mismatch | None:
        """The mismatch of the first clause that does not accept the value."""
        return self.rule.explain(x, self.path, *self.constants)

    def emit(self, code: GuardCode, place: str) -> None:
        """Writes each clause."""
        self.rule.emit(code, place, self.constants)


_CHANGED = "{path} changed from {shown(old)} to {shown(x)}"
_SAME = Rule("old", Clause("x is old", _CHANGED))
_EQUAL = Rule("kind old", Clause("type(x) is kind and x == old", _CHANGED))
_SINGLE = frozenset({type(None), bool, torch.dtype})  # one object for each value


def constant(value: Any, path: str) -> Leaf:
    """A check for the same value, of the same type, by `==`."""
    kind = type(value)
    return _SAME(path, value) if kind in _SINGLE else _EQUAL(path, kind, value)


def emit_constant(code: GuardCode, place: str, value: Any) -> None:
    """Writes the same check into the predicate."""
    kind = type(value)
    if kind in _SINGLE:
        _SAME.emit(code, place, (value,))
    else:
        _EQUAL.emit(code, place, (kind, value))


class Access:
    """A Python expression that reads a part of a value.

    Args:
        text: The expression, of `x` and, for one of several parts, of `key`.
        of: An expression of the value, evaluated once for all parts; its result is `x` in `text`.
        label: The path of a part, as text of an f-string with `path` and `key`.
        emitted: A faster text of the same meaning for the predicate, or empty.
        helpers: Functions and values that the texts use.
    """

    def __init__(
        self, text: str, of: str = "x", label: str = "{path}", emitted: str = "", **helpers: Any
    ):
        self.text, self.of, self.emitted, self.helpers = text, of, emitted, helpers
        self._label = label

    @functools.cached_property
    def get(self) -> Callable[[Any], Any]:
        """From a value to its part, where there is one."""
        return _lambda(["x"], self.text, self.helpers)  # type: ignore[no-any-return]

    @functools.cached_property
    def parts(self) -> Callable[[Any, Sequence[Any]], list[Any]]:
        """From a value and keys to the parts."""
        return self._function(_READ)  # type: ignore[no-any-return]

    @functools.cached_property
    def explain(self) -> Callable[[Any, Sequence[Any], Sequence[Check], Seen], Mismatch | None]:
        """From a value, keys and checks to the first mismatch of a part."""
        return self._function(_EXPLAIN)  # type: ignore[no-any-return]

    @functools.cached_property
    def label(self) -> Callable[[str, Any], str]:
        """From the path of a value and a key to the path of the part."""
        return _lambda(["path", "key"], f"f{self._label!r}", {})  # type: ignore[no-any-return]

    def base(self, code: GuardCode, place: str) -> str:
        """The variable of the predicate whose parts are read."""
        return code.variable(place if self.of == "x" else self._fill(self.of, code, {"x": place}))

    def at(self, code: GuardCode, base: str, key: Any = None) -> str:
        """The expression of the predicate that reads a part."""
        if self.emitted:
            return self.emitted.format(x=base, key=key)
        return self._fill(self.text, code, {"x": base, "key": code.constant(key)})

    def _function(self, text: str) -> Any:
        space = dict(self.helpers)
        exec(text.format(of=self.of, text=self.text), space)
        return space["function"]

    def _fill(self, text: str, code: GuardCode, names: dict[str, str]) -> str:
        template = _template(text)
        for name in self.helpers:
            if f"{{{name}}}" in template:
                names[name] = code.hold(self.helpers[name])
        return template.format_map(names)


# Functions of an access, for its own texts.
_READ = """
def function(x, keys):
    x = {of}
    return [{text} for key in keys]
"""
_EXPLAIN = """
def function(x, keys, checks, seen):
    x = {of}
    for key, check in zip(keys, checks):
        part = {text}
        test = check.test
        if test is None or not test(part):
            mismatch = check.explain(part, seen)
            if mismatch is not None:
                return mismatch
"""


ITEM = Access("x[key]", label="{path}[{key!r}]")
ATTRIBUTE = Access("getattr(x, key)", label="{path}.{key}", emitted="{x}.{key}")
ENTRY = Access("x[key]", label="{path}.{key}")  # an item of a namespace
TYPE = Access("type(x)")
NAMESPACE = Access("x.__dict__")


class _OfClass(Clause):
    """The clause that a value is of the class behind a weak reference."""

    def emit(self, code: GuardCode, condition: str, x: str, constants: Mapping[str, Any]) -> None:
        """Writes the condition; of a class that lives for ever, without the reference."""
        cls = constants["cls"]()
        static = not cls.__flags__ & _HEAP_TYPE
        code.need(f"type({x}) is {code.hold(cls)}" if static else condition)


# Py_TPFLAGS_HEAPTYPE: a class that the program defines, and that may die.
_HEAP_TYPE = 1 << 9
# A clause for rules with the constants `cls`, a weak reference, and `name`.
OF_CLASS = _OfClass(
    "type(x) is cls()", "{path} changed from an object of type {name} to {shown(x)}"
)
SAME_CLASS = Rule("cls name", OF_CLASS)
IDENTICAL = Rule("old", Clause("x is old", "{path} was replaced: {shown(x)}"))


def same_class(value: Any, path: str) -> Leaf:
    """A check that a value is still of the same class."""
    cls = type(value)
    return SAME_CLASS(path, weakref.ref(cls), cls.__name__)


def identical(value: Any, path: str) -> Leaf:
    """A check for this very object, one that lives as long as the program."""
    return IDENTICAL(path, value)
