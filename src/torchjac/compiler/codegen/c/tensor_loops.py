"""What is made alike as loops over arrays in memory, products of matrices whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from torchjac.compiler.codegen.batch_layout import Home, Matrix, Strips
from torchjac.compiler.codegen.c.matmul_tiles import (
    STRIP,
    Factor,
    Operand,
    Tiles,
    bytes_of,
    strip_bytes,
    strip_type,
    turned,
)
from torchjac.compiler.codegen.c.scalar_ops import CTYPES
from torchjac.compiler.codegen.c.writer import Writer
from torchjac.compiler.codegen.granularity import ScalarProgram
from torchjac.compiler.codegen.scalar_ir import ONE, Map, Places, loaded
from torchjac.compiler.codegen.scalar_order import needed
from torchjac.compiler.codegen.schedule import LoopProgram
from torchjac.errors import PlanRefused

# Bytes of memory to work in, at most.
_MEMORY = 1 << 20
# Seconds that a product takes, for each byte of a number: several go through registers together.
_BYTE = 0.0045e-9
# What is computed in one loop: for which places in a sample, and the expressions.
Group = tuple[Home | None, list[int]]
_SAMPLES = f"    for (int s = 0; s < {STRIP}; s++)"


class GroupWriter(Writer):
    """Writes a loop for each group of expressions that are made alike.

    Args:
        scalars: The expressions.
        plan: What is written to outputs.
        count: How many samples they are for; 1 of what has none.
    """

    def __init__(self, scalars: ScalarProgram, plan: LoopProgram, count: int = 1):
        """Looks at what belongs to one sample."""
        super().__init__(scalars, plan)
        self._numbers = needed(self._all, self._wanted)
        self._count = count
        self._strips = Strips(self._all, self._numbers, count, scalars.sampled)
        dtypes = {self._all[n].dtype for n in self._numbers}
        if {"float64", "float32"} <= dtypes:
            raise PlanRefused("numbers of several dtypes")
        self.dtype = "float64" if "float64" in dtypes else "float32"
        self._stored = self._strips.stored | {
            n for n in self._wanted if self._all[n].lanes is not ONE and not self._is_read(n)
        }
        self.product = _BYTE * bytes_of(self.dtype)
        self._tiles = Tiles(self.dtype)
        self._places: dict[int, int] = {}

    def helpers(self) -> list[str]:
        """The width of a strip, and products."""
        return [*strip_type(self.dtype), *self._tiles.lines]

    def memory(self) -> list[str]:
        """Where values are kept."""
        kept = [(f"x{n}", self._all[n].dtype, place) for n, place in self._places.items()]
        if self._tiles.packed:
            kept.append(("packed", self.dtype, self.scratch))
            self.scratch += strip_bytes(self._tiles.packed, self.dtype)
        return [
            f"  {CTYPES[dtype]} *const {name} = (void *)((char *)scratch + {place});"
            for name, dtype, place in kept
        ]

    def _is_read(self, number: int) -> bool:
        """Whether it is read from an array that is there already."""
        return self._all[number].kind == "load" and self._strips.homes[number] is None

    def _groups(self) -> list[Group]:
        """What is computed in one loop: at the same level, for the same places in a sample."""
        found: dict[tuple[int, int, int, int], list[int]] = {}
        for number in self._numbers:
            expression, home = self._all[number], self._strips.homes[number]
            if expression.kind == "constant" or expression.lanes is ONE or self._is_read(number):
                continue
            alone = number if expression.kind in ("product", "segments", "load") else -1
            key = (self._strips.levels[number], id(expression.lanes), id(home), alone)
            found.setdefault(key, []).append(number)
        order = sorted(found, key=lambda key: (key[0], found[key][0]))
        groups = [(self._strips.homes[found[key][0]], found[key]) for key in order]
        # What all samples share is computed before the loop over them.
        return sorted(groups, key=lambda group: group[0] is not None)

    def _allot(self, groups: Sequence[Group]) -> None:
        """Finds memory for what is stored; what is not read any more makes room.

        Raises:
            PlanRefused: It takes more than there is in a near cache.
        """
        turn = {n: k for k, (_, numbers) in enumerate(groups) for n in numbers}
        last = dict.fromkeys(self._wanted, len(groups))
        for number in self._numbers:
            for argument, _ in self._all[number].arguments:
                last[argument] = max(last.get(argument, 0), turn.get(number, 0))
        free: list[tuple[int, int]] = []  # where, and how many bytes
        ends: defaultdict[int, list[int]] = defaultdict(list)
        for k, (home, numbers) in enumerate(groups):
            for number in self._stored.intersection(numbers):
                self._places[number] = self._room(self._bytes(number), free)
                if home is not None:  # others are read for every strip
                    ends[last[number]].append(number)
            free += [(self._places[number], self._bytes(number)) for number in ends.pop(k, ())]
        if self.scratch > _MEMORY:
            raise PlanRefused(f"{self.scratch} bytes of values for a strip of samples")

    def _room(self, size: int, free: list[tuple[int, int]]) -> int:
        for k, (place, room) in enumerate(free):
            if room >= size:
                del free[k]
                if room > size:
                    free.append((place + size, room - size))
                return place
        place = self.scratch
        self.scratch += size
        return place

    def _bytes(self, number: int) -> int:
        """Memory for a value, as whole lines of a cache."""
        expression, home = self._all[number], self._strips.homes[number]
        if home is None:
            return strip_bytes(expression.lanes.size, expression.dtype)
        return strip_bytes(home.width, expression.dtype, self.dtype)

    def _written(self, numbers: Sequence[int], home: Home | None) -> list[str]:
        """One loop."""
        self.loops += 1
        kind = self._all[numbers[0]].kind
        if kind == "load":
            assert home is not None
            return turned(loaded(self._all[numbers[0]])[0], f"x{numbers[0]}", home.width)
        if kind == "product":
            return self._product(numbers[0], home)
        if kind == "segments":
            return self._sum(numbers[0], home)
        size = self._all[numbers[0]].lanes.size if home is None else home.width
        names: dict[int, str] = {}
        inner = []
        for number in numbers:
            expression = self._all[number]
            given = [self._taken(a, by, home, names) for a, by in expression.arguments]
            of = self._all[expression.arguments[0][0]].dtype
            turns = size if home is None else size * self._count
            text = self.operation(expression.kind, expression.dtype, given, of, turns)
            names[number] = f"v{number}"
            inner.append(f"      const {CTYPES[expression.dtype]} v{number} = {text};")
            if number in self._stored:
                inner.append(f"      x{number}[{_at('r', home)}] = v{number};")
        head = f"    for (long r = 0; r < {size}; r++)"
        if home is None:
            return ["  TORCHJAC_SPAN", f"  {head.lstrip()} {{", *inner, "  }"]
        return [f"{head} {{", "    TORCHJAC_SPAN", f"{_SAMPLES} {{", *inner, "    }", "    }"]

    def _taken(self, number: int, by: Map | None, home: Home | None, names: dict[int, str]) -> str:
        """A value that an expression takes."""
        expression = self._all[number]
        if expression.kind == "constant" or expression.lanes is ONE:
            return self.alone(number)
        if by is None and number in names:
            return names[number]
        places = self._strips.lanes(number, by, home)
        return self._element(number, places, "r")

    def _element(self, number: int, places: Places | None, turn: str) -> str:
        """A value from memory."""
        expression = self._all[number]
        if self._is_read(number):
            array, step, start = loaded(expression)
            every = np.arange(expression.lanes.size) if places is None else places
            return f"{array}[{self.index(every * step + start, turn)}]"
        where = turn if places is None else self.index(places, turn)
        return f"x{number}[{_at(where, self._strips.homes[number])}]"

    def _sum(self, number: int, home: Home | None) -> list[str]:
        """Sums over lanes."""
        expression = self._all[number]
        argument = expression.arguments[0][0]
        places, begins = self._strips.terms(number)
        t, size = CTYPES[expression.dtype], len(begins) - 1
        self.work += len(places) * (1 if home is None else self._count)
        self.statements += 2
        value = self._element(argument, places, "k")
        begin, end = self.index(begins, "r"), self.index(begins, "(r + 1)")
        head = f"    for (long r = 0; r < {size}; r++) {{"
        inner = f"      for (long k = {begin}; k < {end}; k++)"
        if home is None:
            return [
                head,
                f"      {t} sum = 0;",
                f"{inner} sum += {value};",
                f"      x{number}[r] = sum;",
                "    }",
            ]
        return [
            head,
            f"      {t} sum[{STRIP}] = {{0}};",
            f"{inner} {{",
            "      TORCHJAC_SPAN",
            f"  {_SAMPLES} sum[s] += {value};",
            "      }",
            "      TORCHJAC_SPAN",
            f"  {_SAMPLES} x{number}[{_at('r', home)}] = sum[s];",
            "    }",
        ]

    def _product(self, number: int, home: Home | None) -> list[str]:
        """Products of matrices: samples along the registers, of one operand or both; or columns."""
        found = self._strips.products[number]
        (left, _), (right, _) = self._all[number].arguments
        matrices, rows, inner, columns = found.sizes
        sampled = [self._strips.homes[x] is not None for x in (left, right)]
        of_left = (left, found.left, rows, columns)
        of_right = (right, found.right, columns, 1)
        of_strip, other = (of_left, of_right) if sampled[0] else (of_right, of_left)
        self.work += self._count * matrices * rows * inner * columns
        self.statements += 1
        lines = []
        for k in range(matrices):
            start = k * rows * columns
            if home is None:
                operands = self._operand(*of_left, k), self._operand(*of_right, k)
                lines += self._tiles.alone(*operands, inner, f"x{number} + {start}")
            else:
                lines += self._tiles.product(
                    self._operand(*of_strip, k),
                    self._operand(*other, k),
                    inner,
                    f"x{number} + {start} * {STRIP}",
                    Factor.PER_SAMPLE if all(sampled) else Factor.SHARED,
                )
        return lines

    def _operand(self, number: int, matrix: Matrix, size: int, step: int, k: int) -> Operand:
        """An operand of the k-th product."""
        start, across, along = matrix.start[k], matrix.across, matrix.along
        if self._is_read(number):
            array, factor, begin = loaded(self._all[number])
            begins = f"{array} + {begin + factor * start}"
            return Operand(begins, factor * across, factor * along, size, step)
        strip = "" if self._strips.homes[number] is None else f" * {STRIP}"
        return Operand(f"x{number} + {start}{strip}", across, along, size, step)


def _at(where: str, home: Home | None) -> str:
    """A place in memory."""
    return where if home is None else f"({where}) * {STRIP} + s"
