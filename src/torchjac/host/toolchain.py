"""The C compiler of a system: its names, its flags, and the systems without one."""

from __future__ import annotations

import platform

from torchjac.host.system import has_gil, system

# Names of compilers, tried after the one that the environment variable CC names.
COMPILERS = ("cc", "gcc", "clang")

_ALWAYS = (
    *("-std=gnu11", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"),
    "-ffp-contract=off",  # a fused product leaves a remainder where terms cancel exactly
    "-DTORCHJAC_LOOPS",
    *(
        "-fno-builtin-sin",
        "-fno-builtin-cos",
        "-w",
    ),  # else GCC merges sin and cos into a scalar sincos
)
# Instructions of this machine. The conflict table of GCC's register allocator is quadratic in the
# length of a function; size 0 selects the simpler allocator: a third of the time to compile 15 000
# statements, and no slower code.
_LINUX = (
    "-march=native --param=ira-max-conflict-table-size=0 -lm -lmvec",
    "-march=native -lm -lmvec",
    "-march=native -lm",
    "-lm",
)
_MACOS_ARM = ("-mcpu=native -lm", "-lm")  # Clang has no libmvec, and -mcpu in place of -march
_DEFAULT = ("-march=native -lm", "-lm")


def flags() -> tuple[str, ...]:
    """Flags of every kernel."""
    return _ALWAYS


def choices() -> tuple[tuple[str, ...], ...]:
    """Flags and libraries that a compiler may lack, in order of preference."""
    texts: tuple[str, ...]
    if system() == "linux":
        texts = _LINUX
    elif system() == "macos" and platform.machine() == "arm64":
        texts = _MACOS_ARM
    else:
        texts = _DEFAULT
    return tuple(tuple(text.split()) for text in texts)


def refused() -> str | None:
    """Reason that kernels are not compiled on this system; None if they are."""
    if system() == "windows":
        return "kernels are not compiled on Windows, where a C long has 32 bits"
    if not has_gil():
        return "kernels are not compiled where the interpreter has no global lock (free-threaded)"
    return None
