"""Products of matrices over strips of samples, as C."""

from __future__ import annotations

from dataclasses import dataclass

from torchjac.engines.kernel.scalars import CTYPES

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


def turned(array: str, strip: str, width: int) -> list[str]:
    """Statements that read a strip of an input: where there are too few samples the last again."""
    return [
        f"    for (int s = 0; s < {STRIP}; s++)",
        f"      for (long r = 0; r < {width}; r++)",
        f"        {strip}[r * {STRIP} + s] = {array}[(i + (s < n ? s : n - 1)) * {width} + r];",
    ]


def bytes_of(dtype: str) -> int:
    """Bytes of a number."""
    return 4 if dtype in ("float32", "bool") else 8


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
    """

    def __init__(self, dtype: str):
        """Begins with none."""
        self.lines: list[str] = []
        self._type = CTYPES[dtype]
        self._known: set[str] = set()

    def product(
        self, strip: Operand, other: Operand, inner: int, result: str, both: bool
    ) -> list[str]:
        """Statements that write a product.

        Args:
            strip: The operand that samples differ in.
            other: The other one.
            inner: How many numbers are multiplied and added.
            result: Where it goes.
            both: Whether samples differ in the other one too.
        """
        wide = f" * {STRIP}" if both else ""
        lines = []
        for first, last, height in _divided(strip.rows, _ROWS):
            for begin, end, width in _divided(other.rows, _COLUMNS[height]):
                name = self._tile(height, width, both)
                lines += [
                    f"    for (long c = {begin}; c < {end}; c += {width})",
                    f"      for (long r = {first}; r < {last}; r += {height})",
                    f"        {name}({strip.array} + {strip.across} * r * {STRIP}, {strip.across},"
                    f" {strip.along}, {other.array} + {other.across} * c{wide}, {other.across},"
                    f" {other.along}, {inner},"
                    f" {result} + ({strip.step} * r + {other.step} * c) * {STRIP},"
                    f" {strip.step}, {other.step});",
                ]
        return lines

    def _tile(self, rows: int, columns: int, both: bool) -> str:
        """The name of the function for one tile."""
        name = f"torchjac_{'each' if both else 'all'}_{rows}_{columns}"
        if name in self._known:
            return name
        self._known.add(name)
        t, wide = self._type, f" * {STRIP}" if both else ""
        every = [(r, c) for r in range(rows) for c in range(columns)]
        self.lines += [
            *(_FUSED if len(self._known) == 1 else ()),
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
                f" *(const torchjac_strip *)(a + ({r} * across + k * along) * {STRIP});"
            )
        for c in range(columns):
            where = f"({c} * over + k * down){wide}"
            value = f"*(const torchjac_strip *)(w + {where})" if both else f"w[{where}]"
            kind = "torchjac_strip" if both else t
            self.lines.append(f"    const {kind} w{c} = {value};")
            self.lines += [f"    c{r}_{c} += a{r} * w{c};" for r in range(rows)]
        self.lines.append("  }")
        self.lines += [
            f"  *(torchjac_strip *)(out + ({r} * row + {c} * column) * {STRIP}) = c{r}_{c};"
            for r, c in every
        ]
        self.lines.append("}")
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
