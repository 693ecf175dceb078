"""The operating system, the processor, memory, and the interpreter.

Linux on x86-64 is tested. The code for other systems follows their documentation, and is tested
with a faked system.
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

_ASSUMED_MEMORY = 4 * 2**30  # bytes free where no system call tells: those of a small laptop
_TORCH_LIBRARIES = {"macos": "libtorch_cpu.dylib", "windows": "torch_cpu.dll"}
_SHARED_SUFFIXES = {"macos": ".dylib", "windows": ".dll"}


def system() -> System:
    """The operating system."""
    if sys.platform.startswith("linux"):
        return "linux"
    names: dict[str, System] = {"darwin": "macos", "win32": "windows"}
    return names.get(sys.platform, "other")


def torch_library() -> str:
    """File name of torch's shared library, in the folder `lib` of its package."""
    return _TORCH_LIBRARIES.get(system(), "libtorch_cpu.so")


def shared_suffix() -> str:
    """File name suffix of a shared library."""
    return _SHARED_SUFFIXES.get(system(), ".so")


def cache_home() -> Path:
    """Directory of the user's caches.

    Raises:
        RuntimeError: The user has no home directory.
    """
    xdg = os.environ.get("XDG_CACHE_HOME")
    if xdg:
        return Path(xdg)
    if system() == "macos":
        return Path.home() / "Library" / "Caches"
    if system() == "windows":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local) if local else Path.home() / "AppData" / "Local"
    return Path.home() / ".cache"


def is_private(status: os.stat_result) -> bool:
    """Whether only this user and root may write to a file or directory.

    True on Windows, which has no permission bits: the directory of a user's caches is private.
    """
    if not hasattr(os, "getuid"):
        return True
    shared = stat.S_IWGRP | stat.S_IWOTH
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & shared


@functools.cache
def processor() -> str:
    """Model and instruction sets of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        fields = [x for x in lines if x.startswith(("model name", "flags", "Features", "CPU part"))]
        return "\n".join(dict.fromkeys(fields))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def free_memory() -> int:
    """Bytes that this process may still allocate, within the machine and its container."""
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
        return _ASSUMED_MEMORY


def _free_in_container() -> int:
    """Bytes below the limit of the container (cgroup v2); 2**62 if there is no limit."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return int(limit) - used
    except (OSError, ValueError):
        return 2**62


def has_gil() -> bool:
    """Whether the interpreter has a global lock; free-threaded builds of CPython have none."""
    enabled = getattr(sys, "_is_gil_enabled", None)
    return enabled is None or bool(enabled())


def calls_natively() -> bool:
    """Whether compiled code can be a built-in function of CPython.

    Compiled code finds the interpreter's symbols when it is loaded. An application that embeds
    Python may hide them.
    """
    if system() != "linux" or sys.implementation.name != "cpython":
        return False
    import ctypes

    return hasattr(ctypes.CDLL(None), "PyEval_SaveThread")
