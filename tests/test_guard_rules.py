"""Guards as data: both interpreters read one text, and every text can be read."""

from __future__ import annotations

import builtins
import gc
import importlib
import pkgutil
import string
import types
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

import torchjac.guards
from guarding import X, call, guarded
from torchjac.guards import rules
from torchjac.guards.checks import At, Compound, Constants, Parts, Sufficient
from torchjac.guards.predicate import GuardCode
from torchjac.guards.rules import Access, Check, Clause, Rule, constant


def modules() -> Iterator[types.ModuleType]:
    for module in pkgutil.iter_modules(torchjac.guards.__path__):
        yield importlib.import_module(f"torchjac.guards.{module.name}")


def named(kind: type) -> dict[str, Any]:
    """Every rule, or access, of the package."""
    return {
        f"{module.__name__.split('.')[-1]}.{name}": value
        for module in modules()
        for name, value in vars(module).items()
        if isinstance(value, kind)
    }


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(rules._template(text)) if name}


@pytest.mark.parametrize("rule", named(Rule).values(), ids=named(Rule))
def test_a_rule_has_only_names_that_it_knows(rule: Rule) -> None:
    known = {"x", *rule.names, *rule.helpers}
    for clause in rule.clauses:
        texts = fields(clause.text) | fields(clause.strict) | fields(clause.final)
        assert texts <= known
        words: Any = compile(f"lambda: f{clause.words!r}", "words", "eval")
        inner = next(c for c in words.co_consts if isinstance(c, types.CodeType))
        free = {name for name in inner.co_names if not hasattr(builtins, name)}
        attributes = {"__name__", "shape", "layout", "stride", "dtype", "device"}
        assert free - attributes <= known | {"path", "shown"}
    assert rule._bind is not None, "the conditions compile"
    assert rule.explain is not None, "so do the words"


@pytest.mark.parametrize("access", named(Access).values(), ids=named(Access))
def test_an_access_has_only_names_that_it_knows(access: Access) -> None:
    assert fields(access.text) | fields(access.of) <= {"x", "key", *access.helpers}
    assert access.parts is not None
    assert access.explain is not None


def passes(check: Check, value: Any, new: Any) -> tuple[bool, bool]:
    """Whether the walk passes a new value, and the predicate of an old one."""
    box = [value]
    code = GuardCode(())
    At(Access("x[0]"), check).emit(code, code.hold(box))
    predicate = code.function(lambda _: None)
    assert predicate is not None
    assert check.explain(value, {}) is None
    box[0] = new
    return check.explain(new, {}) is None, predicate(())


class Box:
    """A container of a kind that no builder knows."""

    def __init__(self, *items: float):
        self.items = items


def test_a_new_kind_is_one_rule() -> None:
    """The example of docs/stages.md."""
    box = Rule(
        "size", Clause("len(x.items) == size", "the size of {path} changed to {len(x.items)}")
    )
    inside = Access("x.items[key]", label="{path}.items[{key}]")
    check = Compound(box("box", 2), [Parts(inside, (0, 1), [constant(1.0, "a"), constant(2, "b")])])
    assert passes(check, Box(1.0, 2), Box(1.0, 2)) == (True, True)
    for other in (Box(1.0), Box(1.0, 2.0), Box(1, 2), Box(3.0, 2)):
        assert passes(check, Box(1.0, 2), other) == (False, False)
    mismatch = check.explain(Box(1.0), {})
    assert mismatch is not None
    assert mismatch.reason == "the size of box changed to 1"


def test_the_predicate_is_strict() -> None:
    rule = Rule("old", Clause("x == old", "{path} changed", strict="x is old"))
    old, equal = [1, 2], [1, 2]
    assert passes(rule("x", old), old, old) == (True, True)
    assert passes(rule("x", old), old, equal) == (True, False)
    assert passes(rule("x", old), old, [1]) == (False, False)


def test_a_sufficient_leaf() -> None:
    same, equal = Rule("old", Clause("x is old")), Rule("old", Clause("x == old", "{path} changed"))
    old = [1]
    leaf = same("", old)
    check = Sufficient(leaf, equal("x", old), leaf.test)
    assert passes(check, old, [1]) == (True, False)
    mismatch = check.explain([2], {})
    assert mismatch is not None
    assert mismatch.reason == "x changed"


def test_the_first_clause_that_fails_has_the_words() -> None:
    rule = Rule("a b", Clause("x > a", "{path} is {x}, below {a}"), Clause("x < b", "{shown(x)}"))
    for value, words in ((0, "n is 0, below 1"), (5, "5")):
        mismatch = rule("n", 1, 4).explain(value, {})
        assert mismatch is not None
        assert mismatch.reason == words
        assert not mismatch.final


def test_what_is_dead_is_final() -> None:
    rule = Rule("old", Clause("x is old()", "{path} is gone", final="old() is None"))
    box = Box()
    leaf = rule("x", weakref.ref(box))
    mismatch = leaf.explain(3, {})
    assert mismatch is not None
    assert not mismatch.final
    del box
    gc.collect()
    mismatch = leaf.explain(3, {})
    assert mismatch is not None
    assert mismatch.final


@pytest.mark.parametrize("new", [[1, 2.0, "a", True], [1, 2, "b", True], [1, 2, "a", 1]])
def test_constants_are_compared_with_their_types(new: list[Any]) -> None:
    old = [1, 2, "a", True]
    check = Constants(rules.ITEM, range(4), old, list(map(type, old)), "x")
    assert passes(check, old, list(old)) == (True, True)
    assert passes(check, old, new) == (False, False)


def test_other_bases() -> None:
    """Code of a trusted base is inherited: another base is another class."""

    class One(weakref.WeakValueDictionary):  # type: ignore[type-arg]
        pass

    class Model(One):
        pass

    class Two(One):
        pass

    model = Model()
    f = lambda x: x * len(model)  # noqa: E731
    guard = guarded(call(f))
    assert guard.mismatch(call(f)) is None
    Model.__bases__ = (Two,)
    mismatch = guard.mismatch(call(f))
    assert mismatch is not None
    assert "the bases of" in mismatch.reason


def test_an_object_that_is_argument_and_closure_variable() -> None:
    shared = Box(2.0, 3.0)

    def f(x: Any, box: Box) -> Any:
        return x * box.items[0] * shared.items[1]

    guard = guarded(call(f, X, shared))
    assert guard.mismatch(call(f, X, shared)) is None
    mismatch = guard.mismatch(call(f, X, Box(2.0, 3.0)))
    assert mismatch is not None
    assert "no longer the same object" in mismatch.reason


def test_closure_variables_come_and_go() -> None:
    late = [1.0]

    def f(x: Any) -> Any:
        return x if f.early else x * late[0]  # type: ignore[attr-defined]

    f.early = True  # type: ignore[attr-defined]
    assert f.__closure__ is not None
    cell = f.__closure__[f.__code__.co_freevars.index("late")]
    del cell.cell_contents
    guard = guarded(call(f))
    assert guard.mismatch(call(f)) is None
    cell.cell_contents = [1.0]
    mismatch = guard.mismatch(call(f))
    assert mismatch is not None
    assert mismatch.reason == "closure variable late was set"
    guard = guarded(call(f))
    assert guard.mismatch(call(f)) is None
    del cell.cell_contents
    mismatch = guard.mismatch(call(f))
    assert mismatch is not None
    assert mismatch.reason == "closure variable late was deleted"


def test_braces_and_quotes_in_a_path() -> None:
    table = {"{a}'\"": lambda x, scale=2.0: x * scale}

    def f(x: Any) -> Any:
        return table["{a}'\""](x)

    guard = guarded(call(f))
    assert guard.mismatch(call(f)) is None
    next(iter(table.values())).__defaults__ = (3.0,)
    mismatch = guard.mismatch(call(f))
    assert mismatch is not None
    assert mismatch.reason.startswith("default argument scale of closure variable table[")
