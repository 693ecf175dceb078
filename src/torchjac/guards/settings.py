"""The check of torch's settings and modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchjac._torch.native import setting
from torchjac._torch.state import AMBIENT, ambient, plain_setting_readers, plain_settings
from torchjac.guards.predicate import GuardCode
from torchjac.guards.rules import Check, Mismatch, Seen, constant, emit_constant, frozen


@frozen
class State(Check):
    """The result of a function without arguments (a setting of torch, mostly).

    Attributes:
        read: The function.
        value: Its result.
    """

    read: Callable[[], Any]
    value: Any

    def explain(self, x: Any, seen: Seen) -> Mismatch | None:
        """The change of the result."""
        path = getattr(self.read, "__name__", "a setting")
        return constant(self.value, path).explain(self.read(), seen)

    def emit(self, code: GuardCode, place: str) -> None:
        """Writes the comparison as lines that a reading replaces, if torch's library has one."""
        first = code.position
        emit_constant(code, f"{code.hold(self.read)}()", self.value)
        code.read(setting(self.read), first)


@frozen
class Settings(Check):
    """Settings and modes of torch.

    Attributes:
        ambient: The value of each.
        readers: Functions and results that say the same in less time; None where there are modes.
            Equal results imply equal settings. The predicate compares these results alone, so there
            is none under modes.
        values: The results.
    """

    ambient: tuple[Any, ...]
    readers: list[tuple[Callable[[], Any], Any]] | None
    values: list[Any] | None

    def explain(self, x: Any, seen: Seen) -> Mismatch | None:
        """The first setting that changed."""
        if self.values is not None and plain_settings() == self.values:
            return None
        now = ambient()
        if now == self.ambient:
            return None
        changes = zip(AMBIENT, self.ambient, now, strict=True)
        name, old, new = next(c for c in changes if c[1] != c[2])
        return Mismatch(f"{name} changed from {old} to {new}")

    def emit(self, code: GuardCode, place: str) -> None:
        """Writes the comparison of each setting."""
        if self.readers is None:
            code.need("False")
        for read, value in self.readers or ():
            State(read, value).emit(code, place)


def settings() -> Settings:
    """The check of the current settings and modes."""
    pairs = plain_setting_readers()
    if pairs is None:
        return Settings(ambient(), None, None)
    return Settings(ambient(), pairs, [value for _, value in pairs])
