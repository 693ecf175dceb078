"""The guard predicate: all conditions of a guard as one compiled function.

Most calls find no change. One function says so four times faster than a walk through the checks
(`guards.rules`). A call that the predicate does not pass may still match: the walk decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from torchjac._torch.native import Reading
from torchjac._torch.tensor_guards import tensor_check

Predicate = Callable[[tuple[Any, ...]], bool]
# From readings of torch's library to a test whether all read the same; None without a compiler.
Unchanged = Callable[[Sequence[Reading]], Callable[[], bool] | None]

# Conditions and variables of a predicate; more would take longer than 0.1 s to compile.
_MOST = 5_000
# Characters of a string from which the source has a name for it, and not the string itself.
_LONG = 200


class GuardCode:
    """The source of a guard predicate, line by line.

    Args:
        args: Arguments that the predicate passes.

    Attributes:
        arguments: The same arguments, by their names in the source.
    """

    def __init__(self, args: tuple[Any, ...]):
        self.arguments = {f"a{k}": x for k, x in enumerate(args)}
        self._held: dict[str, Any] = {}
        self._tensors: list[tuple[str, Tensor]] = []
        self._readings: dict[Reading, range] = {}
        self._text: list[str] = []
        self._recorded: dict[int, str] = {}
        self._variables: dict[str, str] = {}
        self._open: list[str] = []  # conditions of the next line
        self._size = 0  # conditions and variables

    @property
    def position(self) -> int:
        """Number of the next line. Readings may replace lines from there on."""
        self._close()
        return len(self._text)

    def hold(self, value: Any) -> str:
        """The name in the source of an object that exists."""
        name = f"c{len(self._held)}"
        self._held[name] = value
        return name

    def constant(self, value: Any) -> str:
        """An expression for a constant: a literal for a number or a short string, else a name."""
        kind = type(value)
        if value is None or kind is bool or kind is int or (kind is str and len(value) < _LONG):
            return repr(value)
        return self.hold(value)

    def let(self, expression: str) -> str:
        """A variable with the value of an expression."""
        if expression not in self._variables:
            self._close()
            self._size += 1
            self._variables[expression] = name = f"x{len(self._variables)}"
            self._text.append(f"{name} = {expression}")
        return self._variables[expression]

    def variable(self, place: str) -> str:
        """A variable with the value of an expression, which may be a variable."""
        return place if place.isidentifier() else self.let(place)

    def record(self, number: int, variable: str) -> None:
        """Registers the variable of an object, by the number of the object."""
        self._recorded[number] = variable

    def recorded(self, number: int) -> str:
        """The variable of an object; without one, an expression that is no object of before."""
        return self._recorded.get(number, "[]")

    def need(self, condition: str) -> None:
        """Adds a condition."""
        self._size += 1
        self._open.append(f"({condition})" if " or " in condition else condition)

    def _close(self) -> None:
        """Writes the line of the conditions so far."""
        if self._open:
            self._text.append(f"if not ({' and '.join(self._open)}): return False")
            self._open = []

    def need_like(self, variable: str, tensor: Tensor) -> None:
        """Adds a condition: a variable is a tensor like another in all but its numbers."""
        self._tensors.append((variable, tensor))

    def read(self, reading: Reading | None, first: int) -> None:
        """Registers a reading of torch's library that replaces all lines from one on."""
        self._close()
        if reading is not None:
            self._readings[reading] = range(first, len(self._text))

    def function(self, unchanged: Unchanged) -> Predicate | None:
        """The predicate, compiled; None where it does not pass the arguments of now.

        Args:
            unchanged: Makes the test of readings, in the place of the lines that they replace.
        """
        self._close()
        test = unchanged(list(self._readings)) if self._readings else None
        if test is not None:
            replaced = {k for lines in self._readings.values() for k in lines}
            predicate = self._compiled(test, replaced)
            if predicate is not None:
                return predicate
        return self._compiled(None, set())

    def _compiled(
        self, unchanged: Callable[[], bool] | None, replaced: set[int]
    ) -> Predicate | None:
        """The predicate without the replaced lines, with the tests of readings and tensors last."""
        text = [line for k, line in enumerate(self._text) if k not in replaced]
        if self._size > _MOST:
            return None
        if unchanged is not None:
            text.append(f"if not {self.hold(unchanged)}(): return False")
        if self._tensors:
            variables, tensors = zip(*self._tensors, strict=True)
            test = tensor_check(*tensors)  # all of them take little longer than one
            if test is None:
                return None
            text.append(f"if not {self.hold(test)}({', '.join(variables)}): return False")
        arguments = [f"{', '.join(self.arguments)}, = args"] if self.arguments else []
        body = "\n  ".join([*arguments, *text, "return True"])
        source = f"def predicate(args):\n try:\n  {body}\n except Exception: return False\n"
        space = dict(self._held)
        exec(source, space)
        predicate: Predicate = space["predicate"]
        return predicate if predicate(tuple(self.arguments.values())) else None
