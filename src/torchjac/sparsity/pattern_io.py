"""Saving and loading patterns: NumPy arrays and one JSON text, no pickle."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from torchjac.errors import PatternError
from torchjac.sparsity.interpret import Spread
from torchjac.sparsity.lanes import Lane

if TYPE_CHECKING:
    from torchjac.sparsity.pattern import Pattern

_VERSION = 1
_ARRAYS = ("starts", "columns", "values")


def save(pattern: Pattern, path: str | Path) -> None:
    """Writes a pattern to a file."""
    with Path(path).open("wb") as file:
        write(pattern, file)


def write(pattern: Pattern, file: IO[bytes]) -> None:
    """Writes a pattern to an open file."""
    about = {
        "format": "torchjac pattern",
        "version": _VERSION,
        "row_shapes": pattern.row_shapes,
        "column_shapes": pattern.column_shapes,
        "scope": pattern.scope,
        "reason": pattern.reason,
        "lanes": [asdict(lane) for lane in pattern.lanes],
        "spreads": [asdict(spread) for spread in pattern.spreads],
        "assumed": pattern.assumed,
    }
    np.savez_compressed(
        file,
        starts=pattern.starts,
        columns=pattern.columns,
        values=pattern.values,
        about=np.frombuffer(json.dumps(about).encode(), dtype=np.uint8),
    )


def load(path: str | Path | IO[bytes]) -> dict[str, Any]:
    """Fields of the pattern in a file.

    Raises:
        PatternError: The file holds no pattern, has an unknown version, or inconsistent entries.
    """
    try:
        file = io.BytesIO(Path(path).read_bytes()) if isinstance(path, str | Path) else path
        with np.load(file, allow_pickle=False) as stored:
            about = json.loads(stored["about"].tobytes())
            arrays = {name: stored[name] for name in _ARRAYS}
    except OSError:
        raise
    except Exception as wrong:  # damaged archives, arrays and JSON raise many kinds
        raise PatternError(f"torchjac: {path} is not a saved pattern ({wrong}).") from wrong
    if about.get("format") != "torchjac pattern" or about.get("version") != _VERSION:
        raise PatternError(
            f"torchjac: {path} has format {about.get('format')!r}, version "
            f"{about.get('version')!r}; this torchjac reads 'torchjac pattern', version {_VERSION}."
        )
    shapes = [tuple(tuple(s) for s in about[k]) for k in ("row_shapes", "column_shapes")]
    m, n = (sum(int(np.prod(s, dtype=np.int64)) for s in leaf_shapes) for leaf_shapes in shapes)
    _check(path, m, n, **arrays)
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


def _check(
    path: str | Path | IO[bytes], m: int, n: int, starts: Any, columns: Any, values: Any
) -> None:
    """Refuses inconsistent arrays, which would lead to reads out of bounds."""
    nnz = len(columns)
    fits = (
        starts.shape == (m + 1,)
        and starts[0] == 0
        and starts[-1] == nnz == len(values)
        and bool((np.diff(starts) >= 0).all())
        and (nnz == 0 or (columns.min() >= 0 and columns.max() < n))
    )
    if not fits:
        raise PatternError(f"torchjac: the entries in {path} do not fit its {m} x {n} pattern.")
