"""Building guards: a check of a Python value, and of everything that can be reached from there.

A `GuardBuilder` walks a value once. Its checks keep no value alive: they hold tensors and classes
by weak references, containers and objects by their parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from torchjac.guards import tensors
from torchjac.guards.checks import Again, Compound, Constants, Numbered, Parts
from torchjac.guards.constants import NotUnderstood, constant_test, is_flat, shown
from torchjac.guards.rules import ENTRY, Access, Check, Clause, Rule, constant

# Facts of a tensor that are compared: its numbers, the object alone, or the shape alone.
Level = Literal["values", "objects", "shapes"]
Only = Callable[[str], bool] | None


@dataclass(frozen=True, slots=True)
class Policy:
    """The level at which a module's tensors are compared.

    Attributes:
        parameters: `values`: a parameter that is replaced or written to is a change. `objects`:
            one that is replaced. `shapes`: only its shape, strides, dtype, device and whether it
            requires gradients count.
        buffers: The same for the buffers of modules.
    """

    parameters: Level = "values"
    buffers: Level = "values"


# Checks of one guard; more would cost milliseconds on every call.
MOST_CHECKS = 20_000
# Constants among the parts of a value; from here on one comparison of all is faster.
_TOGETHER = 4


def names_changed(path: str, old: list[str], new: list[str], kind: str = "attributes") -> str:
    """The reason of a mismatch between names."""
    lost, gained = [n for n in old if n not in new], [n for n in new if n not in old]
    parts = [f"{verb} {', '.join(n[:3])}" for verb, n in (("lost", lost), ("gained", gained)) if n]
    return f"the {kind} of {path} changed: {' and '.join(parts) or 'another order'}"


def _names(space: dict[str, Any], only: Only) -> list[str]:
    return list(space) if only is None else [name for name in space if only(name)]


_TESTED = Rule("same old", Clause("same(x)", "{path} changed from {old} to {shown(x)}"))
_EMPTY = Rule(
    "kind old", Clause("type(x) is kind and not x", "{path} changed from {old} to {shown(x)}")
)
# Names that no code reads may come and go. The predicate does not ask which names are read.
_NAMES = Rule(
    "keys only read",
    Clause(
        "names(x, only) == read",
        "{names_changed(path, read, names(x, only))}",
        strict="list(x) == keys",
    ),
    names=_names,
    names_changed=names_changed,
)


class GuardBuilder:
    """Builds the checks of values, and numbers the objects among them.

    Attributes:
        policy: The level at which a module's tensors are compared.
        count: Number of checks so far.
        alive: Objects that were met, constants aside. While they live no id is used twice.
        kinds: Types of objects, each with the function that builds a check.
    """

    def __init__(self, policy: Policy):
        self.policy = policy
        self.count = 0
        self.kinds: list[tuple[type | tuple[type, ...], Callable[[Any, str], Check]]] = [
            (Tensor, self._tensor),
            (np.ndarray, tensors.array),
        ]
        self._met: dict[int, tuple[int, str]] = {}
        self.alive: list[Any] = []

    def value(self, value: Any, path: str) -> Check:
        """A check that the value at this path is as it is now.

        Raises:
            NotUnderstood: A change of the value could not be seen.
        """
        self.counted(path)
        if is_flat(value):
            return constant(value, path)
        try:
            same = constant_test(value)
        except NotUnderstood as reason:
            raise NotUnderstood(f"{path}: {reason}") from None
        if same is None:
            return self.remember(value, path, self._of)
        if type(value) in (set, frozenset) and not value:
            return _EMPTY(path, type(value), shown(value))
        return _TESTED(path, same, shown(value))

    def remember(self, value: Any, path: str, make: Callable[[Any, str], Check]) -> Check:
        """A check of an object that may be met again, within itself or elsewhere."""
        met = self._met.get(id(value))
        if met is not None:
            return Again(met[0], path, met[1])
        number = len(self._met)
        self._met[id(value)] = number, path
        self.alive.append(value)
        return self.numbered(number, value, make(value, path))

    def numbered(self, number: int, value: Any, check: Check) -> Check:
        """A check of an object that `Again` may refer to; a subclass may know a faster one."""
        return Numbered(number, check)

    def counted(self, path: str, number: int = 1) -> None:
        """Counts checks.

        Raises:
            NotUnderstood: There are too many.
        """
        self.count += number
        if self.count > MOST_CHECKS:
            raise NotUnderstood(f"{path}: more than {MOST_CHECKS} values would have to be checked")

    def parts(
        self, access: Access, keys: Sequence[Any], values: Sequence[Any], path: str
    ) -> list[Check]:
        """Checks of the parts of a value: of many constants at once, then of each object."""
        flat = [is_flat(value) for value in values]
        if sum(flat) < _TOGETHER:
            each = zip(keys, values, strict=True)
            inner = [self.value(value, access.label(path, key)) for key, value in each]
            return [Parts(access, keys, inner)] if inner else []
        pairs = list(zip(keys, values, strict=True))
        constants = dict(itertools.compress(pairs, flat))
        values = list(constants.values())
        self.counted(path, len(constants))
        checks: list[Check] = [
            Constants(access, [*constants], values, list(map(type, values)), path)
        ]
        rest = [pair for pair, known in zip(pairs, flat, strict=True) if not known]
        if rest:
            checks += self.parts(access, [key for key, _ in rest], [v for _, v in rest], path)
        return checks

    def attributes(self, value: dict[str, Any], path: str, only: Only = None) -> Check:
        """A check of a namespace: of its names, and of the values that are read."""
        read = _names(value, only)
        names = _NAMES(path, list(value), only, read)
        return Compound(names, self.parts(ENTRY, read, [value[name] for name in read], path))

    def _of(self, value: Any, path: str) -> Check:
        for kinds, make in self.kinds:
            if isinstance(value, kinds):
                return make(value, path)
        raise NotUnderstood(f"{path} is an object of type {type(value).__name__}")

    def _tensor(self, value: Tensor, path: str) -> Check:
        return self.tensor(value, path, self.level(value))

    def level(self, value: Tensor) -> Level:
        """The level at which a tensor is compared; a subclass may know more."""
        return self.policy.parameters if isinstance(value, nn.Parameter) else "values"

    def tensor(self, value: Tensor, path: str, level: Level) -> Check:
        """A check of a tensor at a level."""
        make = {"values": tensors.values, "objects": tensors.identity, "shapes": tensors.shape}
        tensors.refuse_wrapped(value, path)
        return make[level](value, path)
