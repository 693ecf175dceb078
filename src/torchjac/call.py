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
    """Refuses argnums that are wrong for every list of arguments.

    Raises:
        ArgumentError: `argnums` is neither an int nor a nonempty tuple of different ints.
    """
    numbers = argnums if isinstance(argnums, tuple) else (argnums,)
    if not numbers:
        raise ArgumentError("torchjac: argnums must be non-empty, got ().")
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool):
            raise ArgumentError(
                f"torchjac: argnums must be int or Tuple[int, ...], got {type(number).__name__} "
                f"in {argnums!r}."
            )
    if len(set(numbers)) != len(numbers):
        raise ArgumentError(f"torchjac: argnums elements must be unique, got {numbers}.")


@dataclass(frozen=True)
class Call:
    """One call of a user's function: differentiated arguments, and others that pass through.

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
    def _undifferentiated(self) -> tuple[list[Any], TreeSpec]:
        flat: tuple[list[Any], TreeSpec] | None = self.__dict__.get("_flat_undifferentiated")
        if flat is None:
            flat = self.__dict__["_flat_undifferentiated"] = flatten(
                (_undifferentiated(self), self.kwargs)
            )
        return flat

    @property
    def leaves(self) -> list[Any]:
        """Leaves of the differentiated arguments; callers must not change the list."""
        return self._differentiated[0]

    @property
    def spec(self) -> TreeSpec:
        """Nesting of the differentiated arguments."""
        return self._differentiated[1]

    @property
    def other_leaves(self) -> list[Any]:
        """Leaves of the other arguments, None for differentiated ones; read-only for callers."""
        return self._undifferentiated[0]

    @property
    def other_spec(self) -> TreeSpec:
        """Nesting of the other arguments: positional ones, then keyword arguments."""
        return self._undifferentiated[1]

    def positions(self) -> tuple[int, ...]:
        """Nonnegative positions of the differentiated arguments.

        Raises:
            ArgumentError: A position is out of range, or stands twice.
        """
        numbers = self.argnums if isinstance(self.argnums, tuple) else (self.argnums,)
        count = len(self.args)
        for number in numbers:
            if not -count <= number < count:
                raise ArgumentError(
                    f"torchjac: Got argnum={number}, but only {count} positional inputs. Keyword "
                    f"arguments are passed through and not differentiated."
                )
        positions = tuple([number % count for number in numbers])
        if len(positions) > 1 and len(set(positions)) != len(positions):
            raise ArgumentError(f"torchjac: argnums elements must be unique, got {numbers}.")
        return positions

    def differentiated(self) -> Any:
        """The differentiated arguments as one tree; a tuple if `argnums` is a tuple."""
        positions = self.positions()
        if isinstance(self.argnums, tuple):
            return tuple(self.args[p] for p in positions)
        return self.args[positions[0]]

    def run(self, inputs: Any) -> tuple[Any, Any]:
        """Calls the function with other values of the differentiated arguments.

        Args:
            inputs: The differentiated arguments, nested as `differentiated` nests them.

        Returns:
            `(output, returned)`: the output to differentiate, and the whole return value.

        Raises:
            ArgumentError: With `has_aux` the function does not return a pair.
        """
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
        """Whether an argument is a tensor without real values (FakeTensor, meta, make_fx)."""
        return modes.tracing(a for a in self.args if isinstance(a, Tensor))

    def name_input(self, position: int) -> str:
        """Name of a differentiated leaf, for messages.

        Args:
            position: Its position among all differentiated leaves.
        """
        names: list[str] = []
        for number in self.positions():
            parameter = self._parameter(number)
            names += [n + parameter for n in leaf_names(f"args[{number}]", self.args[number])]
        return names[position]

    def _parameter(self, number: int) -> str:
        """Name of a positional parameter, for messages; empty if the signature has no name."""
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


def differentiable_variables(call: Call) -> list[Tensor]:
    """The tensors of a call, as `variables`; every differentiated one requires a gradient."""
    count = len(call.leaves)
    return [
        x if i >= count or x.requires_grad else x.detach().requires_grad_()
        for i, x in enumerate(variables(call))
    ]


def arguments(call: Call) -> list[Tensor]:
    """The inputs of a traced function before its cotangents, in order, as tensors without graph."""
    return [t.detach() if t.requires_grad else t for t in variables(call)]


def variables(call: Call) -> list[Tensor]:
    """The tensors of a call whose values may vary, with their graphs.

    Differentiated leaves come first, then other floating-point and complex ones.
    """
    if len(call.args) == len(call.positions()) and not call.kwargs:
        return list(call.leaves)
    rest = call.other_leaves
    return [*call.leaves, *(rest[i] for i in _varying_positions(rest))]


def _varying_positions(leaves: Sequence[Any]) -> list[int]:
    """Positions of the leaves whose values may vary: floating-point and complex tensors."""
    return [
        i
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
    ]


def _undifferentiated(call: Call) -> tuple[Any, ...]:
    """The positional arguments, with None for each differentiated one."""
    positions = set(call.positions())
    return tuple(None if i in positions else a for i, a in enumerate(call.args))
