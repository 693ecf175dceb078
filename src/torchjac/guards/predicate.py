"""The guard predicate: all conditions of a guard as one compiled function.

Most calls find no change, and one function says so four times faster than a walk through the checks
(`guards.checks`). A call that the predicate does not pass may still match: the walk decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from torchjac._torch.native import Reading
from torchjac._torch.tensor_guards import look

Predicate = Callable[[tuple[Any, ...]], bool]
# From readings of torch's library to a test whether none has changed; None without a compiler.
Unchanged = Callable[[Sequence[Reading]], Callable[[], bool] | None]

# Lines that take about 0.1 s to compile. No predicate is longer.
_MOST_LINES = 5_000
# Characters of a string that stands in the source itself.
_LITERAL = 200


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

    @property
    def position(self) -> int:
        """Number of the next line. Readings may replace lines from there on."""
        self._close()
        return len(self._text)

    def hold(self, value: Any) -> str:
        """The name of a value of now in the source."""
        name = f"c{len(self._held)}"
        self._held[name] = value
        return name

    def constant(self, value: Any) -> str:
        """An expression for a value of now: a literal for a number or a short string."""
        kind = type(value)
        if value is None or kind is bool or kind is int or (kind is str and len(value) < _LITERAL):
            return repr(value)
        return self.hold(value)

    def let(self, expression: str) -> str:
        """A variable with the value of an expression."""
        if expression not in self._variables:
            self._close()
            self._variables[expression] = name = f"x{len(self._variables)}"
            self._text.append(f"{name} = {expression}")
        return self._variables[expression]

    def variable(self, place: str) -> str:
        """The same; an expression that is a variable stays."""
        return place if place.isidentifier() else self.let(place)

    def record(self, number: int, variable: str) -> None:
        """Keeps the variable of an object under the number of the object."""
        self._recorded[number] = variable

    def recorded(self, number: int) -> str:
        """The variable of an object; a new object, which is no other, where there is none."""
        return self._recorded.get(number, "[]")

    def need(self, condition: str) -> None:
        """A condition without which the predicate fails."""
        self._open.append(f"({condition})" if " or " in condition else condition)

    def _close(self) -> None:
        """Writes the line of the conditions so far."""
        if self._open:
            self._text.append(f"if not ({' and '.join(self._open)}): return False")
            self._open = []

    def need_like(self, variable: str, tensor: Tensor) -> None:
        """A variable must have the kind, shape, strides, dtype and device of a tensor."""
        self._tensors.append((variable, tensor))

    def read(self, reading: Reading | None, first: int) -> None:
        """Says that a reading of torch's library replaces all lines from one on."""
        self._close()
        if reading is not None:
            self._readings[reading] = range(first, len(self._text))

    def function(self, unchanged: Unchanged) -> Predicate | None:
        """The predicate, compiled; None where it does not work.

        Args:
            unchanged: Makes the test of readings. Lines that readings replace are left out.
        """
        self._close()
        test = unchanged(list(self._readings)) if self._readings else None
        if test is not None:
            replaced = {k for lines in self._readings.values() for k in lines}
            predicate = self._compiled(test, replaced)
            if predicate is not None:
                return predicate
        return self._compiled(None, set())

    def _compiled(self, unchanged: Callable[[], bool] | None, left: set[int]) -> Predicate | None:
        """The source without some of its lines, with tests of readings and tensors at its end."""
        text = [line for k, line in enumerate(self._text) if k not in left]
        if len(text) > _MOST_LINES:
            return None
        if unchanged is not None:
            text.append(f"if not {self.hold(unchanged)}(): return False")
        if self._tensors:
            variables, tensors = zip(*self._tensors, strict=True)
            test = look(*tensors)  # all of them together take little more than one
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
