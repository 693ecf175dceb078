"""Export: a C file and a header that need the C library only, and a header for libtorch."""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from torchjac.compiler.codegen.c.scalar_ops import CTYPES, VECTORIZED, C, literal
from torchjac.compiler.codegen.c.writer import CSource
from torchjac.compiler.codegen.target import SourceUnit

# Keywords of C and C++, and names of the C library, that an exported function must not have.
_WORDS = (
    "alignas alignof and and_eq asm auto bitand bitor bool break case catch char class compl const"
    " constexpr const_cast continue decltype default delete do double dynamic_cast else enum"
    " explicit export extern false float for friend goto if inline int long mutable namespace new"
    " noexcept not not_eq nullptr operator or or_eq private protected public register requires"
    " reinterpret_cast restrict return short signed sizeof static static_assert static_cast struct"
    " switch template this thread_local throw true try typedef typeid typename typeof union"
    " unsigned using virtual void volatile wchar_t while xor xor_eq concept co_await co_return"
    " co_yield char8_t char16_t char32_t main errno assert linux unix"
    " memcpy memset memcmp memmove memchr strlen strcmp strcpy strcat printf puts malloc free"
    " calloc realloc exit abort abs labs div ldiv rand srand time clock signal read write open"
    " close select pipe index rindex link remove rename y0 y1 yn j0 j1 jn gamma nan inf infinity"
    " null huge_val m_pi isnan isinf isfinite isnormal signbit fma fabs fdim frexp ldexp modf logb"
    " ilogb nextafter scalbn remquo nearbyint lrint lround remainder cbrt tgamma significand drem"
    " round system getenv qsort bsearch atoi atof"
)
_RESERVED = frozenset(
    word + suffix for word in (*_WORDS.split(), *C, *VECTORIZED) for suffix in ("", "f", "l")
)  # with the math functions of other types


@dataclass(frozen=True, slots=True)
class Array:
    """An argument of the function, or a constant array.

    Attributes:
        name: The name in C.
        about: The description.
        shape: The shape, in row-major order.
        dtype: The dtype.
        values: The numbers of a constant array.
        per_sample: Whether an axis of samples precedes the shape.
    """

    name: str
    about: str
    shape: tuple[int, ...]
    dtype: str
    values: np.ndarray | None = None
    per_sample: bool = False


@dataclass(frozen=True, slots=True)
class Standalone:
    """Three files.

    Attributes:
        header: The header of a program in C.
        source: The source of the function.
        tensors: The header of a program on libtorch.
    """

    header: str
    source: str
    tensors: str


def standalone(
    program: SourceUnit,
    name: str,
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    known: Sequence[Array],
) -> Standalone:
    """Writes a program as a function of plain arrays.

    Args:
        program: The program.
        name: The name of the function, a C identifier.
        inputs: The inputs, in order.
        outputs: The outputs, in order.
        known: The constant arrays: rows and columns of the entries of a sparse matrix.
    """
    source = program.source
    assert isinstance(source, CSource), "another target rendered it"
    arguments = [f"const {CTYPES[a.dtype]} *{a.name}" for a in inputs]
    arguments += [f"{CTYPES[a.dtype]} *{a.name}" for a in outputs]
    samples = ["long samples"] if program.samples is not None else []
    signature = f"int {name}({', '.join([*samples, *arguments, 'void *work'])})"
    header = _header(name, signature, source.scratch, inputs, outputs, known)
    tables = [
        _table(f"{name}_{label}", values)
        for label, values in zip(source.names, source.tables, strict=True)
    ]
    pointers = ", ".join(f"{name}_{label}" for label in source.names) or "0"
    names = ", ".join(a.name for a in inputs) or "0"
    body = [
        "/* Written by torchjac. */",
        f'#include "{name}.h"',
        "#define TORCHJAC_PLAIN",
        _private(source.text, name),
        *tables,
        *[_known(f"{name}_{a.name}", a) for a in known],
        "",
        signature,
        "{",
        f"  static const void *const table[] = {{{pointers}}};",
        f"  const void *const in[] = {{{names}}};",
        f"  void *const out[] = {{{', '.join(a.name for a in outputs)}}};",
        f"  if ({name}_body(in, table, out, work{', 0, samples' if samples else ''})) return 1;",
        "  /* The sum of what is finite may not be. */",
        *[line for a in outputs for line in _looked_at(a)],
        "  return 1;",
        "}",
        "",
    ]
    return Standalone(header, "\n".join(body), _for_tensors(name, inputs, outputs))


def _header(
    name: str,
    signature: str,
    scratch: int,
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    known: Sequence[Array],
) -> str:
    """The header: the function, the sizes, and the description of arrays."""
    guard = f"{name.upper()}_H"
    lines = [
        "/* Written by torchjac: a function and its Jacobian. Needs nothing but the C library. */",
        f"#ifndef {guard}",
        f"#define {guard}",
        "",
        "#ifdef __cplusplus",
        'extern "C" {',
        "#endif",
        "",
        "/* Bytes of memory to work in (aligned to 64 bytes); 0 where none is needed. */",
        f"#define {name.upper()}_WORK {scratch}",
        *[
            f"#define {name.upper()}_{a.name.upper()}_SIZE {_size(a)}"
            + (" /* of each sample */" if a.per_sample else "")
            for a in (*inputs, *outputs)
        ],
        "",
        *[f"extern const int {name}_{a.name}[{max(_size(a), 1)}]; /* {a.about} */" for a in known],
        "",
        "/*",
        " * All arrays are dense, row-major, and must not overlap.",
        *_OF_SAMPLES[: 2 * ("long samples" in signature)],
        *[f" *   {a.name}: {a.about}, shape {_shape(a)}, {CTYPES[a.dtype]} (in)" for a in inputs],
        *[f" *   {a.name}: {a.about}, shape {_shape(a)}, {CTYPES[a.dtype]} (out)" for a in outputs],
        f" *   work: {name.upper()}_WORK bytes, or NULL where that is 0; one for each thread",
        " * Returns 1 where all that was computed is finite, 0 where it is not.",
        " */",
        f"{signature};",
        "",
        "#ifdef __cplusplus",
        "}",
        "#endif",
        "#endif",
        "",
    ]
    return "\n".join(lines)


def _for_tensors(name: str, inputs: Sequence[Array], outputs: Sequence[Array]) -> str:
    """The function for tensors of libtorch, with checks of shape, type and device."""
    parameters = ", ".join(f"const at::Tensor &{a.name}" for a in inputs)
    lines = [
        "/* Written by torchjac: the function of the header beside it, for tensors of libtorch. */",
        "#pragma once",
        "",
        "#include <ATen/ATen.h>",
        "",
        "#include <tuple>",
        "",
        f'#include "{name}.h"',
        "",
        f"namespace {name}_tensors {{",
        "",
        "inline at::Tensor suited(const at::Tensor &x, const char *what, at::IntArrayRef sizes,",
        "                         at::ScalarType kind) {",
        "  TORCH_CHECK(x.sizes() == sizes && x.scalar_type() == kind && x.device().is_cpu(),",
        f'              "{name}: ", what, " must be a CPU tensor of shape ", sizes,',
        '              " and type ", kind,',
        '              ", got ", x.sizes(), " and ", x.scalar_type(), " on ", x.device());',
        "  return x.contiguous();",
        "}",
        "",
        f"/* {', '.join(a.name for a in outputs)}; throws c10::Error where they are not finite. */",
        f"inline std::tuple<{', '.join('at::Tensor' for _ in outputs)}> call({parameters}) {{",
    ]
    leading = next((a.name for a in inputs if a.per_sample), None)
    if leading is not None:
        lines += [
            f'  TORCH_CHECK({leading}.dim() > 0, "{name}: {leading} has no axis of samples");',
            f"  const int64_t samples = {leading}.size(0);",
        ]
    for a in inputs:
        sizes, kind = _sizes(a), _KINDS[a.dtype]
        lines.append(
            f'  const at::Tensor {a.name}_ = suited({a.name}, "{a.name}", {{{sizes}}}, {kind});'
        )
    for a in outputs:
        lines.append(f"  at::Tensor {a.name}_ = at::empty({{{_sizes(a)}}}, {_KINDS[a.dtype]});")
    pointers = ["(long)samples"] if leading is not None else []
    pointers += [f"{a.name}_.const_data_ptr<{CTYPES[a.dtype]}>()" for a in inputs]
    pointers += [f"{a.name}_.mutable_data_ptr<{CTYPES[a.dtype]}>()" for a in outputs]
    lines += [
        f"  at::Tensor work = at::empty({{{name.upper()}_WORK}}, at::kByte);",
        f"  const int fine = ::{name}({', '.join(pointers)}, work.mutable_data_ptr());",
        f'  TORCH_CHECK(fine, "{name}: the result is not finite");',
        f"  return {{{', '.join(f'{a.name}_' for a in outputs)}}};",
        "}",
        "",
        f"}}  // namespace {name}_tensors",
        "",
    ]
    return "\n".join(lines)


_OF_SAMPLES = [
    " *   samples: how many there are, each computed as here (what the function does only from",
    " *     some number of samples on is not in it)",
]
_KINDS = {"float64": "at::kDouble", "float32": "at::kFloat"}


def identifier(text: str) -> str:
    """An identifier of C, C++ and Python."""
    name = re.sub(r"\W", "_", text, flags=re.ASCII) or "f"
    reserved = name.lower() in _RESERVED or keyword.iskeyword(name)
    if name[0].isdigit() or name[0] == "_" or reserved:
        name = f"f_{name}"
    return name


def _private(text: str, name: str) -> str:
    """The text with the function visible in its file only."""
    hidden = f"#if defined(__GNUC__)\n__attribute__((noinline))\n#endif\nstatic int {name}_body("
    return text.replace(f"int {name}_body(", hidden, 1)


def _looked_at(array: Array) -> list[str]:
    """Statements that return where an element is not finite."""
    size = f"{_size(array)} * samples" if array.per_sample else str(_size(array))
    x = f"{array.name}[k]"
    return [f"  for (long k = 0; k < {size}; k++)", f"    if (!({x} - {x} == 0)) return 0;"]


def _size(array: Array) -> int:
    return int(np.prod(array.shape, dtype=np.int64))


def _sizes(array: Array) -> str:
    return ", ".join(["samples"] * array.per_sample + list(map(str, array.shape)))


def _shape(array: Array) -> str:
    return f"({_sizes(array)})"


def _table(name: str, values: np.ndarray) -> str:
    t = {"int32": "int", "int64": "long long", "float64": "double", "float32": "float"}
    kind = values.dtype.name
    flat = values.reshape(-1).tolist()
    texts = [str(v) if kind.startswith("int") else literal(v, kind) for v in flat] or ["0"]
    lines = [", ".join(texts[k : k + 8]) for k in range(0, len(texts), 8)]
    return f"static const {t[kind]} {name}[] = {{\n  " + ",\n  ".join(lines) + "};"


def _known(name: str, array: Array) -> str:
    assert array.values is not None
    return _table(name, array.values.astype(np.int32)).replace("static const", "const", 1)
