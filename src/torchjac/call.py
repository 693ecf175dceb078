"""One call of a function: its arguments, flattened once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchjac._torch import modes
from torchjac._torch.pytree import TreeSpec, flatten, leaf_names
from torchjac.errors import ArgumentError

Argnums = int | tuple[int, ...]


def check_argnums(argnums: Any) -> None:
    """Refuses argnums that are wrong whatever the arguments are.

    Raises:
        ArgumentError: It is not an int or a nonempty tuple of different ints.
    """
    given = argnums if isinstance(argnums, tuple) else (argnums,)
    if not given:
        raise ArgumentError("torchjac: argnums must be non-empty, got ().")
    for number in given:
        if not isinstance(number, int) or isinstance(number, bool):
            raise ArgumentError(
                f"torchjac: argnums must be int or Tuple[int, ...], got {type(number).__name__} "
                f"in {argnums!r}."
            )
    if len(set(given)) != len(given):
        raise ArgumentError(f"torchjac: argnums elements must be unique, got {given}.")


@dataclass(frozen=True)
class Call:
    """One call of a user's function: what to differentiate, and what is passed through.

    Arguments are flattened once, when their leaves are first read.

    Attributes:
        function: The user's function.
        argnums: Positions of the arguments to differentiate, as the user gave them.
        has_aux: Whether the function returns `(output, aux)`.
        args: Positional arguments.
        kwargs: Keyword arguments, never differentiated.
    """

    function: Callable[..., Any]
    argnums: Argnums
    has_aux: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def _differentiated(self) -> tuple[list[Any], TreeSpec]:
        # Not `cached_property`, which takes a lock up to Python 3.11: 1 us at every call.
        flat: tuple[list[Any], TreeSpec] | None = self.__dict__.get("_flat")
        if flat is None:
            flat = self.__dict__["_flat"] = flatten(self.differentiated())
        return flat

    @property
    def _others(self) -> tuple[list[Any], TreeSpec]:
        flat: tuple[list[Any], TreeSpec] | None = self.__dict__.get("_flat_others")
        if flat is None:
            flat = self.__dict__["_flat_others"] = flatten((_without(self), self.kwargs))
        return flat

    @property
    def leaves(self) -> list[Any]:
        """Leaves of the differentiated arguments; not to be changed."""
        return self._differentiated[0]

    @property
    def spec(self) -> TreeSpec:
        """Nesting of the differentiated arguments."""
        return self._differentiated[1]

    @property
    def other_leaves(self) -> list[Any]:
        """Leaves of the other arguments, with None for differentiated ones; not to be changed."""
        return self._others[0]

    @property
    def other_spec(self) -> TreeSpec:
        """Nesting of the other arguments: positional ones, then keyword arguments."""
        return self._others[1]

    def positions(self) -> tuple[int, ...]:
        """Nonnegative positions of the differentiated arguments.

        Raises:
            ArgumentError: A position is out of range, or named twice.
        """
        given = self.argnums if isinstance(self.argnums, tuple) else (self.argnums,)
        count = len(self.args)
        for number in given:
            if not -count <= number < count:
                raise ArgumentError(
                    f"torchjac: Got argnum={number}, but only {count} positional inputs. Keyword "
                    f"arguments are passed through and not differentiated."
                )
        found = tuple([number % count for number in given])
        if len(found) > 1 and len(set(found)) != len(found):
            raise ArgumentError(f"torchjac: argnums elements must be unique, got {given}.")
        return found

    def differentiated(self) -> Any:
        """The differentiated arguments as one tree: a single argument bare, several as a tuple."""
        positions = self.positions()
        if isinstance(self.argnums, tuple):
            return tuple(self.args[p] for p in positions)
        return self.args[positions[0]]

    def run(self, inputs: Any) -> tuple[Any, Any]:
        """Evaluates the function with other differentiated arguments: `(output, returned)`."""
        positions = self.positions()
        values = inputs if isinstance(self.argnums, tuple) else (inputs,)
        args = list(self.args)
        for position, value in zip(positions, values, strict=True):
            args[position] = value
        returned = self.function(*args, **self.kwargs)
        if not self.has_aux:
            return returned, returned
        if not (isinstance(returned, tuple) and len(returned) == 2):
            got = f"a {type(returned).__name__}"
            if isinstance(returned, tuple):
                got += f" of length {len(returned)}"
            raise ArgumentError(
                f"torchjac: output of function f should be a tuple: (output, aux) if has_aux is "
                f"True, got {got}."
            )
        return returned[0], returned

    def traced(self) -> bool:
        """Whether the arguments are not real values (FakeTensor, meta, make_fx)."""
        return modes.tracing(a for a in self.args if isinstance(a, Tensor))

    def name_input(self, position: int) -> str:
        """Name of a differentiated leaf by its position among all of them."""
        names: list[str] = []
        for number in self.positions():
            parameter = self._parameter(number)
            names += [n + parameter for n in leaf_names(f"args[{number}]", self.args[number])]
        return names[position]

    def _parameter(self, number: int) -> str:
        """Name of a positional parameter, for messages; empty where it has none."""
        function = self.function
        try:
            signature = inspect.signature(
                function.forward if isinstance(function, torch.nn.Module) else function
            )
        except (TypeError, ValueError):
            return ""
        named = [
            p.name
            for p in signature.parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        return f" (parameter {named[number]!r})" if number < len(named) else ""


def to_differentiate(call: Call) -> list[Tensor]:
    """The tensors of a call, so that what they give can be differentiated in any case."""
    count = len(call.leaves)
    return [
        x if i >= count or x.requires_grad else x.detach().requires_grad_()
        for i, x in enumerate(variables(call))
    ]


def arguments(call: Call) -> list[Tensor]:
    """The tensors that a traced function takes before its cotangents, in order, without a graph."""
    return [t.detach() if t.requires_grad else t for t in variables(call)]


def variables(call: Call) -> list[Tensor]:
    """As `arguments`, with the graph that they have.

    The differentiated ones come first, then other floating-point arguments.
    """
    if len(call.args) == len(call.positions()) and not call.kwargs:
        return list(call.leaves)
    others = call.other_leaves
    return [*call.leaves, *(others[i] for i in _variable(others))]


def _variable(leaves: Sequence[Any]) -> list[int]:
    """Which leaves may have any value."""
    return [
        i
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
    ]


def _without(call: Call) -> tuple[Any, ...]:
    """Arguments that are not differentiated; None in the place of the others."""
    taken = set(call.positions())
    return tuple(None if i in taken else a for i, a in enumerate(call.args))
