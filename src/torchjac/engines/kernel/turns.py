"""The statements of one turn of a loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from torchjac.engines.kernel.expressions import ONE, Expression, Places
from torchjac.engines.kernel.scalars import CTYPES

if TYPE_CHECKING:
    from torchjac.engines.kernel.source import Writer

# Numbers for each sum from which on its loop is worth vectorizing.
_WIDE = 8


class Turn:
    """The values of one turn of a loop."""

    def __init__(self, writer: Writer, size: int):
        self._writer = writer
        self._size = size
        self._names: dict[tuple[int, bytes], str] = {}
        self._stored: set[tuple[int, bytes]] = set()
        self.lines: list[str] = []
        self.sums = 0  # loops in it

    def of(self, number: int, lanes: Places) -> str:
        """The name of a value that is to be written: it is computed here."""
        wanted = (number, lanes.tobytes())
        stack = [(number, lanes, wanted[1])]
        while stack:  # no recursion: programs may be deep
            top, places, at = stack[-1]
            if self._known(top, at) is not None:
                stack.pop()
                continue
            loaded_here = self._loaded(top, places, (top, at) == wanted)
            if loaded_here is not None:
                self._name(top, at, loaded_here)
                continue
            taken = [
                (a, places if by is None else by.places[places])
                for a, by in self._writer.expression(top).arguments
            ]
            given = [(a, x, x.tobytes()) for a, x in taken]
            missing = [x for x in given if self._known(x[0], x[2]) is None]
            if missing:
                stack += reversed(missing)
                continue
            self._name(top, at, self._computed(top, [str(self._known(a, x)) for a, _, x in given]))
        return str(self._known(*wanted))

    def _known(self, number: int, lanes: bytes) -> str | None:
        """The name of a value that was computed already."""
        if self._writer.expression(number).lanes is ONE:
            return self._writer.alone(number)
        return self._names.get((number, lanes))

    def _name(self, number: int, lanes: bytes, text: str) -> None:
        name = f"v{len(self._names)}"
        self._names[number, lanes] = name
        dtype = self._writer.expression(number).dtype
        self.lines.append(f"    const {CTYPES[dtype]} {name} = {text};")

    def _computed(self, number: int, names: Sequence[str]) -> str:
        """An operation."""
        expression = self._writer.expression(number)
        of = self._writer.expression(expression.arguments[0][0]).dtype
        return self._writer.operation(expression.kind, expression.dtype, names, of, self._size)

    def _loaded(self, number: int, lanes: Places, first: bool) -> str | None:
        """What is read from an array, or summed up; None for what is computed from others."""
        writer = self._writer
        expression, kept = writer.expression(number), writer.kept(number)
        if expression.kind == "load":
            array, step, start = loaded(expression)
            return f"{array}[{writer.index(lanes * step + start)}]"
        if kept is not None and not first:
            return f"{kept}[{writer.index(lanes)}]"
        return self._segments(number, lanes) if expression.kind == "segments" else None

    def _segments(self, number: int, lanes: Places) -> str:
        """A sum, by a loop of its own."""
        self.sums += 1
        writer = self._writer
        expression = writer.expression(number)
        ((argument, by),), starts = expression.arguments, expression.about
        assert by is not None
        assert isinstance(starts, np.ndarray)
        kept = writer.kept(argument)
        source, step, start = (kept, 1, 0) if kept else loaded(writer.expression(argument))
        name, t = f"sum{len(self._names)}", CTYPES[expression.dtype]
        writer.work += len(by.places)
        begin, end = writer.index(starts[lanes]), writer.index(starts[lanes + 1])
        places = by.places * step + start
        where = writer.index(places, "k")
        self.lines.append(f"    {t} {name} = 0;")
        if len(places) >= _WIDE * len(starts):
            self.lines.append(f"    TORCHJAC_LOOP({name})")
        self.lines += [
            f"    for (int k = {begin}; k < {end}; k++) {name} += {source}[{where}];",
        ]
        return name


def loaded(expression: Expression) -> tuple[str, int, int]:
    """The array that a load reads, the step from lane to lane, and where the first one is."""
    found: tuple[str, int, int] = expression.about  # type: ignore[assignment]
    return found
