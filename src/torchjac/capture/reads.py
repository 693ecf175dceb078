"""What a piece of Python code can read, as far as its bytecode says it."""

from __future__ import annotations

import dis
import sys
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType

# Code that is taken never to change: it is replaced with the whole installation.
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

# What they return is another thing on every call.
_VOLATILE = (
    "_random",
    "datetime",
    "glob",
    "io",
    "numpy.random",
    "os",
    "posix",
    "random",
    "secrets",
    "select",
    "socket",
    "sqlite3",
    "subprocess",
    "tempfile",
    "time",
    "urllib",
    "uuid",
)
VOLATILE_BUILTINS = frozenset({"open", "input", "eval", "exec"})

# A function that uses one of these names reads attributes by names that it computes.
_DYNAMIC = frozenset(
    {
        "__dict__",
        "__getattribute__",
        "__getstate__",
        "asdict",
        "astuple",
        "copy",
        "deepcopy",
        "dir",
        "eval",
        "exec",
        "fields",
        "getattr",
        "getmembers",
        "globals",
        "hasattr",
        "locals",
        "pickle",
        "replace",
        "vars",
    }
)


@dataclass(frozen=True, slots=True)
class Reads:
    """What a code object names, with the code objects inside it.

    Attributes:
        variables: Global (or builtin) variables that it loads.
        imports: Modules that it imports while it runs.
        assigned: Global variables that it assigns to.
        names: Every name and string in it: attributes are read by these, if by no computed name.
    """

    variables: tuple[str, ...]
    imports: tuple[str, ...]
    names: frozenset[str]
    assigned: tuple[str, ...]


@lru_cache(maxsize=4096)
def reads(code: CodeType) -> Reads:
    """What a code object names."""
    variables: dict[str, None] = {}
    imports: dict[str, None] = {}
    assigned: dict[str, None] = {}
    names = {*code.co_names, *_strings(code.co_consts)}
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            variables[instruction.argval] = None
        elif instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            assigned[instruction.argval] = None
        elif instruction.opname == "IMPORT_NAME":
            imports[instruction.argval] = None
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            found = reads(inner)
            variables.update(dict.fromkeys(found.variables))
            imports.update(dict.fromkeys(found.imports))
            assigned.update(dict.fromkeys(found.assigned))
            names |= found.names
    return Reads(tuple(variables), tuple(imports), frozenset(names), tuple(assigned))


def _strings(constants: tuple[object, ...]) -> set[str]:
    found = {c for c in constants if isinstance(c, str)}
    for constant in constants:
        if isinstance(constant, (tuple, frozenset)):
            found |= _strings(tuple(constant))
    return found | {part for s in found if "." in s for part in s.split(".")}


def is_trusted(module: str | None) -> bool:
    """Whether code of this module is taken never to change."""
    return module is not None and module.split(".", 1)[0] in _TRUSTED


def is_volatile(module: str | None) -> bool:
    """Whether this module exists to read files, clocks, random numbers or the system."""
    return module is not None and any(
        module == volatile or module.startswith(volatile + ".") for volatile in _VOLATILE
    )


def computed(names: frozenset[str] | set[str]) -> bool:
    """Whether attributes may be read by names that are computed."""
    return not _DYNAMIC.isdisjoint(names)
