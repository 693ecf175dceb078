"""The statements of one turn of a loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from torchjac.compiler.codegen.c.scalar_ops import CTYPES
from torchjac.compiler.codegen.scalar_ir import ONE, ArrayRef, Places, loaded, summed

if TYPE_CHECKING:
    from torchjac.compiler.codegen.c.writer import Writer

_Value = tuple[int, Places]
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
            sums = self._sums(top, places)
            taken = self._taken(top, places) if sums is None else sums[1]
            given = [(a, x, x.tobytes()) for a, x in taken]
            missing = [x for x in given if self._known(x[0], x[2]) is None]
            if missing:
                stack += reversed(missing)
                continue
            names = [str(self._known(a, x)) for a, _, x in given]
            if sums is None:
                self._name(top, at, self._computed(top, names))
            else:
                self._name(top, at, " + ".join([self._joined(sums[0]), *names]))
        return str(self._known(*wanted))

    def _taken(self, number: int, lanes: Places) -> list[_Value]:
        """The arguments of an expression, and which lanes of them."""
        return [
            (a, lanes if by is None else by.places[lanes])
            for a, by in self._writer.expression(number).arguments
        ]

    def _sums(self, number: int, lanes: Places) -> tuple[list[_Value], list[_Value]] | None:
        """Sums over kept values that are added up, and what else is; None of fewer than two."""
        writer = self._writer
        if writer.expression(number).kind != "add" or not writer.joins:
            return None
        sums: list[_Value] = []
        others: list[_Value] = []
        stack = [(number, lanes)]
        while stack:
            top, places = stack.pop()
            expression = writer.expression(top)
            alone = writer.uses[top] == 1 and writer.kept(top) is None
            if expression.kind == "add" and (alone or top == number):
                stack += reversed(self._taken(top, places))
            elif expression.kind == "segments" and alone and self._is_kept_like(top, number):
                sums.append((top, places))
            else:
                others.append((top, places))
        return (sums, others) if len(sums) > 1 else None

    def _is_kept_like(self, number: int, other: int) -> bool:
        """Whether a sum is one of values in memory, which are of the dtype of another value."""
        writer = self._writer
        source = writer.expression(number).arguments[0][0]
        return (
            writer.kept(source) is not None
            and writer.expression(source).dtype == writer.expression(other).dtype
        )

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
            return writer.element(*loaded(expression), lanes)
        if kept is not None and not first:
            return f"{kept}[{writer.index(lanes)}]"
        return self._segments(number, lanes) if expression.kind == "segments" else None

    def _segments(self, number: int, lanes: Places) -> str:
        """A sum, by a loop of its own."""
        writer = self._writer
        argument, places, starts = summed(writer.expression(number))
        kept = writer.kept(argument)
        source, step, start = (kept, 1, 0) if kept else loaded(writer.expression(argument))
        dtype = writer.expression(number).dtype
        return self._sum(source, dtype, places * step + start, starts[lanes], starts[lanes + 1])

    def _joined(self, sums: list[_Value]) -> str:
        """Several sums as one: of a matrix that is assembled most of them have no summands."""
        writer = self._writer
        found = [(*summed(writer.expression(n)), lanes) for n, lanes in sums]
        counts = np.stack([np.diff(starts)[lanes] for _, _, starts, lanes in found])
        ends = np.cumsum(counts.sum(0))
        # Where in the new order the summands of each turn begin, sum by sum.
        begins = ends - counts.sum(0) + np.cumsum(counts, 0) - counts
        where = np.empty(counts.sum(), dtype=np.int64)
        for (argument, places, starts, lanes), count, begin in zip(
            found, counts, begins, strict=True
        ):
            array = writer.kept(argument)
            assert array is not None
            taken = places[_ranges(starts[lanes], count)]
            where[_ranges(begin, count)] = taken + writer.offset(array)
        dtype = writer.expression(sums[0][0]).dtype
        writer.statements += len(sums)
        return self._sum(writer.base_of(dtype), dtype, where, ends - counts.sum(0), ends)

    def _sum(
        self, source: ArrayRef | str, dtype: str, places: Places, begins: Places, ends: Places
    ) -> str:
        """Of each turn a sum over part of these places of an array."""
        self.sums += 1
        writer = self._writer
        name, t = f"sum{len(self._names)}", CTYPES[dtype]
        writer.work += len(places)
        if (begins[1:] == ends[:-1]).all():  # one table for both
            every = np.append(begins, ends[-1])
            begin, end = writer.index(every), writer.index(every, "(i + 1)")
        else:
            begin, end = writer.index(begins), writer.index(ends)
        self.lines.append(f"    {t} {name} = 0;")
        if len(places) >= _WIDE * len(begins):
            self.lines.append(f"    TORCHJAC_LOOP({name})")
        where = writer.index(places, "k")
        self.lines.append(f"    for (int k = {begin}; k < {end}; k++) {name} += {source}[{where}];")
        return name


def _ranges(begins: Places, counts: Places) -> Places:
    """The numbers from each begin on, as many as its count says, one after the other."""
    ends = np.cumsum(counts)
    return np.repeat(begins - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)
