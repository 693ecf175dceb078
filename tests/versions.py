"""The version of torch that runs the tests, and what the tests expect of it.

torch renames, adds and mends operations between versions. Most laws hold in all of them. What is
counted (how sharp a pattern is, what an engine refuses, and why) stands on boards in `data/`: the
board of the oldest version counted, and for each later one a file of the entries that differ
(`pattern_scoreboard-2.14.json`; null: the operation is gone). For a version that has no board the
laws are asserted and nothing is counted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

Version = tuple[int, int]

DATA = Path(__file__).parent / "data"
TORCH: Version = (int(torch.__version__.split(".")[0]), int(torch.__version__.split(".")[1]))
# The versions that were counted, in order.
COUNTED: tuple[Version, ...] = ((2, 13), (2, 14), (2, 15))


def board(name: str, version: Version = TORCH) -> dict[str, Any] | None:
    """What a board says for a version of torch; None for a version that was not counted.

    Args:
        name: Of the board, without a suffix.
        version: Of torch.
    """
    return _read(name, version) if version in COUNTED else None


def write_board(name: str, results: dict[str, Any], lines: bool = False) -> None:
    """Writes a board, or how this version differs from the one counted before it.

    Args:
        name: Of the board, without a suffix.
        found: All entries.
        lines: Whether each entry takes one line.

    Raises:
        ValueError: This version of torch is not in `COUNTED`.
    """
    if TORCH not in COUNTED:
        raise ValueError(f"torch {torch.__version__} is not counted: add it to COUNTED first")
    if COUNTED[0] != TORCH:
        before = _read(name, COUNTED[COUNTED.index(TORCH) - 1])
        keys = sorted({*before, *results})
        results = {n: results.get(n) for n in keys if before.get(n) != results.get(n)}
    if lines:
        entries = [f"{json.dumps(n)}: {json.dumps(results[n])}" for n in sorted(results)]
        text = "{\n" + ",\n".join(entries) + "\n}\n"
    else:
        text = json.dumps(results, indent=1, sort_keys=True) + "\n"
    _path(name, TORCH).write_text(text)


def _read(name: str, version: Version) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for counted in COUNTED:
        path = _path(name, counted)
        if counted <= version and path.exists():
            results |= json.loads(path.read_text())
    return {n: entry for n, entry in results.items() if entry is not None}


def _path(name: str, version: Version) -> Path:
    suffix = "" if version == COUNTED[0] else f"-{version[0]}.{version[1]}"
    return DATA / f"{name}{suffix}.json"
