"""A directory of the user's own for what is worth keeping between runs.

Nothing in it is needed: where it cannot be read or written, things are computed again. Nothing is
read from a place that another user could have written to.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from torchjac.host import system

_VARIABLE = "TORCHJAC_CACHE_DIR"


def directory() -> Path | None:
    """The cache directory, made if it is not there; None where there is none to be trusted.

    `TORCHJAC_CACHE_DIR` names it; empty, nothing is kept. Else it is `torchjac` in the directory of
    the user's caches: `XDG_CACHE_HOME`, or what the system has (`~/.cache` on Linux).
    """
    named = os.environ.get(_VARIABLE)
    if named == "":
        return None
    try:
        path = Path(named) if named is not None else system.cache_home() / "torchjac"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path if system.is_private(path.stat()) else None
    except (OSError, RuntimeError):  # no home, a file in its place, a disk that is read only
        return None


def read(name: str) -> bytes | None:
    """What is kept under a name, or None."""
    where = directory()
    if where is None:
        return None
    try:
        with (where / name).open("rb") as file:
            return file.read() if system.is_private(os.fstat(file.fileno())) else None
    except OSError:
        return None


def place(name: str) -> Path | None:
    """Where something is kept that nobody else could have written; None if there is nothing."""
    where = directory()
    if where is None:
        return None
    try:
        path = where / name
        return path if system.is_private(path.lstat()) and path.is_file() else None
    except OSError:
        return None


def write(name: str, data: bytes) -> bool:
    """Keeps something under a name, all of it or nothing; whether that could be done."""
    where = directory()
    if where is None:
        return False
    try:
        handle, temporary = tempfile.mkstemp(dir=where, prefix=f".{name}.")
    except OSError:
        return False
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(temporary).replace(where / name)  # at once, also where several processes write
    except OSError:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        return False
    return True
