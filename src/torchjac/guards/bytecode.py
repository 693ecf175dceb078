"""The names that Python code can read, by its bytecode."""

from __future__ import annotations

import dis
import importlib.util
import os
import re
import sys
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType
from typing import Any

from torchjac._torch.private import corner

# Packages whose code never changes while a program runs.
_TRUSTED = sys.stdlib_module_names | {
    "einops",
    "functorch",
    "jaxtyping",
    "numpy",
    "opt_einsum",
    "scipy",
    "torch",
    "torchjac",
    "torchvision",
    "typing_extensions",
}

# Modules whose results differ from call to call, or depend on values that no guard walks: files,
# clocks, frames, settings of the process, the imported modules.
_VOLATILE = frozenset(
    {
        "_io",
        "_random",
        "contextvars",
        "ctypes",
        "datetime",
        "gc",
        "genericpath",
        "glob",
        "importlib",
        "inspect",
        "io",
        "linecache",
        "locale",
        "nt",
        "ntpath",
        "numpy.random",
        "os",
        "pathlib",
        "pkgutil",
        "platform",
        "posix",
        "posixpath",
        "random",
        "runpy",
        "secrets",
        "select",
        "socket",
        "sqlite3",
        "subprocess",
        "tempfile",
        "time",
        "torch.backends",
        "torch.serialization",
        "urllib",
        "uuid",
    }
)
# Names with such results in other modules.
_VOLATILE_IN = {
    "decimal": frozenset({"getcontext"}),
    "numpy": frozenset({"fromfile", "genfromtxt", "geterr", "load", "loadtxt", "memmap"}),
    "sys": frozenset({"_current_frames", "_getframe", "argv", "modules", "path", "stdin"}),
    "threading": frozenset({"current_thread", "get_ident", "local", "main_thread"}),
    "torch": frozenset(
        {
            "get_float32_matmul_precision",
            "get_num_threads",
            "get_rng_state",
            "initial_seed",
            "load",
            "seed",
        }
    ),
    "warnings": frozenset({"filters"}),
}
VOLATILE_BUILTINS = frozenset({"open", "input", "eval", "exec", "globals", "__import__"})
# Names by which code reaches values that are not among its own variables.
_ESCAPES = frozenset(
    {
        "__builtins__",
        "__globals__",
        "__import__",
        "__subclasses__",
        "_getframe",
        "currentframe",
        "f_back",
        "f_globals",
        "f_locals",
        "globals",
        "import_module",
        "read_bytes",
        "read_text",
    }
)
# Methods of a path that read files.
READS_FILES = frozenset({"exists", "glob", "is_dir", "is_file", "iterdir", "open", "rglob", "stat"})

# Names that code uses to read attributes by computed names.
_DYNAMIC = frozenset(
    {
        "__dict__",
        "__getattribute__",
        "__getstate__",
        "__reduce__",
        "__reduce_ex__",
        "asdict",
        "astuple",
        "attrgetter",
        "copy",
        "deepcopy",
        "dir",
        "eval",
        "exec",
        "fields",
        "getattr",
        "getattr_static",
        "getmembers",
        "globals",
        "hasattr",
        "locals",
        "methodcaller",
        "pickle",
        "replace",
        "vars",
    }
)
# The names among these that work on modules.
_OF_MODULES = _DYNAMIC - {"asdict", "astuple", "copy", "deepcopy", "fields", "replace"}


@dataclass(frozen=True, slots=True)
class Reads:
    """The names in a code object, and in the code objects inside.

    Attributes:
        variables: Global and builtin variables that code loads.
        imports: Modules that code imports while it runs; relative ones with a dot for each level.
        assigned: Global variables that code assigns to.
        names: All names and strings. Attributes that are not computed are read by these names.
        used: Attributes that code reads of each variable: `random.rand` for `np.random.rand(3)`. An
            empty name says that code uses the variable in another way.
    """

    variables: tuple[str, ...]
    imports: tuple[str, ...]
    assigned: tuple[str, ...]
    names: frozenset[str]
    used: dict[str, frozenset[str]]


# Instructions that load global and builtin variables.
_LOADING = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"})


@lru_cache(maxsize=4096)
def reads(code: CodeType) -> Reads:
    """The names in a code object, and in the functions that it defines."""
    imports: dict[str, None] = {}
    assigned: dict[str, None] = {}
    used: dict[str, set[str]] = {}
    names = {*code.co_names, *_strings(code.co_consts)}
    instructions = [i for i in dis.get_instructions(code) if i.opname != "EXTENDED_ARG"]
    for position, instruction in enumerate(instructions):
        if instruction.opname in _LOADING:
            chain = _chain(instructions, position + 1)
            used.setdefault(instruction.argval, set()).add(chain)
        elif instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            assigned[instruction.argval] = None
        elif instruction.opname == "IMPORT_NAME":
            imports[_imported(instructions[position - 2].argval, instruction.argval)] = None
        elif instruction.opname == "MATCH_CLASS":
            names.add("isinstance")
            if instruction.arg:
                names.add("getattr")  # `case C(k)`: by the names in `C.__match_args__`
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            inside = reads(inner)
            imports |= dict.fromkeys(inside.imports)
            assigned |= dict.fromkeys(inside.assigned)
            names |= inside.names
            for name, chains in inside.used.items():
                used.setdefault(name, set()).update(chains)
    frozen = {name: frozenset(chains) for name, chains in used.items()}
    return Reads(tuple(used), tuple(imports), tuple(assigned), frozenset(names), frozen)


def _chain(instructions: list[dis.Instruction], position: int) -> str:
    """The chain of attributes that the instructions from a position on read."""
    parts = []
    while instructions[position].opname in ("LOAD_ATTR", "LOAD_METHOD"):
        parts.append(instructions[position].argval)
        position += 1
    return ".".join(parts)


def _strings(constants: tuple[object, ...]) -> set[str]:
    strings = {c for c in constants if isinstance(c, str)}
    for constant in constants:
        if isinstance(constant, (tuple, frozenset)):
            strings |= _strings(tuple(constant))
    dotted = [s for s in strings if "." in s]
    formats = {name for s in dotted if "{" in s for name in _NAME.findall(s)}
    return strings | formats | {part for s in dotted for part in s.split(".")}


_NAME = re.compile(r"\.([^\W\d]\w*)")


def _imported(level: object, name: str) -> str:
    """A module as an import statement names it, by the level, which is loaded before."""
    return "." * level + name if isinstance(level, int) else f"?{name}"


def escapes(names: frozenset[str]) -> str | None:
    """A name by which code reaches values that are not among its own variables, or None."""
    return min(names & _ESCAPES, default=None)


def is_trusted(module: str | None) -> bool:
    """Whether code of this module never changes while a program runs."""
    if module is None or module == "builtins":
        return module is not None
    top = module.split(".", 1)[0]
    return top in _TRUSTED and (top not in sys.stdlib_module_names or _is_standard(top))


def is_trusted_code(space: dict[str, Any]) -> bool:
    """The same for code with these global variables, which really are those of the module."""
    name = space.get("__name__")
    return is_trusted(name) and getattr(sys.modules.get(str(name)), "__dict__", None) is space


_LIBRARY = tuple(
    {os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib")}
)
_INSTALLED = ("site-packages", "dist-packages")


def _is_standard(name: str) -> bool:
    """Whether a module of the standard library is not a file of a user's with the same name."""
    module = sys.modules.get(name)
    if module is None:  # so no value comes from there
        return name in sys.builtin_module_names or _is_within_library(_origin(name))
    file = getattr(module, "__file__", None)
    return file is None or _is_within_library(file)


@lru_cache(maxsize=4096)
def _is_within_library(file: str) -> bool:
    real = os.path.realpath(file)
    inside = [real[len(path) :] for path in _LIBRARY if real.startswith(path)]
    return any(not path.startswith(_INSTALLED) for path in inside)


def _origin(name: str) -> str:
    """The file that a module would be imported from."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return ""
    return (spec.origin or "") if spec is not None else ""


def is_volatile(module: str | None, name: str = "") -> bool:
    """Whether a module, or a name in it, reads files, clocks, random numbers, frames or the system.

    Args:
        module: A module.
        name: A name in the module; the whole module if empty.
    """
    if module is None:
        return False
    if name and name in _VOLATILE_IN.get(module, ()):
        return True
    parts = module.split(".")
    return any(".".join(parts[: i + 1]) in _VOLATILE for i in range(len(parts)))


def volatile_in(module: str, names: frozenset[str]) -> str | None:
    """A name in a module that reads the world outside; empty for the module itself; or None."""
    if is_volatile(module):
        return ""
    return min(names & _VOLATILE_IN.get(module, frozenset()), default=None)


def computed(names: frozenset[str] | set[str], of: str = "objects") -> bool:
    """Whether code may read attributes of objects, or of modules, by computed names."""
    return not (_DYNAMIC if of == "objects" else _OF_MODULES).isdisjoint(names)


# Instructions of CPython 3.10 to 3.15 that work with variables, attributes and imports, by their
# names. A new one may read values that `reads` does not know of.
_KNOWN = frozenset(
    {
        "CALL_METHOD",
        "DELETE_ATTR",
        "DELETE_DEREF",
        "DELETE_GLOBAL",
        "DELETE_NAME",
        "IMPORT_FROM",
        "IMPORT_NAME",
        "IMPORT_STAR",
        "KW_NAMES",
        "LOAD_ATTR",
        "LOAD_CLASSDEREF",
        "LOAD_DEREF",
        "LOAD_FROM_DICT_OR_DEREF",
        "LOAD_FROM_DICT_OR_GLOBALS",
        "LOAD_GLOBAL",
        "LOAD_LOCALS",
        "LOAD_METHOD",
        "LOAD_NAME",
        "LOAD_SUPER_ATTR",
        "LOAD_SUPER_METHOD",
        "LOAD_ZERO_SUPER_ATTR",
        "LOAD_ZERO_SUPER_METHOD",
        "SET_FUNCTION_ATTRIBUTE",
        "STORE_ATTR",
        "STORE_DEREF",
        "STORE_GLOBAL",
        "STORE_NAME",
    }
)
_TELLING = re.compile("GLOBAL|NAME|IMPORT|ATTR|METHOD|LOCALS|DEREF")
_EXAMPLE = """
def f(x):
    global counter, gone
    import numpy.linalg as la
    from .near import thing
    counter = counter + 1
    del gone
    def g(y):
        return scale * y + np.random.rand(3) + box.inner.value + box.method(y)
    class C:
        inside = table["key"]
    match x:
        case Point(k):
            return g(k)
    return [f"{other}" for _ in items]
"""


@corner("the bytecode of Python", "functions that are not PyTorch's own are not planned")
def BYTECODE() -> bool:
    """The variables, attributes and imports of an example are found, and no instruction is new."""
    if any(_TELLING.search(n) and n not in _KNOWN for n in dis.opmap if "INSTRUMENTED" not in n):
        return False
    module = compile(_EXAMPLE, "<example>", "exec")
    (code,) = (c for c in module.co_consts if isinstance(c, CodeType))
    read = reads(code)
    expected = {"Point", "box", "counter", "items", "np", "other", "scale", "table"}
    return (
        expected <= set(read.variables) <= expected | {"__name__"}
        and set(read.assigned) == {"counter", "gone"}
        and set(read.imports) == {"numpy.linalg", ".near"}
        and {"inner", "value", "method", "key", "getattr", "isinstance"} <= read.names
        and read.used["np"] == {"random.rand"}
        and read.used["box"] == {"inner.value", "method"}
    )
