"""Loops as C."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from torchjac.compiler.codegen.c.loop_body import MergingBody
from torchjac.compiler.codegen.c.matmul_tiles import bytes_of
from torchjac.compiler.codegen.c.scalar_ops import CTYPES, OWN, VECTORIZED, C, literal
from torchjac.compiler.codegen.granularity import ScalarProgram
from torchjac.compiler.codegen.scalar_ir import ArrayRef, Expression, Places, constant_of, loaded
from torchjac.compiler.codegen.scalar_ops import COSTLY
from torchjac.compiler.codegen.scalar_order import Group, grouped, needed
from torchjac.compiler.codegen.schedule import Loop, LoopProgram
from torchjac.compiler.codegen.target import Signature, Source

# Statements, and loops, from which on a function is not optimized as much (a straight line gains
# less by it), and statements of a loop from which on it is not vectorized: compilers are not linear
# in them.
_LONG, _LOOPS, _STRAIGHT = 6000, 100, 1000
# Numbers that do not vary up to which they are in the text.
_BRIEF = 64
# Turns from which on a loop over few statements is worth vectorizing.
_WIDE = 8


@dataclass(frozen=True, slots=True)
class CSource(Source):
    """A program in C.

    Attributes:
        text: The function, and what it needs.
        names: What its tables are called in the text.
        level: How much a compiler should optimize.
    """

    text: str
    names: tuple[str, ...]
    level: int


def source_of(
    scalars: ScalarProgram,
    plan: LoopProgram,
    signature: Signature,
    writing: type[Writer],
) -> CSource:
    """Writes a program down, as a function that says whether the sum of all results is finite.

    (Where it is not, they may be: to look at them there would make compilers keep them.)

    Args:
        scalars: Its expressions.
        plan: Its loops.
        signature: What the function takes.
        writing: How loops are written.
    """
    writer = writing(scalars, plan)
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
    lines += [text for own, text in OWN.items() if any(own in line for line in body)]
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
        work=writer.work,
        seconds=writer.work * writer.product,
        text="\n".join(lines),
        names=tuple(map(str, writer.names)),
        level=_level(writer),
    )


def _level(writer: Writer) -> int:
    """How much a compiler should optimize."""
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
    """Writes statements, each value once in each loop.

    Attributes:
        parameters: What the function takes beside arrays, each after a comma.
        tables: Arrays that it reads beside the inputs.
        names: What they are called.
        called: Functions of the math library.
        statements: Scalar operations so far.
        work: What they come to, in scalar products.
        product: Seconds that each takes at best.
        loops: Loops so far.
        uses: How many expressions and stores take each expression.
        scratch: Bytes of memory for kept values.
    """

    parameters = ""
    product = 0.05e-9

    def __init__(self, scalars: ScalarProgram, plan: LoopProgram):
        """Begins with no statements."""
        self._all = scalars.expressions.all
        self._scalars = scalars
        self._plan = plan
        self.tables: list[np.ndarray] = []
        self.names: list[ArrayRef] = []
        self.called: set[str] = set()
        self.statements = 0
        self.work = 0
        self.loops = 0
        self._table_of: dict[bytes, ArrayRef] = {}
        self._single: dict[int, str] = {}
        self._lines: list[str] = []
        self._wanted = [s.expression for loop in plan.loops for s in loop.stores]
        self._wanted += [number for number, _, _ in plan.single]
        self.uses = self._counted()
        self.scratch = 0
        self._offsets: dict[ArrayRef, int] = {}
        for number, (array, size) in plan.kept.items():
            self._offsets[array] = self.scratch
            self.scratch += -(-size * bytes_of(self._all[number].dtype) // 64) * 64
        self._joined: set[ArrayRef] = set()
        for array, tensor in scalars.tables.items():
            flat = tensor.reshape(-1).numpy()
            self.tables.append(flat.astype(np.int32) if flat.dtype == bool else flat)
            self.names.append(array)

    def fixed(self, outputs: Sequence[tuple[str, int]]) -> list[str]:
        """Statements that write what does not vary, with zeros in the other places."""
        lines = []
        for i, (dtype, size) in enumerate(outputs):
            places, values = self._plan.fixed[i]
            out, fixed = ArrayRef("out", i), ArrayRef("fixed", i)
            if not len(places):
                continue
            lines.append(f"  memset({out}, 0, {size} * sizeof(*{out}));")
            if not values.any():
                continue
            if len(places) <= _BRIEF:
                pairs = zip(places.tolist(), values.tolist(), strict=True)
                lines += [f"  {out}[{p}] = {literal(v, dtype)};" for p, v in pairs if v]
                continue
            template = np.zeros(size, dtype=dtype)
            template[places] = values
            self.names.append(fixed)
            self.tables.append(template)
            lines[-1] = f"  memcpy({out}, {fixed}, {size} * sizeof(*{out}));"
        return lines

    def helpers(self) -> list[str]:
        """Functions that the statements call."""
        return []

    def body(self) -> list[str]:
        """The statements."""
        self._singles()
        for loop in self._plan.loops:
            self._lines += self._loop(loop)
        return self._lines

    def _singles(self) -> None:
        """Writes down what has one lane."""
        stores: defaultdict[int, list[str]] = defaultdict(list)
        for number, array, positions in self._plan.single:
            stores[number] += [f"{array}[{p}]" for p in positions.tolist()]
        for group in grouped(self._all, needed(self._all, self._wanted), VECTORIZED):
            if len(group) > 1:
                self._together(group)
            for number in group:
                if number not in self._single:
                    self._alone(number)
                name = self._single[number]
                if number in stores:
                    self._lines.append(f"  bad += {name};")
                self._lines += [self.stored(place, name) for place in stores[number]]
                self.statements += len(stores[number])

    def stored(self, place: str, name: str) -> str:
        """A statement that writes what has one lane."""
        return f"  {place} = {name};"

    def head(self, loop: Loop, vector: str) -> list[str]:
        """How a loop begins."""
        return [vector, f"  for (int i = 0; i < {loop.size}; i++) {{"]

    def alone(self, number: int) -> str:
        """The name of an expression of one lane, which is computed before all loops."""
        return self._single[number]

    def _alone(self, number: int) -> None:
        """Writes down an expression of one lane, whose arguments were."""
        expression = self._all[number]
        if expression.kind == "constant":
            self._single[number] = literal(constant_of(expression), expression.dtype)
            return
        if expression.kind == "load":
            array, _, start = loaded(expression)
            text = f"{array}[{start}]"
        else:
            text = self._operation(expression)
        self._single[number] = f"s{number}"
        self._lines.append(f"  const {CTYPES[expression.dtype]} s{number} = {text};")

    def _operation(self, expression: Expression) -> str:
        names = [self._single[a] for a, _ in expression.arguments]
        of = self._all[expression.arguments[0][0]].dtype
        return self.operation(expression.kind, expression.dtype, names, of, 1)

    def _together(self, group: Group) -> None:
        """The same function of several numbers: one call, where there is such a function."""
        first = self._all[group[0]]
        t, size, name = CTYPES[first.dtype], len(group), f"g{group[0]}"
        arguments = [[self._single[a] for a, _ in self._all[n].arguments] for n in group]
        taken = [f"{name}_{k}" for k in range(len(first.arguments))]
        text = C[first.kind].format(
            *[f"{x}[i]" for x in taken], f="f" if first.dtype == "float32" else "", t=t
        )
        self._lines.append("#ifdef TORCHJAC_SIMD")
        for x, values in zip(taken, zip(*arguments, strict=True), strict=True):
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
        self._single.update({n: f"s{n}" for n in group})

    def operation(self, kind: str, dtype: str, names: Sequence[str], of: str, turns: int) -> str:
        """A scalar operation, as C."""
        self.statements += 1
        self.work += turns * COSTLY.get(kind, 1)
        if kind in VECTORIZED or kind == "sigmoid":
            self.called.add("exp" if kind == "sigmoid" else kind)
        inner = of if dtype == "bool" else dtype
        return C[kind].format(*names, f="f" if inner == "float32" else "", t=CTYPES[dtype])

    def _loop(self, loop: Loop) -> list[str]:
        """One loop; of one turn it is none."""
        values, before = MergingBody(self, loop.size), self.statements
        lines: list[str] = []
        for store in loop.stores:
            name = values.of(store.expression, store.lanes)
            where = self.index(store.positions)
            if store.array.kind == "out":
                lines.append(f"    bad += {name};")
            lines.append(f"    {store.array}[{where}] = {name};")
        self.loops += 1 + values.sums
        wide = loop.size >= _WIDE and not values.sums and self.statements - before <= _LONG
        vector = "  TORCHJAC_LOOP(bad)" if wide else ""
        return [*self.head(loop, vector), *values.lines, *lines, "  }"]

    def element(self, array: ArrayRef, step: int, start: int, lanes: Places) -> str:
        """An element of an array for each turn, as C."""
        return f"{array}[{self.index(lanes * step + start)}]"

    def index(self, places: Places, turn: str = "i") -> str:
        """A position for each turn, as C."""
        start = int(places[0])
        steps = np.diff(places)
        if not steps.any():
            return str(start)
        if (steps == steps[0]).all():
            return _linear(int(steps[0]), turn, start)
        # Tables that differ by where they begin and by a factor are one: blocks of a matrix.
        apart = places - start
        factor = int(np.gcd.reduce(apart))
        key = (apart // factor).astype(np.int32)
        array = self._table_of.get(key.tobytes())
        if array is None:
            array = self._table_of[key.tobytes()] = ArrayRef("p", len(self.tables))
            self.names.append(array)
            self.tables.append(key)
        return _linear(factor, f"{array}[{turn}]", start)

    def expression(self, number: int) -> Expression:
        """An expression."""
        return self._all[number]

    def _counted(self) -> Counter[int]:
        """How many expressions and stores take each expression."""
        found = Counter(self._wanted)
        for number in needed(self._all, self._wanted):
            found.update([a for a, _ in self._all[number].arguments])
        return found

    def memory(self) -> list[str]:
        """What says where kept values are."""
        lines = [
            f"  {CTYPES[dtype]} *const {self.base_of(dtype)} = scratch;"
            for dtype in sorted(
                {self._all[n].dtype for n, (a, _) in self._plan.kept.items() if a in self._joined}
            )
        ]
        for number, (array, _) in self._plan.kept.items():
            t, alone = CTYPES[self._all[number].dtype], "" if array in self._joined else "restrict "
            where = f"(void *)((char *)scratch + {self._offsets[array]})"
            lines.append(f"  {t} *{alone}const {array} = {where};")
        return lines

    def base_of(self, dtype: str) -> str:
        """The name of all memory for kept values, as an array of a dtype."""
        return f"kept_{dtype}"

    def offset(self, array: ArrayRef) -> int:
        """Where in that array kept values begin; it is read through it from now on."""
        self._joined.add(array)
        number = next(n for n, (a, _) in self._plan.kept.items() if a == array)
        return self._offsets[array] // bytes_of(self._all[number].dtype)

    def kept(self, number: int) -> ArrayRef | None:
        """The array that an expression is kept in."""
        found = self._plan.kept.get(number)
        return None if found is None else found[0]


def _linear(factor: int, of: str, start: int) -> str:
    """A factor times something, and where it begins, as C."""
    text = of if factor == 1 else f"{factor} * {of}"
    return f"{text} + {start}" if start > 0 else f"{text} - {-start}" if start else text
