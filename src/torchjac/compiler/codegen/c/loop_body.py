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
# Segment sums over buffers, and the other terms of the same sum.
Split = tuple[list[_Value], list[_Value]]
# Numbers for each sum from which on its loop is worth vectorizing.
_WIDE = 8


class LoopBody:
    """The values of one turn of a loop."""

    def __init__(self, writer: Writer, size: int):
        self.writer = writer
        self._size = size
        self._names: dict[tuple[int, bytes], str] = {}
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
            buffered = None if (top, at) == wanted else self._buffered(top, places)
            text = buffered or self._read(top, places)
            if text is not None:
                self._name(top, at, text)
                continue
            sums = self.split_sum(top, places)
            taken = self.arguments(top, places) if sums is None else sums[1]
            given = [(a, x, x.tobytes()) for a, x in taken]
            missing = [x for x in given if self._known(x[0], x[2]) is None]
            if missing:
                stack += reversed(missing)
                continue
            names = [str(self._known(a, x)) for a, _, x in given]
            if sums is None:
                self._name(top, at, self._computed(top, names))
            else:
                self._name(top, at, " + ".join([self.merged(sums[0]), *names]))
        return str(self._known(*wanted))

    def arguments(self, number: int, lanes: Places) -> list[_Value]:
        """The arguments of an expression, and which lanes of them."""
        return [
            (a, lanes if by is None else by.places[lanes])
            for a, by in self.writer.expression(number).arguments
        ]

    def split_sum(self, number: int, lanes: Places) -> Split | None:
        """How an expression divides into segment sums and other terms; None: it does not."""
        return None

    def _known(self, number: int, lanes: bytes) -> str | None:
        """The name of a value that was computed already."""
        if self.writer.expression(number).lanes is ONE:
            return self.writer.alone(number)
        return self._names.get((number, lanes))

    def _name(self, number: int, lanes: bytes, text: str) -> None:
        name = f"v{len(self._names)}"
        self._names[number, lanes] = name
        dtype = self.writer.expression(number).dtype
        self.lines.append(f"    const {CTYPES[dtype]} {name} = {text};")

    def _computed(self, number: int, names: Sequence[str]) -> str:
        """An operation."""
        expression = self.writer.expression(number)
        of = self.writer.expression(expression.arguments[0][0]).dtype
        return self.writer.operation(expression.kind, expression.dtype, names, of, self._size)

    def _buffered(self, number: int, lanes: Places) -> str | None:
        """The text that reads a value from its buffer; None: the value has no buffer."""
        kept = self.writer.kept(number)
        return None if kept is None else f"{kept}[{self.writer.index(lanes)}]"

    def _read(self, number: int, lanes: Places) -> str | None:
        """The text of a load or a segment sum; None: other expressions are computed."""
        expression = self.writer.expression(number)
        if expression.kind == "load":
            return self.writer.element(*loaded(expression), lanes)
        return self._segments(number, lanes) if expression.kind == "segments" else None

    def _segments(self, number: int, lanes: Places) -> str:
        """A sum, by a loop of its own."""
        writer = self.writer
        argument, places, starts = summed(writer.expression(number))
        kept = writer.kept(argument)
        source, step, start = (kept, 1, 0) if kept else loaded(writer.expression(argument))
        dtype = writer.expression(number).dtype
        return self.add_sum(source, dtype, places * step + start, starts[lanes], starts[lanes + 1])

    def merged(self, sums: list[_Value]) -> str:
        """Several sums as one: of a matrix that is assembled most of them have no summands."""
        writer = self.writer
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
        return self.add_sum(writer.base_of(dtype), dtype, where, ends - counts.sum(0), ends)

    def add_sum(
        self, source: ArrayRef | str, dtype: str, places: Places, begins: Places, ends: Places
    ) -> str:
        """Of each turn a sum over part of these places of an array."""
        self.sums += 1
        writer = self.writer
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


class MergingBody(LoopBody):
    """A loop body that merges segment sums over several buffers into one sum."""

    def split_sum(self, number: int, lanes: Places) -> Split | None:
        """Sums over kept values that are added up, and what else is; None of fewer than two."""
        writer = self.writer
        if writer.expression(number).kind != "add":
            return None
        sums: list[_Value] = []
        others: list[_Value] = []
        stack = [(number, lanes)]
        while stack:
            top, places = stack.pop()
            expression = writer.expression(top)
            alone = writer.uses[top] == 1 and writer.kept(top) is None
            if expression.kind == "add" and (alone or top == number):
                stack += reversed(self.arguments(top, places))
            elif expression.kind == "segments" and alone and self._is_kept_like(top, number):
                sums.append((top, places))
            else:
                others.append((top, places))
        return (sums, others) if len(sums) > 1 else None

    def _is_kept_like(self, number: int, other: int) -> bool:
        """Whether a sum is one of values in memory, which are of the dtype of another value."""
        writer = self.writer
        source = writer.expression(number).arguments[0][0]
        return (
            writer.kept(source) is not None
            and writer.expression(source).dtype == writer.expression(other).dtype
        )


def _ranges(begins: Places, counts: Places) -> Places:
    """The numbers from each begin on, as many as its count says, one after the other."""
    ends = np.cumsum(counts)
    return np.repeat(begins - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)
