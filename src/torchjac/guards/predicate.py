"""A fingerprint written out as one function, for what guards find on nearly every call: no change.

Guards are functions within functions, one for each value, which say what changed. That nothing did
is said four times faster by one piece of code with all their conditions in it. What it does not
pass may still be alike, and what changed is for the guards to say: they are what counts.

A guard that stands often on the way has its condition registered with `inlined`; all others are
called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from torchjac._torch import native
from torchjac._torch.native import Reading, setting
from torchjac._torch.tensor_guards import tensor_check

Glance = Callable[[tuple[Any, ...]], bool]
# Makes a test whether readings give what they give now, where it can.
Unchanged = Callable[[Sequence[Reading]], Callable[[], bool] | None]


class GuardCode:
    """Code that tests values, line by line.

    Args:
        args: Arguments that are as they should be.

    Attributes:
        arguments: These, by the names that code has for the ones it is given.
    """

    def __init__(self, args: tuple[Any, ...]):
        self.arguments = {f"a{k}": x for k, x in enumerate(args)}
        self._held: dict[str, Any] = {}
        self._locals = 0
        self._tensors: list[tuple[str, Tensor]] = []
        self._readings: dict[Reading, range] = {}
        self._text: list[str] = []
        self._noted: dict[int, tuple[str, int]] = {}  # where a value is, and the line that notes it
        self._calls = False  # whether guards are called: what was noted is for them

    def hold(self, value: Any) -> str:
        """The name under which code finds a value of now."""
        name = f"c{len(self._held)}"
        self._held[name] = value
        return name

    def let(self, expression: str) -> str:
        """A variable with the value of an expression."""
        self._locals += 1
        self._text.append(f"x{self._locals} = {expression}")
        return f"x{self._locals}"

    def note(self, number: int, place: str) -> None:
        """Notes the value of a variable under a number, for when it is met again."""
        self._noted[number] = (place, len(self._text))
        self._text.append(f"seen[{number}] = {place}")

    def noted(self, number: int) -> str:
        """The variable whose value was noted; where guards that are called note it, their note."""
        found = self._noted.get(number)
        return f"seen[{number}]" if found is None else found[0]

    def need(self, *conditions: str) -> None:
        """These must be true."""
        self._text.append(f"if not ({' and '.join(conditions)}): return False")

    def need_value(self, expression: str, value: Any) -> None:
        """An expression must have this value, of the same type."""
        if value is None or isinstance(value, bool):
            self.need(f"{expression} is {value}")
        elif isinstance(value, torch.dtype):
            self.need(f"{expression} is {self.hold(value)}")
        else:
            x, held = self.let(expression), self.hold(value)
            self.need(f"type({x}) is {self.hold(type(value))}", f"{x} == {held}")

    def need_state(self, read: Callable[[], Any], value: Any) -> None:
        """A function without arguments must give this value, of the same type."""
        line = len(self._text)
        self.need_value(f"{self.hold(read)}()", value)
        self._read(setting(read), line)

    def need_place(self, place: str, tensor: Tensor, versioned: bool) -> None:
        """A variable, which is this tensor, must have its numbers where they are, as they are.

        Args:
            place: The variable.
            tensor: What it was found to be by lines before.
            versioned: Whether it must not have been written to.
        """
        line = len(self._text)
        self._read(native.implementation(tensor), line)  # what is read of it comes after
        self.need(f"{place}.data_ptr() == {tensor.data_ptr()}")
        self._read(native.place(tensor), line)
        if versioned:
            self.need(f"{place}._version == {tensor._version}")
            self._read(native.version(tensor), line + 1)

    def _read(self, reading: Reading | None, first: int) -> None:
        """Notes that a reading says the same as all lines from one on."""
        if reading is not None:
            self._readings[reading] = range(first, len(self._text))

    def need_empty(self, expression: str, kind: type) -> None:
        """The value of an expression must be a container of this very type with nothing in it."""
        x = self.let(expression)
        self.need(f"type({x}) is {self.hold(kind)}", f"not {x}")

    def need_like(self, place: str, tensor: Tensor) -> None:
        """A variable must be a tensor of the kind, shape, strides, dtype and device of another."""
        self._tensors.append((place, tensor))

    def need_check(self, check: Callable[..., Any], place: str) -> None:
        """A guard must find nothing changed."""
        if not self.need_form(check, place):
            self._calls = True
            self.need(f"{self.hold(check)}({place}, seen) is None")

    def need_form(self, check: Callable[..., Any], place: str) -> bool:
        """The same for a guard that can be written out; whether it can."""
        form = _forms.get(check)
        if form is not None:
            form(self, place)
        return form is not None

    def function(self, unchanged: Unchanged) -> Glance | None:
        """The code, to be called with a tuple of arguments; None where it does not work.

        Args:
            unchanged: What tests readings; lines that say the same are left out.
        """
        test = unchanged(list(self._readings)) if self._readings else None
        if test is not None:
            glance = self._compiled(test, {k for lines in self._readings.values() for k in lines})
            if glance is not None:
                return glance
        return self._compiled(None, set())

    def _compiled(self, unchanged: Callable[[], bool] | None, spared: set[int]) -> Glance | None:
        """The code without some of its lines, with tests of readings and tensors at its end."""
        if not self._calls:
            spared = spared.union(line for _, line in self._noted.values())
        text = [line for k, line in enumerate(self._text) if k not in spared]
        if len(text) > _MOST:
            return None
        if unchanged is not None:
            text.append(f"if not {self.hold(unchanged)}(): return False")
        if self._tensors:
            places, tensors = zip(*self._tensors, strict=True)
            test = tensor_check(*tensors)  # all of them together take little more than one
            if test is None:
                return None
            text.append(f"if not {self.hold(test)}({', '.join(places)}): return False")
        taken = [f"{', '.join(self.arguments)}, = args"] if self.arguments else []
        seen = ["seen = {}"] if self._calls else []
        body = "\n  ".join([*seen, *taken, *text, "return True"])
        source = f"def glance(args):\n try:\n  {body}\n except Exception: return False\n"
        space = dict(self._held)
        exec(source, space)
        glance: Glance = space["glance"]
        return glance if glance(tuple(self.arguments.values())) else None


# Lines that take about 0.1 s to compile.
_MOST = 5_000

Form = Callable[[GuardCode, str], None]
C = TypeVar("C", bound=Callable[..., Any])
_forms: WeakKeyDictionary[Callable[..., Any], Form] = WeakKeyDictionary()


def inlined(check: C, form: Form) -> C:
    """Registers how a guard is written out.

    Args:
        check: The guard.
        form: Given lines and the name of a value, adds lines that let pass no more than the guard.

    Returns:
        The guard.
    """
    _forms[check] = form
    return check
