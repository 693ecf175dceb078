"""The cache directory: files of this user that outlive the process.

Every file is optional: its content is computed again if it cannot be read or written. A file that
another user may write to is not read.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from torchjac.host import system

_VARIABLE = "TORCHJAC_CACHE_DIR"


def directory() -> Path | None:
    """The cache directory, created if missing; None if there is none, or if it is not private.

    The variable `TORCHJAC_CACHE_DIR` names it; an empty value disables the cache. The default is
    `torchjac` in the directory of the user's caches: `XDG_CACHE_HOME`, or the system's own
    (`~/.cache` on Linux).
    """
    configured = os.environ.get(_VARIABLE)
    if configured == "":
        return None
    try:
        path = Path(configured) if configured is not None else system.cache_home() / "torchjac"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path if system.is_private(path.stat()) else None
    except (OSError, RuntimeError):  # no home directory, a file in its place, a read-only disk
        return None


def read(name: str) -> bytes | None:
    """Content of a file; None if the file is missing or not private."""
    folder = directory()
    if folder is None:
        return None
    try:
        with (folder / name).open("rb") as file:
            return file.read() if system.is_private(os.fstat(file.fileno())) else None
    except OSError:
        return None


def place(name: str) -> Path | None:
    """Path of a file; None if the file is missing or not private."""
    folder = directory()
    if folder is None:
        return None
    try:
        path = folder / name
        return path if system.is_private(path.lstat()) and path.is_file() else None
    except OSError:
        return None


def write(name: str, data: bytes) -> bool:
    """Writes a file atomically.

    Returns:
        Whether the file was written.
    """
    folder = directory()
    if folder is None:
        return False
    try:
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
    except OSError:
        return False
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(temporary).replace(folder / name)  # atomic, also if several processes write
    except OSError:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        return False
    return True
