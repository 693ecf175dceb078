"""Loop programs as C text."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from torchjac.compiler.codegen.c.loop_body import MergingBody
from torchjac.compiler.codegen.c.matmul_tiles import dtype_bytes
from torchjac.compiler.codegen.c.scalar_ops import CTYPES, OWN_FUNCTIONS, VECTORIZED, C, literal
from torchjac.compiler.codegen.granularity import ScalarProgram
from torchjac.compiler.codegen.scalar_ir import ArrayRef, Expression, Indices, constant_of, load_of
from torchjac.compiler.codegen.scalar_ops import COSTS
from torchjac.compiler.codegen.scalar_order import CallGroup, call_groups, reachable
from torchjac.compiler.codegen.schedule import Loop, LoopProgram
from torchjac.compiler.codegen.target import Signature, Source
from torchjac.host.costs import ScalarWork

_LONG = 6000  # statements of a function with loops: from here on level 1, not 2; of a loop: no SIMD
_STRAIGHT = 1000  # statements of a function without loops: from here on level 1, not 2
_LOOPS = 100  # loops of a function: from here on level 1, not 2
_LITERAL_VALUES = 64  # fixed values of an output: up to as many are literals
_SIMD_ITERATIONS = 8  # iterations: shorter loops are not vectorized


@dataclass(frozen=True, slots=True)
class CSource(Source):
    """A program in C.

    Attributes:
        text: The function and its helpers.
        names: The names of the tables in the text.
        level: The optimization level.
    """

    text: str
    names: tuple[str, ...]
    level: int


def render_source(
    scalars: ScalarProgram,
    program: LoopProgram,
    signature: Signature,
    writing: type[Writer],
) -> CSource:
    """Renders a program as a C function that returns whether the sum of all results is finite.

    The sum of finite results may overflow: testing each result here would make compilers keep all.

    Args:
        scalars: The expressions.
        program: The loops.
        signature: The arguments of the function.
        writing: The writer of the loops.
    """
    writer = writing(scalars, program)
    inputs, outputs = signature.inputs, signature.outputs
    body = [*writer.fixed(outputs), *writer.body()]
    lines = [_PROLOGUE]
    used = writer.called & VECTORIZED
    if used:
        lines.append("#ifdef TORCHJAC_SIMD")
        for function in sorted(used):
            for t, f in (("double", ""), ("float", "f")):
                two = f", {t}" if function in ("pow", "atan2", "hypot") else ""
                lines.append(f"TORCHJAC_SIMD {t} {function}{f}({t}{two});")
        lines.append("#endif")
    lines += [text for own, text in OWN_FUNCTIONS.items() if any(own in line for line in body)]
    lines += writer.helpers()
    lines.append(
        f"int {signature.name}(const void *const *in, const void *const *table, void *const *out,"
        f" void *scratch{writer.parameters})\n{{"
    )
    for i, array, dtype in inputs:
        lines.append(f"  const {CTYPES[dtype]} *const {array} = in[{i}]; (void){array};")
    for i, table in enumerate(writer.tables):
        t = _TABLE_TYPES[table.dtype.name]
        lines.append(f"  const {t} *const {writer.names[i]} = table[{i}];")
    for i, (dtype, _) in enumerate(outputs):
        out = ArrayRef("out", i)
        lines.append(f"  {CTYPES[dtype]} *restrict const {out} = out[{i}]; (void){out};")
    lines += writer.memory()
    lines += ["  (void)in; (void)table; (void)out; (void)scratch;", "  double bad = 0;"]
    lines += body
    lines += ["  return bad - bad == 0;", "}", ""]
    return CSource(
        tables=tuple(writer.tables),
        scratch=writer.scratch,
        statements=writer.statements,
        work=ScalarWork(writer.work, sum(t.nbytes for t in writer.tables), writer.tile_bytes),
        text="\n".join(lines),
        names=tuple(map(str, writer.names)),
        level=_level(writer),
    )


def _level(writer: Writer) -> int:
    """The optimization level."""
    long = writer.statements > (_LONG if writer.loops else _STRAIGHT)
    return 1 if long or writer.loops > _LOOPS else 2


_TABLE_TYPES = {"int32": "int", "int64": "long long", "float64": "double", "float32": "float"}
_PROLOGUE = """\
#include <math.h>
#include <string.h>
#if defined(__GNUC__) && defined(__x86_64__) && defined(__GLIBC__)
#if __GLIBC_PREREQ(2, 35) && !defined(TORCHJAC_PLAIN)
#define TORCHJAC_SIMD __attribute__((simd("notinbranch"), const))
#endif
#endif
/* What cancels exactly must not leave what a product was rounded by. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif
#define TORCHJAC_TEXT(x) #x
#if defined(_OPENMP) || defined(TORCHJAC_LOOPS)
#define TORCHJAC_LOOP(sum) _Pragma(TORCHJAC_TEXT(omp simd reduction(+ : sum)))
#define TORCHJAC_SPAN _Pragma("omp simd")
#else
#define TORCHJAC_LOOP(sum)
#define TORCHJAC_SPAN
#endif
"""


class Writer:
    """Writes statements: each value once in each loop.

    Attributes:
        parameters: The function's parameters after its arrays, each after a comma.
        tables: The constant arrays.
        names: The names of the tables.
        called: The functions of the math library.
        statements: The number of scalar statements so far.
        work: The work so far, in scalar products.
        tile_bytes: Bytes of a number whose products share registers; 0 for single products.
        loops: The number of loops so far.
        uses: The number of expressions and stores that read each expression.
        scratch: The size of the buffers, in bytes.
    """

    parameters = ""
    tile_bytes = 0

    def __init__(self, scalars: ScalarProgram, program: LoopProgram):
        """Begins with no statements."""
        self._all = scalars.expressions.all
        self._scalars = scalars
        self._program = program
        self.tables: list[np.ndarray] = []
        self.names: list[ArrayRef] = []
        self.called: set[str] = set()
        self.statements = 0
        self.work = 0
        self.loops = 0
        self._table_of: dict[bytes, ArrayRef] = {}
        self._scalar_names: dict[int, str] = {}
        self._lines: list[str] = []
        self._wanted = [s.expression for loop in program.loops for s in loop.stores]
        self._wanted += [number for number, _, _ in program.scalar_stores]
        self.uses = self._count_uses()
        self.scratch = 0
        self._offsets: dict[ArrayRef, int] = {}
        for number, (array, size) in program.buffers.items():
            self._offsets[array] = self.scratch
            self.scratch += -(-size * dtype_bytes(self._all[number].dtype) // 64) * 64
        self._joined: set[ArrayRef] = set()
        for array, tensor in scalars.tables.items():
            flat = tensor.reshape(-1).numpy()
            self.tables.append(flat.astype(np.int32) if flat.dtype == bool else flat)
            self.names.append(array)

    def fixed(self, outputs: Sequence[tuple[str, int]]) -> list[str]:
        """Statements that write the fixed values of outputs, and zeros elsewhere."""
        lines = []
        for i, (dtype, size) in enumerate(outputs):
            positions, values = self._program.fixed[i]
            out, fixed = ArrayRef("out", i), ArrayRef("fixed", i)
            if not len(positions):
                continue
            lines.append(f"  memset({out}, 0, {size} * sizeof(*{out}));")
            if not values.any():
                continue
            if len(positions) <= _LITERAL_VALUES:
                pairs = zip(positions.tolist(), values.tolist(), strict=True)
                lines += [f"  {out}[{p}] = {literal(v, dtype)};" for p, v in pairs if v]
                continue
            template = np.zeros(size, dtype=dtype)
            template[positions] = values
            self.names.append(fixed)
            self.tables.append(template)
            lines[-1] = f"  memcpy({out}, {fixed}, {size} * sizeof(*{out}));"
        return lines

    def helpers(self) -> list[str]:
        """Functions that the statements call."""
        return []

    def body(self) -> list[str]:
        """The statements."""
        self._scalar_statements()
        for loop in self._program.loops:
            self._lines += self._loop(loop)
        return self._lines

    def _scalar_statements(self) -> None:
        """Writes all scalar statements."""
        stores: defaultdict[int, list[str]] = defaultdict(list)
        for number, array, positions in self._program.scalar_stores:
            stores[number] += [f"{array}[{p}]" for p in positions.tolist()]
        for group in call_groups(self._all, reachable(self._all, self._wanted), VECTORIZED):
            if len(group) > 1:
                self._call_statement(group)
            for number in group:
                if number not in self._scalar_names:
                    self._scalar_statement(number)
                name = self._scalar_names[number]
                if number in stores:
                    self._lines.append(f"  bad += {name};")
                self._lines += [self.stored(place, name) for place in stores[number]]
                self.statements += len(stores[number])

    def stored(self, place: str, name: str) -> str:
        """A statement that writes a scalar."""
        return f"  {place} = {name};"

    def head(self, loop: Loop, vector: str) -> list[str]:
        """The head of a loop."""
        return [vector, f"  for (int i = 0; i < {loop.size}; i++) {{"]

    def scalar_name(self, number: int) -> str:
        """The name of a scalar, which is computed before all loops."""
        return self._scalar_names[number]

    def _scalar_statement(self, number: int) -> None:
        """Writes one scalar, after its arguments."""
        expression = self._all[number]
        if expression.kind == "constant":
            self._scalar_names[number] = literal(constant_of(expression), expression.dtype)
            return
        if expression.kind == "load":
            array, _, start = load_of(expression)
            text = f"{array}[{start}]"
        else:
            text = self._operation(expression)
        self._scalar_names[number] = f"s{number}"
        self._lines.append(f"  const {CTYPES[expression.dtype]} s{number} = {text};")

    def _operation(self, expression: Expression) -> str:
        names = [self._scalar_names[a] for a, _ in expression.arguments]
        of = self._all[expression.arguments[0][0]].dtype
        return self.operation(expression.kind, expression.dtype, names, of, 1)

    def _call_statement(self, group: CallGroup) -> None:
        """Writes a call group: one SIMD call, if the library has the function."""
        first = self._all[group[0]]
        t, size, name = CTYPES[first.dtype], len(group), f"g{group[0]}"
        arguments = [[self._scalar_names[a] for a, _ in self._all[n].arguments] for n in group]
        operands = [f"{name}_{k}" for k in range(len(first.arguments))]
        text = C[first.kind].format(
            *[f"{x}[i]" for x in operands], f="f" if first.dtype == "float32" else "", t=t
        )
        self._lines.append("#ifdef TORCHJAC_SIMD")
        for x, values in zip(operands, zip(*arguments, strict=True), strict=True):
            self._lines.append(f"  const {t} {x}[] = {{{', '.join(values)}}};")
        self._lines += [
            f"  {t} {name}[{size}];",
            "  TORCHJAC_SPAN",
            f"  for (int i = 0; i < {size}; i++) {name}[i] = {text};",
            *[f"  const {t} s{n} = {name}[{k}];" for k, n in enumerate(group)],
            "#else",
            *[f"  const {t} s{n} = {self._operation(self._all[n])};" for n in group],
            "#endif",
        ]
        self._scalar_names.update({n: f"s{n}" for n in group})

    def operation(
        self, kind: str, dtype: str, names: Sequence[str], of: str, iterations: int
    ) -> str:
        """A scalar operation as C."""
        self.statements += 1
        self.work += iterations * COSTS.get(kind, 1)
        if kind in VECTORIZED or kind == "sigmoid":
            self.called.add("exp" if kind == "sigmoid" else kind)
        inner = of if dtype == "bool" else dtype
        return C[kind].format(*names, f="f" if inner == "float32" else "", t=CTYPES[dtype])

    def _loop(self, loop: Loop) -> list[str]:
        """A loop as C; a loop of one iteration is a block."""
        values, before = MergingBody(self, loop.size), self.statements
        lines: list[str] = []
        for store in loop.stores:
            name = values.of(store.expression, store.points)
            where = self.index(store.positions)
            if store.array.kind == "out":
                lines.append(f"    bad += {name};")
            lines.append(f"    {store.array}[{where}] = {name};")
        self.loops += 1 + values.sums
        wide = (
            loop.size >= _SIMD_ITERATIONS and not values.sums and self.statements - before <= _LONG
        )
        vector = "  TORCHJAC_LOOP(bad)" if wide else ""
        return [*self.head(loop, vector), *values.lines, *lines, "  }"]

    def element(self, array: ArrayRef, step: int, start: int, points: Indices) -> str:
        """An element of an array for each iteration, as C."""
        return f"{array}[{self.index(points * step + start)}]"

    def index(self, positions: Indices, counter: str = "i") -> str:
        """A position for each iteration, as C."""
        start = int(positions[0])
        steps = np.diff(positions)
        if not steps.any():
            return str(start)
        if (steps == steps[0]).all():
            return _linear(int(steps[0]), counter, start)
        # Tables that differ by an offset and a factor are shared: blocks of a matrix.
        split_ids = positions - start
        factor = int(np.gcd.reduce(split_ids))
        key = (split_ids // factor).astype(np.int32)
        array = self._table_of.get(key.tobytes())
        if array is None:
            array = self._table_of[key.tobytes()] = ArrayRef("p", len(self.tables))
            self.names.append(array)
            self.tables.append(key)
        return _linear(factor, f"{array}[{counter}]", start)

    def expression(self, number: int) -> Expression:
        """An expression."""
        return self._all[number]

    def _count_uses(self) -> Counter[int]:
        """The number of expressions and stores that read each expression."""
        counts = Counter(self._wanted)
        for number in reachable(self._all, self._wanted):
            counts.update([a for a, _ in self._all[number].arguments])
        return counts

    def memory(self) -> list[str]:
        """Declarations of the buffers."""
        lines = [
            f"  {CTYPES[dtype]} *const {self.base_of(dtype)} = scratch;"
            for dtype in sorted(
                {
                    self._all[n].dtype
                    for n, (a, _) in self._program.buffers.items()
                    if a in self._joined
                }
            )
        ]
        for number, (array, _) in self._program.buffers.items():
            t, scalar_name = (
                CTYPES[self._all[number].dtype],
                "" if array in self._joined else "restrict ",
            )
            where = f"(void *)((char *)scratch + {self._offsets[array]})"
            lines.append(f"  {t} *{scalar_name}const {array} = {where};")
        return lines

    def base_of(self, dtype: str) -> str:
        """The name of all scratch memory as an array of one dtype."""
        return f"buffers_{dtype}"

    def offset(self, array: ArrayRef) -> int:
        """The offset of a buffer in `base_of`; from now on the buffer is also read through it."""
        self._joined.add(array)
        number = next(n for n, (a, _) in self._program.buffers.items() if a == array)
        return self._offsets[array] // dtype_bytes(self._all[number].dtype)

    def buffer_of(self, number: int) -> ArrayRef | None:
        """The buffer of an expression; None without buffer."""
        entry = self._program.buffers.get(number)
        return None if entry is None else entry[0]


def _linear(factor: int, of: str, start: int) -> str:
    """A factor times an index plus an offset, as C."""
    text = of if factor == 1 else f"{factor} * {of}"
    return f"{text} + {start}" if start > 0 else f"{text} - {-start}" if start else text
