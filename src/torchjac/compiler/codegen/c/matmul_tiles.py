"""Products of matrices over strips of samples, as C."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from torchjac.compiler.codegen.c.scalar_ops import CTYPES
from torchjac.compiler.codegen.scalar_ir import ArrayRef

# What the number of samples in a strip is called.
STRIP = "TORCHJAC_STRIP"
# Bytes of a line of a cache, and of a strip of numbers at most.
_LINE = 64
# Columns of a tile, by its rows: as many sums as there are registers for.
_COLUMNS = {1: 8, 2: 8, 3: 4, 4: 4}
_ROWS = max(_COLUMNS)


def strip_bytes(width: int, dtype: str, of: str | None = None) -> int:
    """Memory for some numbers of each sample of a strip, as whole lines of a cache.

    Args:
        width: How many numbers.
        dtype: Theirs.
        of: That which strips are wide for; None for numbers that all samples share.
    """
    samples = 1 if of is None else _LINE // bytes_of(of)
    return -(-width * samples * bytes_of(dtype) // _LINE) * _LINE


def turned(array: ArrayRef, strip: str, width: int) -> list[str]:
    """Statements that read a strip of an input: where there are too few samples the last again."""
    return [
        f"    for (int s = 0; s < {STRIP}; s++)",
        f"      for (long r = 0; r < {width}; r++)",
        f"        {strip}[r * {STRIP} + s] = {array}[(i + (s < n ? s : n - 1)) * {width} + r];",
    ]


def bytes_of(dtype: str) -> int:
    """Bytes of a number."""
    return 4 if dtype in ("float32", "bool") else 8


class Factor(Enum):
    """Which numbers of the second factor a SIMD batch multiplies by.

    Attributes:
        SHARED: One number for all samples, which is broadcast.
        PER_SAMPLE: One number for each sample.
    """

    SHARED = "all"
    PER_SAMPLE = "each"


@dataclass(frozen=True, slots=True)
class Operand:
    """An operand of a product: rows of a left one, columns of a right one.

    Attributes:
        array: Where it begins, as C.
        across: From one of its rows to the next.
        along: From one number of a row to the next.
        rows: How many rows.
        step: From what one row gives to what the next one does, in the result.
    """

    array: str
    across: int
    along: int
    rows: int
    step: int


def strip_type(dtype: str) -> list[str]:
    """How many samples a strip has, and the type of one number of each."""
    t = CTYPES[dtype]
    return [
        "#if defined(__AVX512F__)",
        "#define TORCHJAC_BYTES 64",
        "#elif defined(__AVX__)",
        "#define TORCHJAC_BYTES 32",
        "#else",
        "#define TORCHJAC_BYTES 16",
        "#endif",
        f"#define {STRIP} ((int)(TORCHJAC_BYTES / sizeof({t})))",
        f"typedef {t} torchjac_strip"
        f" __attribute__((vector_size(TORCHJAC_BYTES), aligned(sizeof({t})), may_alias));",
    ]


class Tiles:
    """Functions for tiles of products, each written once.

    Args:
        dtype: Of the numbers.

    Attributes:
        lines: The functions.
        packed: Numbers that are brought to lie side by side, at most.
    """

    def __init__(self, dtype: str):
        """Begins with none."""
        self.lines: list[str] = []
        self.packed = 0
        self._type = CTYPES[dtype]
        self._bytes = bytes_of(dtype)
        self._known: set[str] = set()

    def product(
        self, strip: Operand, other: Operand, inner: int, result: str, factor: Factor
    ) -> list[str]:
        """Statements that write a product.

        Args:
            strip: The operand that samples differ in.
            other: The other one.
            inner: How many numbers are multiplied and added.
            result: Where it goes.
            factor: What samples share of the other one.
        """
        wide = f" * {STRIP}" if factor is Factor.PER_SAMPLE else ""
        lines = []
        for first, last, height in _divided(strip.rows, _ROWS):
            for begin, end, width in _divided(other.rows, _COLUMNS[height]):
                name = self._tile(height, width, factor)
                lines += [
                    f"    for (long c = {begin}; c < {end}; c += {width})",
                    f"      for (long r = {first}; r < {last}; r += {height})",
                    f"        {name}({strip.array} + {strip.across} * r * {STRIP},"
                    f" {strip.across} * {STRIP}, {strip.along} * {STRIP},"
                    f" {other.array} + {other.across} * c{wide}, {other.across}{wide},"
                    f" {other.along}{wide}, {inner},"
                    f" {result} + ({strip.step} * r + {other.step} * c) * {STRIP},"
                    f" {strip.step} * {STRIP}, {other.step} * {STRIP});",
                ]
        return lines

    def alone(self, left: Operand, right: Operand, inner: int, result: str) -> list[str]:
        """Statements that write a product of one sample, or of what has none.

        Numbers that lie side by side go through registers together: columns of the right operand,
        rows of the left one, or what is multiplied and added, which is brought to lie so.
        """
        widest = _LINE // self._bytes
        if right.across == 1 and right.rows >= widest:
            return self._along(right, left, inner, result)
        if left.across == 1 and left.rows >= widest and right.rows == 1:
            return self._along(left, right, inner, result)
        if left.across == 1 and left.rows >= widest and right.rows < inner:
            return self._turned(left, right, inner, result)
        return self._dots(left, right, inner, result)

    def _turned(self, left: Operand, right: Operand, inner: int, result: str) -> list[str]:
        """A product, rows of the left operand together: its columns are made first, then turned."""
        size = left.rows
        self.packed = max(self.packed, size * right.rows)
        strip = replace(left, step=1)
        return [
            *self._along(strip, replace(right, step=size), inner, "packed"),
            f"    for (long a = 0; a < {size}; a++)",
            f"      for (long b = 0; b < {right.rows}; b++)",
            f"        ({result})[{left.step} * a + {right.step} * b] = packed[{size} * b + a];",
        ]

    def _along(self, strip: Operand, other: Operand, inner: int, result: str) -> list[str]:
        """A product, neighbours of one operand together; the last few of them again."""
        lines = ["    {", "      long q = 0;"]
        for height in (_ROWS, 1):
            chunk = f"{height} * {STRIP}" if height > 1 else STRIP
            if height > 1:
                lines.append(f"      for (; q + {chunk} <= {strip.rows}; q += {chunk})")
            else:
                lines.append(f"      for (; q < {strip.rows}; q += {chunk})")
            lines.append("      {")
            lines.append(
                f"        const long f = q + {STRIP} <= {strip.rows} ? q : {strip.rows} - {STRIP};"
            )
            for begin, end, width in _divided(other.rows, _COLUMNS[height]):
                name = self._tile(height, width, Factor.SHARED)
                lines += [
                    f"        for (long c = {begin}; c < {end}; c += {width})",
                    f"          {name}({strip.array} + f, {STRIP}, {strip.along},"
                    f" {other.array} + {other.across} * c, {other.across}, {other.along}, {inner},"
                    f" {result} + {strip.step} * f + {other.step} * c, {STRIP}, {other.step});",
                ]
            lines.append("      }")
        return [*lines, "    }"]

    def _dots(self, left: Operand, right: Operand, inner: int, result: str) -> list[str]:
        """A product whose sums are over neighbours."""
        t = self._type
        lines, given, room = ["    {"], [], 0
        for label, x in (("a", left), ("b", right)):
            if x.along == 1 or inner == 1:
                given.append(f"{x.array} + {x.across} * {label}")
                continue
            lines += [
                f"      {t} *const packed_{label} = packed + {room};",
                f"      for (long r = 0; r < {x.rows}; r++)",
                f"        for (long k = 0; k < {inner}; k++)",
                f"          packed_{label}[r * {inner} + k] ="
                f" ({x.array})[{x.across} * r + {x.along} * k];",
            ]
            given.append(f"packed_{label} + {inner} * {label}")
            room += x.rows * inner
        over = right.across if right.along == 1 or inner == 1 else inner
        self.packed = max(self.packed, room)
        for begin, end, width in _divided(right.rows, _ROWS):
            lines += [
                f"      for (long a = 0; a < {left.rows}; a++)",
                f"        for (long b = {begin}; b < {end}; b += {width})",
                f"          {self._dot(width)}({given[0]}, {given[1]}, {over}, {inner},"
                f" {result} + {left.step} * a + {right.step} * b, {right.step});",
            ]
        return [*lines, "    }"]

    def _dot(self, rows: int) -> str:
        """The name of the function for sums over neighbours, of one row with several."""
        name = f"torchjac_dot_{rows}"
        if name in self._known:
            return name
        self._begin(name)
        t, every = self._type, range(rows)
        self.lines += [
            f"TORCHJAC_FUSED static void {name}(const {t} *a, const {t} *b, long over, long inner,",
            f"    {t} *out, long column)",
            "{",
            *_FUSED_HERE,
            f"  torchjac_strip {', '.join(f'c{r} = {{0}}' for r in every)};",
            "  long k = 0;",
            f"  for (; k + {STRIP} <= inner; k += {STRIP}) {{",
            "    const torchjac_strip x = *(const torchjac_strip *)(a + k);",
            *[f"    c{r} += x * *(const torchjac_strip *)(b + {r} * over + k);" for r in every],
            "  }",
            f"  {t} {', '.join(f's{r} = 0' for r in every)};",
            f"  for (int s = 0; s < {STRIP}; s++) {{",
            *[f"    s{r} += c{r}[s];" for r in every],
            "  }",
            "  for (; k < inner; k++) {",
            *[f"    s{r} += a[k] * b[{r} * over + k];" for r in every],
            "  }",
            *[f"  out[{r} * column] = s{r};" for r in every],
            "  (void)over; (void)column;",
            "}",
        ]
        return name

    def _begin(self, name: str) -> None:
        """Notes a function; before the first one comes what all of them need."""
        self.lines += () if self._known else _FUSED
        self._known.add(name)

    def _tile(self, rows: int, columns: int, factor: Factor) -> str:
        """The name of the function for one tile; distances are in numbers."""
        name = f"torchjac_{factor.value}_{rows}_{columns}"
        if name in self._known:
            return name
        self._begin(name)
        t = self._type
        every = [(r, c) for r in range(rows) for c in range(columns)]
        self.lines += [
            f"TORCHJAC_FUSED static void {name}(const {t} *a, long across, long along,",
            f"    const {t} *w, long over, long down, long inner, {t} *out, long row, long column)",
            "{",
            *_FUSED_HERE,
            f"  torchjac_strip {', '.join(f'c{r}_{c} = {{0}}' for r, c in every)};",
            "  for (long k = 0; k < inner; k++) {",
        ]
        for r in range(rows):
            self.lines.append(
                f"    const torchjac_strip a{r} ="
                f" *(const torchjac_strip *)(a + {r} * across + k * along);"
            )
        for c in range(columns):
            where = f"{c} * over + k * down"
            if factor is Factor.PER_SAMPLE:
                kind, value = "torchjac_strip", f"*(const torchjac_strip *)(w + {where})"
            else:
                kind, value = t, f"w[{where}]"
            self.lines.append(f"    const {kind} w{c} = {value};")
            self.lines += [f"    c{r}_{c} += a{r} * w{c};" for r in range(rows)]
        self.lines.append("  }")
        self.lines += [
            f"  *(torchjac_strip *)(out + {r} * row + {c} * column) = c{r}_{c};" for r, c in every
        ]
        self.lines += ["  (void)across; (void)over; (void)row; (void)column;", "}"]
        return name


def _divided(size: int, most: int) -> list[tuple[int, int, int]]:
    """Parts of the largest size, and what is left: where it begins, where it ends, its size."""
    whole = size - size % most
    parts = [(0, whole, most), (whole, size, size - whole)]
    return [part for part in parts if part[0] < part[1]]


# Products of matrices are rounded once with each sum, as everywhere.
_FUSED = (
    "#if defined(__GNUC__) && !defined(__clang__)",
    '#define TORCHJAC_FUSED __attribute__((noinline, optimize("fp-contract=fast")))',
    "#else",
    "#define TORCHJAC_FUSED",
    "#endif",
)
_FUSED_HERE = (
    "#if defined(__clang__)",
    "#pragma STDC FP_CONTRACT ON",
    "#endif",
)
