"""The operating system, the processor, memory, and the interpreter.

Tested is Linux on x86-64. What other systems give instead is written here from their documentation,
and tested with a faked system.
"""

from __future__ import annotations

import functools
import os
import platform
import stat
import sys
from pathlib import Path
from typing import Literal

System = Literal["linux", "macos", "windows", "other"]

# Bytes that a small laptop has to spare: where there is no way to ask.
_SOME_MEMORY = 4 * 2**30
_TORCH_LIBRARIES = {"macos": "libtorch_cpu.dylib", "windows": "torch_cpu.dll"}
_SHARED_SUFFIXES = {"macos": ".dylib", "windows": ".dll"}


def system() -> System:
    """The operating system."""
    if sys.platform.startswith("linux"):
        return "linux"
    names: dict[str, System] = {"darwin": "macos", "win32": "windows"}
    return names.get(sys.platform, "other")


def torch_library() -> str:
    """File name of torch's library, in the folder `lib` of its package."""
    return _TORCH_LIBRARIES.get(system(), "libtorch_cpu.so")


def shared_suffix() -> str:
    """Suffix of a shared library."""
    return _SHARED_SUFFIXES.get(system(), ".so")


def cache_home() -> Path:
    """Directory of a user's caches.

    Raises:
        RuntimeError: The user has no home.
    """
    named = os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named)
    if system() == "macos":
        return Path.home() / "Library" / "Caches"
    if system() == "windows":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local) if local else Path.home() / "AppData" / "Local"
    return Path.home() / ".cache"


def is_private(about: os.stat_result) -> bool:
    """Whether nobody but this user (and root) could have written there.

    Windows has no such bits: there the directory of a user's caches is the user's own.
    """
    if not hasattr(os, "getuid"):
        return True
    others = stat.S_IWGRP | stat.S_IWOTH
    return about.st_uid in (os.getuid(), 0) and not about.st_mode & others


@functools.cache
def processor() -> str:
    """What tells processors apart for which one may compile; as far as that is to be known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        words = [x for x in lines if x.startswith(("model name", "flags", "Features", "CPU part"))]
        return "\n".join(dict.fromkeys(words))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its container."""
    return min(_free_in_system(), _free_in_container())


def _free_in_system() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return _SOME_MEMORY


def _free_in_container() -> int:
    """What a container still allows (cgroup v2); a very large number where there is no limit."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return int(limit) - used
    except (OSError, ValueError):
        return 2**62


def has_gil() -> bool:
    """Whether the interpreter runs one thread at a time (not: free-threaded builds of CPython)."""
    enabled = getattr(sys, "_is_gil_enabled", None)
    return enabled is None or bool(enabled())


def calls_natively() -> bool:
    """Whether compiled code can be a function of CPython's own kind.

    It finds names of the interpreter when it is loaded: not where that is embedded privately.
    """
    if system() != "linux" or sys.implementation.name != "cpython":
        return False
    import ctypes

    return hasattr(ctypes.CDLL(None), "PyEval_SaveThread")
