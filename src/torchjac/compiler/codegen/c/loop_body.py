"""The statements of a loop body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from torchjac.compiler.codegen.c.scalar_ops import CTYPES
from torchjac.compiler.codegen.scalar_ir import SCALAR, ArrayRef, Indices, load_of, segments_of

if TYPE_CHECKING:
    from torchjac.compiler.codegen.c.writer import Writer

_Value = tuple[int, Indices]
# Segment sums over buffers, and the other terms of the same sum.
Split = tuple[list[_Value], list[_Value]]
_SIMD_TERMS = 8  # terms of each sum: the loops of shorter sums are not vectorized


class LoopBody:
    """The values of one iteration of a loop."""

    def __init__(self, writer: Writer, size: int):
        self.writer = writer
        self._size = size
        self._names: dict[tuple[int, bytes], str] = {}
        self.lines: list[str] = []
        self.sums = 0  # inner loops

    def of(self, number: int, points: Indices) -> str:
        """The name of a value that is to be written: the value is computed here."""
        wanted = (number, points.tobytes())
        stack = [(number, points, wanted[1])]
        while stack:  # no recursion: programs may be deep
            top, indices, at = stack[-1]
            if self._known(top, at) is not None:
                stack.pop()
                continue
            buffered = None if (top, at) == wanted else self._buffered(top, indices)
            text = buffered or self._read(top, indices)
            if text is not None:
                self._name(top, at, text)
                continue
            sums = self.split_sum(top, indices)
            terms = self.arguments(top, indices) if sums is None else sums[1]
            keyed = [(a, x, x.tobytes()) for a, x in terms]
            missing = [x for x in keyed if self._known(x[0], x[2]) is None]
            if missing:
                stack += reversed(missing)
                continue
            names = [str(self._known(a, x)) for a, _, x in keyed]
            if sums is None:
                self._name(top, at, self._computed(top, names))
            else:
                self._name(top, at, " + ".join([self.merged(sums[0]), *names]))
        return str(self._known(*wanted))

    def arguments(self, number: int, points: Indices) -> list[_Value]:
        """The arguments of an expression, with their points."""
        return [
            (a, points if by is None else by.indices[points])
            for a, by in self.writer.expression(number).arguments
        ]

    def split_sum(self, number: int, points: Indices) -> Split | None:
        """Divides an expression into segment sums and other terms; None: it stays whole."""
        return None

    def _known(self, number: int, points: bytes) -> str | None:
        """The name of a value that was computed already; None for the rest."""
        if self.writer.expression(number).domain is SCALAR:
            return self.writer.scalar_name(number)
        return self._names.get((number, points))

    def _name(self, number: int, points: bytes, text: str) -> None:
        name = f"v{len(self._names)}"
        self._names[number, points] = name
        dtype = self.writer.expression(number).dtype
        self.lines.append(f"    const {CTYPES[dtype]} {name} = {text};")

    def _computed(self, number: int, names: Sequence[str]) -> str:
        """An operation as C."""
        expression = self.writer.expression(number)
        of = self.writer.expression(expression.arguments[0][0]).dtype
        return self.writer.operation(expression.kind, expression.dtype, names, of, self._size)

    def _buffered(self, number: int, points: Indices) -> str | None:
        """The text that reads a value from its buffer; None without buffer."""
        buffer = self.writer.buffer_of(number)
        return None if buffer is None else f"{buffer}[{self.writer.index(points)}]"

    def _read(self, number: int, points: Indices) -> str | None:
        """The text of a load or a segment sum; None for operations."""
        expression = self.writer.expression(number)
        if expression.kind == "load":
            return self.writer.element(*load_of(expression), points)
        return self._segments(number, points) if expression.kind == "segments" else None

    def _segments(self, number: int, points: Indices) -> str:
        """A segment sum, by an inner loop."""
        writer = self.writer
        argument, indices, starts = segments_of(writer.expression(number))
        buffer = writer.buffer_of(argument)
        source, step, start = (buffer, 1, 0) if buffer else load_of(writer.expression(argument))
        dtype = writer.expression(number).dtype
        return self.add_sum(
            source, dtype, indices * step + start, starts[points], starts[points + 1]
        )

    def merged(self, sums: list[_Value]) -> str:
        """Several segment sums as one: in an assembled matrix most of them are empty."""
        writer = self.writer
        parts = [(*segments_of(writer.expression(n)), points) for n, points in sums]
        counts = np.stack([np.diff(starts)[points] for _, _, starts, points in parts])
        ends = np.cumsum(counts.sum(0))
        # For each iteration the first merged term of each sum.
        begins = ends - counts.sum(0) + np.cumsum(counts, 0) - counts
        where = np.empty(counts.sum(), dtype=np.int64)
        for (argument, indices, starts, points), count, begin in zip(
            parts, counts, begins, strict=True
        ):
            array = writer.buffer_of(argument)
            assert array is not None
            terms = indices[_ranges(starts[points], count)]
            where[_ranges(begin, count)] = terms + writer.offset(array)
        dtype = writer.expression(sums[0][0]).dtype
        writer.statements += len(sums)
        return self.add_sum(writer.base_of(dtype), dtype, where, ends - counts.sum(0), ends)

    def add_sum(
        self, source: ArrayRef | str, dtype: str, indices: Indices, begins: Indices, ends: Indices
    ) -> str:
        """Writes a sum over parts of a list of indices; returns the name of the sum."""
        self.sums += 1
        writer = self.writer
        name, t = f"sum{len(self._names)}", CTYPES[dtype]
        writer.work += len(indices)
        if (begins[1:] == ends[:-1]).all():  # begins and ends share a table
            every = np.append(begins, ends[-1])
            begin, end = writer.index(every), writer.index(every, "(i + 1)")
        else:
            begin, end = writer.index(begins), writer.index(ends)
        self.lines.append(f"    {t} {name} = 0;")
        if len(indices) >= _SIMD_TERMS * len(begins):
            self.lines.append(f"    TORCHJAC_LOOP({name})")
        where = writer.index(indices, "k")
        self.lines.append(f"    for (int k = {begin}; k < {end}; k++) {name} += {source}[{where}];")
        return name


class MergingBody(LoopBody):
    """A loop body that merges segment sums over several buffers into one sum."""

    def split_sum(self, number: int, points: Indices) -> Split | None:
        """Divides an addition into buffered sums and other terms; None for fewer than two sums."""
        writer = self.writer
        if writer.expression(number).kind != "add":
            return None
        sums: list[_Value] = []
        terms: list[_Value] = []
        stack = [(number, points)]
        while stack:
            top, indices = stack.pop()
            expression = writer.expression(top)
            is_used_once = writer.uses[top] == 1 and writer.buffer_of(top) is None
            if expression.kind == "add" and (is_used_once or top == number):
                stack += reversed(self.arguments(top, indices))
            elif (
                expression.kind == "segments"
                and is_used_once
                and self._is_buffered_like(top, number)
            ):
                sums.append((top, indices))
            else:
                terms.append((top, indices))
        return (sums, terms) if len(sums) > 1 else None

    def _is_buffered_like(self, number: int, other: int) -> bool:
        """Whether a segment sum reads a buffer of the dtype of another expression."""
        writer = self.writer
        source = writer.expression(number).arguments[0][0]
        return (
            writer.buffer_of(source) is not None
            and writer.expression(source).dtype == writer.expression(other).dtype
        )


def _ranges(begins: Indices, counts: Indices) -> Indices:
    """Ranges of consecutive numbers, one after the other: from each begin, as many as its count."""
    ends = np.cumsum(counts)
    return np.repeat(begins - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)
