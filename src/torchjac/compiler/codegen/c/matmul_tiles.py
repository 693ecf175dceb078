"""Matrix products as C: tiles whose SIMD registers hold samples, rows or columns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from torchjac.compiler.codegen.c.scalar_ops import CTYPES
from torchjac.compiler.codegen.scalar_ir import ArrayRef

# The macro for the number of samples in a SIMD batch.
SIMD = "TORCHJAC_STRIP"
_LINE = 64  # bytes of a cache line, and of a SIMD batch of numbers at most
# Columns of a tile, by its rows: the sums fill the registers.
_COLUMNS = {1: 8, 2: 8, 3: 4, 4: 4}
_ROWS = max(_COLUMNS)


def simd_bytes(width: int, dtype: str, of: str | None = None) -> int:
    """Memory for numbers of each sample of a SIMD batch, as whole cache lines.

    Args:
        width: The numbers of each sample.
        dtype: The dtype of the numbers.
        of: The dtype that determines the size of a SIMD batch; None for numbers that samples share.
    """
    samples = 1 if of is None else _LINE // dtype_bytes(of)
    return -(-width * samples * dtype_bytes(dtype) // _LINE) * _LINE


def read_batch(array: ArrayRef, batch: str, width: int) -> list[str]:
    """Statements that transpose a batch of an input; an incomplete batch repeats a sample."""
    return [
        f"    for (int s = 0; s < {SIMD}; s++)",
        f"      for (long r = 0; r < {width}; r++)",
        f"        {batch}[r * {SIMD} + s] = {array}[(i + (s < n ? s : n - 1)) * {width} + r];",
    ]


def dtype_bytes(dtype: str) -> int:
    """Bytes of a number."""
    return 4 if dtype in ("float32", "bool") else 8


class Factor(Enum):
    """The numbers of the second factor of a SIMD batch.

    Attributes:
        SHARED: One number for all samples, which is broadcast.
        PER_SAMPLE: One number for each sample.
    """

    SHARED = "all"
    PER_SAMPLE = "each"


@dataclass(frozen=True, slots=True)
class Operand:
    """A factor of a product: the rows of a left factor, or the columns of a right factor.

    Attributes:
        array: The address of the first number, as C.
        across: The distance between rows.
        along: The distance between numbers of a row.
        rows: The number of rows.
        step: The distance between results of consecutive rows.
    """

    array: str
    across: int
    along: int
    rows: int
    step: int


def simd_type(dtype: str) -> list[str]:
    """The number of samples of a SIMD batch, and the type of one number of each sample."""
    t = CTYPES[dtype]
    return [
        "#if defined(__AVX512F__)",
        "#define TORCHJAC_BYTES 64",
        "#elif defined(__AVX__)",
        "#define TORCHJAC_BYTES 32",
        "#else",
        "#define TORCHJAC_BYTES 16",
        "#endif",
        f"#define {SIMD} ((int)(TORCHJAC_BYTES / sizeof({t})))",
        f"typedef {t} torchjac_strip"
        f" __attribute__((vector_size(TORCHJAC_BYTES), aligned(sizeof({t})), may_alias));",
    ]


class MatmulTiles:
    """Functions for tiles of products, each written once.

    Args:
        dtype: The dtype of the numbers.

    Attributes:
        lines: The functions.
        packed: The size of the packing buffer, in numbers.
    """

    def __init__(self, dtype: str):
        """Begins with no functions."""
        self.lines: list[str] = []
        self.packed = 0
        self._type = CTYPES[dtype]
        self._bytes = dtype_bytes(dtype)
        self._known: set[str] = set()

    def batched(
        self, batch: Operand, other: Operand, inner: int, result: str, factor: Factor
    ) -> list[str]:
        """Statements of a product over a SIMD batch.

        Args:
            batch: The factor that differs between samples.
            other: The other factor.
            inner: The length of the contracted axis.
            result: The address of the result, as C.
            factor: The numbers of the other factor.
        """
        wide = f" * {SIMD}" if factor is Factor.PER_SAMPLE else ""
        lines = []
        for first, last, height in _split(batch.rows, _ROWS):
            for begin, end, width in _split(other.rows, _COLUMNS[height]):
                name = self._tile(height, width, factor)
                lines += [
                    f"    for (long c = {begin}; c < {end}; c += {width})",
                    f"      for (long r = {first}; r < {last}; r += {height})",
                    f"        {name}({batch.array} + {batch.across} * r * {SIMD},"
                    f" {batch.across} * {SIMD}, {batch.along} * {SIMD},"
                    f" {other.array} + {other.across} * c{wide}, {other.across}{wide},"
                    f" {other.along}{wide}, {inner},"
                    f" {result} + ({batch.step} * r + {other.step} * c) * {SIMD},"
                    f" {batch.step} * {SIMD}, {other.step} * {SIMD});",
                ]
        return lines

    def unbatched(self, left: Operand, right: Operand, inner: int, result: str) -> list[str]:
        """Statements of a product without samples.

        SIMD registers hold contiguous numbers: columns of the right factor, rows of the left
        factor, or the contracted axis, which is packed to be contiguous.
        """
        widest = _LINE // self._bytes
        if right.across == 1 and right.rows >= widest:
            return self._vectorized(right, left, inner, result)
        if left.across == 1 and left.rows >= widest and right.rows == 1:
            return self._vectorized(left, right, inner, result)
        if left.across == 1 and left.rows >= widest and right.rows < inner:
            return self._transposed(left, right, inner, result)
        return self._dots(left, right, inner, result)

    def _transposed(self, left: Operand, right: Operand, inner: int, result: str) -> list[str]:
        """A product with SIMD over rows of the left factor, whose result is transposed back."""
        size = left.rows
        self.packed = max(self.packed, size * right.rows)
        batch = replace(left, step=1)
        return [
            *self._vectorized(batch, replace(right, step=size), inner, "packed"),
            f"    for (long a = 0; a < {size}; a++)",
            f"      for (long b = 0; b < {right.rows}; b++)",
            f"        ({result})[{left.step} * a + {right.step} * b] = packed[{size} * b + a];",
        ]

    def _vectorized(self, batch: Operand, other: Operand, inner: int, result: str) -> list[str]:
        """A product with SIMD over contiguous rows of a factor; the last register overlaps."""
        lines = ["    {", "      long q = 0;"]
        for height in (_ROWS, 1):
            chunk = f"{height} * {SIMD}" if height > 1 else SIMD
            if height > 1:
                lines.append(f"      for (; q + {chunk} <= {batch.rows}; q += {chunk})")
            else:
                lines.append(f"      for (; q < {batch.rows}; q += {chunk})")
            lines.append("      {")
            lines.append(
                f"        const long f = q + {SIMD} <= {batch.rows} ? q : {batch.rows} - {SIMD};"
            )
            for begin, end, width in _split(other.rows, _COLUMNS[height]):
                name = self._tile(height, width, Factor.SHARED)
                lines += [
                    f"        for (long c = {begin}; c < {end}; c += {width})",
                    f"          {name}({batch.array} + f, {SIMD}, {batch.along},"
                    f" {other.array} + {other.across} * c, {other.across}, {other.along}, {inner},"
                    f" {result} + {batch.step} * f + {other.step} * c, {SIMD}, {other.step});",
                ]
            lines.append("      }")
        return [*lines, "    }"]

    def _dots(self, left: Operand, right: Operand, inner: int, result: str) -> list[str]:
        """A product with SIMD over the contracted axis."""
        t = self._type
        lines, pointers, room = ["    {"], [], 0
        for label, x in (("a", left), ("b", right)):
            if x.along == 1 or inner == 1:
                pointers.append(f"{x.array} + {x.across} * {label}")
                continue
            lines += [
                f"      {t} *const packed_{label} = packed + {room};",
                f"      for (long r = 0; r < {x.rows}; r++)",
                f"        for (long k = 0; k < {inner}; k++)",
                f"          packed_{label}[r * {inner} + k] ="
                f" ({x.array})[{x.across} * r + {x.along} * k];",
            ]
            pointers.append(f"packed_{label} + {inner} * {label}")
            room += x.rows * inner
        over = right.across if right.along == 1 or inner == 1 else inner
        self.packed = max(self.packed, room)
        for begin, end, width in _split(right.rows, _ROWS):
            lines += [
                f"      for (long a = 0; a < {left.rows}; a++)",
                f"        for (long b = {begin}; b < {end}; b += {width})",
                f"          {self._dot(width)}({pointers[0]}, {pointers[1]}, {over}, {inner},"
                f" {result} + {left.step} * a + {right.step} * b, {right.step});",
            ]
        return [*lines, "    }"]

    def _dot(self, rows: int) -> str:
        """The name of the function for inner products of one row with several rows."""
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
            f"  for (; k + {SIMD} <= inner; k += {SIMD}) {{",
            "    const torchjac_strip x = *(const torchjac_strip *)(a + k);",
            *[f"    c{r} += x * *(const torchjac_strip *)(b + {r} * over + k);" for r in every],
            "  }",
            f"  {t} {', '.join(f's{r} = 0' for r in every)};",
            f"  for (int s = 0; s < {SIMD}; s++) {{",
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
        """Registers a function; the first function defines the macros."""
        self.lines += () if self._known else _FUSED
        self._known.add(name)

    def _tile(self, rows: int, columns: int, factor: Factor) -> str:
        """The name of the function of a tile; distances are in numbers."""
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


def _split(size: int, most: int) -> list[tuple[int, int, int]]:
    """Parts of the largest size, and the rest: begin, end and size of each."""
    whole = size - size % most
    parts = [(0, whole, most), (whole, size, size - whole)]
    return [part for part in parts if part[0] < part[1]]


# Matrix products round once for each fused multiply-add, as in BLAS.
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
