"""Patterns as files, in the format of `host/archive.py`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchjac.errors import PatternError
from torchjac.host.archive import pack, unpack
from torchjac.sparsity.interpret import Spread
from torchjac.sparsity.lanes import Lane

if TYPE_CHECKING:
    from torchjac.sparsity.pattern import Pattern

_FORMAT, _VERSION = "torchjac pattern", 1
_ARRAYS = ("starts", "columns", "values")


def save(pattern: Pattern, path: str | Path) -> None:
    """Writes a pattern to a file."""
    Path(path).write_bytes(to_bytes(pattern))


def to_bytes(pattern: Pattern) -> bytes:
    """The bytes of a pattern's file."""
    about = {
        "format": _FORMAT,
        "version": _VERSION,
        "row_shapes": pattern.row_shapes,
        "column_shapes": pattern.column_shapes,
        "scope": pattern.scope,
        "reason": pattern.reason,
        "lanes": [asdict(lane) for lane in pattern.lanes],
        "spreads": [asdict(spread) for spread in pattern.spreads],
        "assumed": pattern.assumed,
    }
    return pack(about, {name: getattr(pattern, name) for name in _ARRAYS})


def load(path: str | Path) -> dict[str, Any]:
    """Fields of the pattern in a file.

    Raises:
        PatternError: The file holds no pattern, has an unknown version, or inconsistent entries.
    """
    return from_bytes(Path(path).read_bytes(), str(path))


def from_bytes(data: bytes, name: str) -> dict[str, Any]:
    """Fields of the pattern in the bytes of a file.

    Args:
        data: The bytes.
        name: The name of the file, for messages.

    Raises:
        PatternError: As of `load`.
    """
    try:
        about, every = unpack(data)
        arrays = {key: every[key] for key in _ARRAYS}
    except Exception as wrong:  # whatever readers of damaged archives, arrays and JSON raise
        raise PatternError(f"torchjac: {name} is not a saved pattern ({wrong}).") from wrong
    if about.get("format") != _FORMAT or about.get("version") != _VERSION:
        raise PatternError(
            f"torchjac: {name} has format {about.get('format')!r}, version "
            f"{about.get('version')!r}; this torchjac reads {_FORMAT!r}, version {_VERSION}."
        )
    shapes = [tuple(tuple(s) for s in about[k]) for k in ("row_shapes", "column_shapes")]
    m, n = (sum(int(np.prod(s, dtype=np.int64)) for s in side) for side in shapes)
    _check(name, m, n, **arrays)
    return {
        **arrays,
        "row_shapes": shapes[0],
        "column_shapes": shapes[1],
        "scope": about["scope"],
        "reason": about["reason"],
        "lanes": tuple(Lane(**lane) for lane in about["lanes"]),
        "spreads": tuple(Spread(**spread) for spread in about["spreads"]),
        "assumed": tuple(about["assumed"]),
    }


def _check(name: str, m: int, n: int, starts: Any, columns: Any, values: Any) -> None:
    """Refuses arrays with an index out of range: a read of them would fail later."""
    nnz = len(columns)
    fits = (
        starts.shape == (m + 1,)
        and starts[0] == 0
        and starts[-1] == nnz == len(values)
        and bool((np.diff(starts) >= 0).all())
        and (nnz == 0 or (columns.min() >= 0 and columns.max() < n))
    )
    if not fits:
        raise PatternError(f"torchjac: the entries in {name} do not fit its {m} x {n} pattern.")
