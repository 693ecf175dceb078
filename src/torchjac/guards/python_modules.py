"""Checks of modules, and refusals of code that reads the world outside of the program."""

from __future__ import annotations

import pathlib
import sys
import types
import weakref
from collections.abc import Iterable
from typing import Any

import torch

from torchjac._torch.state import registered_namespaces
from torchjac.guards.builder import Policy
from torchjac.guards.bytecode import READS_FILES, computed, is_trusted, is_volatile, volatile_in
from torchjac.guards.checks import All, At, Compound, Parts
from torchjac.guards.constants import TRUSTED_OPERATORS, NotUnderstood
from torchjac.guards.containers import ContainerBuilder
from torchjac.guards.rules import NAMESPACE, Access, Check, Clause, Rule, identical

_OUTSIDE = "reads what lies outside of the program, or gives another value on every call"
_BY_NAME = Access("x.get(key)")
_MODULE = Rule("module", Clause("x is module()", "{path} is another module now: {shown(x)}"))
_NAMED = (types.BuiltinFunctionType, types.FunctionType, type)


class ModuleBuilder(ContainerBuilder):
    """Builds checks of modules.

    Attributes are read by names, so the names in all code that is reached say which attributes are
    read. The set of names grows while code is walked, so walks are repeated until it is complete.

    Attributes:
        names: Names in the code that earlier walks reached.
        reached: Names in the code that the current walk reaches.
    """

    def __init__(self, policy: Policy, names: frozenset[str]):
        super().__init__(policy)
        self.names = names
        self.reached: set[str] = set()
        self.kinds = [*self.kinds, (types.ModuleType, self._module)]

    def refuse(self, reason: str) -> None:
        """Ends the walk, at a value whose changes cannot be seen.

        Raises:
            NotUnderstood: Always.
        """
        raise NotUnderstood(reason)

    def value(self, value: Any, path: str) -> Check:
        """A check of the value at a path."""
        if isinstance(value, _NAMED):
            home = getattr(value, "__module__", None)
            if is_volatile(home, value.__name__):
                self.refuse(f"{path}: {home}.{value.__name__} {_OUTSIDE}")
            if is_trusted(home):  # under another name it is the same function
                self.reached.add(value.__name__)
        elif isinstance(value, types.ModuleType):
            self.reached.add(_read(value, _ALL))
            self._within(value, path)
        elif value is sys.modules:
            self.refuse(f"{path} holds every module")
        elif isinstance(value, pathlib.Path) and not READS_FILES.isdisjoint(self.names):
            self.refuse(f"{path}: files {_OUTSIDE}")
        return super().value(value, path)

    def variable(self, value: Any, path: str, used: Iterable[str]) -> Check:
        """A check of a variable. Code reads only these attributes if it is a module."""
        if not isinstance(value, types.ModuleType) or "" in used:
            return self.value(value, path)
        for chain in sorted(used):
            self._along(value, path, chain.split("."))
        return self._known(value, path)

    def _known(self, value: types.ModuleType, path: str) -> Check:
        """A check of a module, after the names that are read of it are in `reached`."""
        self.counted(path)
        return self.remember(value, path, self._module)

    def _module(self, value: types.ModuleType, path: str) -> Check:
        """A check of a module: a trusted one does not change, of a user's code reads some names."""
        if is_trusted(value.__name__):
            return identical(value, path)
        if not is_trusted(type(value).__module__):
            self.refuse(f"{path} is a module that computes its attributes")
        names, space = self.names, vars(value)
        modules = {name for name, held in space.items() if isinstance(held, types.ModuleType)}
        named = {name for name in space if _read(value, name) in names}
        below = {}  # modules of which only names in `reached` are read
        if _read(value, _ALL) in names:
            everything = computed(names, of="modules")
            named |= {n for n in space if n in names or (everything and n not in modules | _HEAD)}
        else:
            below = {n: self._known(space[n], f"{path}.{n}") for n in sorted(named & modules)}
            named -= modules
        checks: list[Check] = []
        if below:
            checks.append(Parts(_BY_NAME, [*below], [*below.values()]))
        checks.append(self.attributes(space, path, named.__contains__))
        return Compound(_MODULE(path, weakref.ref(value)), [At(NAMESPACE, All(checks))])

    def _along(self, module: types.ModuleType, path: str, parts: list[str]) -> None:
        """Refuses the world outside in a chain of attributes, as in `np.random.rand`."""
        for part in parts:
            self.reached.add(_read(module, part))
            if is_volatile(module.__name__, part):
                self.refuse(f"{path}: {module.__name__}.{part} {_OUTSIDE}")
            if module is torch.ops and part not in TRUSTED_OPERATORS:
                self._operator(path, part)
            if "__getattr__" in vars(module) and part not in vars(module):
                self._computes(module, path)
            inner = vars(module).get(part)
            if not isinstance(inner, types.ModuleType):
                return
            module = inner
        self.reached.add(_read(module, _ALL))
        self._within(module, path)

    def _within(self, module: types.ModuleType, path: str) -> None:
        """Refuses the world outside in any attribute of a module that code names."""
        if "__getattr__" in vars(module):
            self._computes(module, path)
        space = vars(module)
        for inner in (module, *(space[n] for n in self.names if n in space)):
            if not isinstance(inner, types.ModuleType):
                continue
            name = volatile_in(inner.__name__, self.names)
            if name is not None:
                self.refuse(f"{path}: {inner.__name__}{name and '.'}{name} {_OUTSIDE}")
            if inner is torch.ops:
                for name in sorted((self.names & registered_namespaces()) - TRUSTED_OPERATORS):
                    self._operator(path, name)
            elif inner.__name__.startswith("torch.ops."):
                name = inner.__name__.split(".")[2]
                if name not in TRUSTED_OPERATORS:
                    self._operator(path, name)

    def _operator(self, path: str, namespace: str) -> None:
        """Refuses a user's operator: no object that could be walked leads to its code."""
        self.refuse(f"{path}: operators of torch.ops.{namespace} are defined out of sight")

    def _computes(self, module: types.ModuleType, path: str) -> None:
        if not is_trusted(module.__name__):
            self.refuse(f"{path} is a module that computes its attributes")


_ALL = "*"
# Names that every module has.
_HEAD = frozenset(vars(types.ModuleType("m"))) | {"__builtins__", "__cached__", "__file__"}


def _read(module: types.ModuleType, name: str) -> str:
    """The entry among the names of code that says: code reads this name of the module."""
    return f"{module.__name__}:{name}"
