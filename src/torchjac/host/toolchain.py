"""The C compiler that a system has: its names, its flags, and where kernels are not compiled."""

from __future__ import annotations

import platform

from torchjac.host.system import has_gil, system

# Names to try after that in the environment variable CC.
COMPILERS = ("cc", "gcc", "clang")

_ALWAYS = (
    *("-std=gnu11", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"),
    "-ffp-contract=off",  # what cancels exactly must not leave what a product was rounded by
    "-DTORCHJAC_LOOPS",
    *("-fno-builtin-sin", "-fno-builtin-cos", "-w"),  # else both become one that has no vectors
)
# For this machine, and with the simpler coloring of registers by GCC, whose other one is quadratic
# in the length of a function: a third of the time for 15 000 statements, and no slower code.
_LINUX = (
    "-march=native --param=ira-max-conflict-table-size=0 -lm -lmvec",
    "-march=native -lm -lmvec",
    "-march=native -lm",
    "-lm",
)
# Clang: the library of vectorized functions is glibc's, and ARM is tuned for by another flag.
_MACOS_ARM, _OTHERS = ("-mcpu=native -lm", "-lm"), ("-march=native -lm", "-lm")


def flags() -> tuple[str, ...]:
    """Flags that every kernel is compiled with."""
    return _ALWAYS


def choices() -> tuple[tuple[str, ...], ...]:
    """Flags and libraries that a compiler need not know, the best ones first."""
    found: tuple[str, ...]
    if system() == "linux":
        found = _LINUX
    elif system() == "macos" and platform.machine() == "arm64":
        found = _MACOS_ARM
    else:
        found = _OTHERS
    return tuple(tuple(choice.split()) for choice in found)


def refused() -> str | None:
    """Why kernels are not compiled here; None where they are."""
    if system() == "windows":
        return "kernels are not compiled on Windows, where a C long has 32 bits"
    if not has_gil():
        return "kernels are not compiled where the interpreter has no global lock (free-threaded)"
    return None
