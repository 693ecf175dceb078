"""Operators of torch by name. A torch that lacks one gives a placeholder, never an error at import.

torch adds and removes operators between versions (2.14 has no `aten.cholesky`). Tables of this
library name operators when modules are imported; `known` leaves out the ones that are missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from torchjac._torch.private import Gone


class MissingOperator(Gone):
    """An operator that this version of torch lacks. No graph holds it."""

    def overloads(self) -> list[str]:
        """Names of its overloads: none."""
        return []


class Namespace:
    """Operators of one namespace of `torch.ops`.

    Attributes are the operators of torch, or `MissingOperator` for a name that torch lacks. An
    operator that torch has, without the overload that is asked for, has a missing overload.
    """

    def __init__(self, name: str):
        """Names the namespace, such as `aten`."""
        self._name = name

    def __getattr__(self, operator: str) -> Any:
        """Finds an operator."""
        if operator.startswith("__"):
            raise AttributeError(operator)
        packet = getattr(getattr(torch.ops, self._name), operator, None)
        name = f"{self._name}.{operator}"
        value = MissingOperator(name) if packet is None else _Packet(name, packet)
        setattr(self, operator, value)  # cached
        return value


class _Packet:
    """The overloads of one operator."""

    def __init__(self, name: str, packet: Any):
        self._name = name
        self._packet = packet
        self.overloads = packet.overloads

    def __getattr__(self, overload: str) -> Any:
        if overload.startswith("__"):
            raise AttributeError(overload)
        value = getattr(self._packet, overload, None)
        if value is None:
            value = MissingOperator(f"{self._name}.{overload}")
        setattr(self, overload, value)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._packet(*args, **kwargs)


aten: Any = Namespace("aten")
prims: Any = Namespace("prims")


def known(table: Any) -> Any:
    """A table without the operators that this version of torch lacks.

    Args:
        table: Set or tuple of operators, or dict with operators as keys.

    Returns:
        A frozen table of the same kind: frozenset, tuple or read-only mapping.
    """
    if isinstance(table, Mapping):
        return MappingProxyType(
            {k: v for k, v in table.items() if not isinstance(k, MissingOperator)}
        )
    entries = [entry for entry in table if not isinstance(entry, MissingOperator)]
    return tuple(entries) if isinstance(table, tuple) else frozenset(entries)
