"""Ratios to torchjac as dots on a log scale, one line a workload.

A hollow dot is a lower bound (too slow to finish); a cross at the right edge ran out of memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.methods import CALL_LIMIT
from benchmarks.peers import PEER_METHODS
from benchmarks.results import Measurement, Row, Run, ratio
from benchmarks.table import ABSENT, BASE

COLORS = (
    "#3b5bdb", "#e8590c", "#2b8a3e", "#7048e8", "#0c8599",
    "#c2255c", "#f08c00", "#868e96", "#5c940d", "#1c7ed6",
    "#343a40", "#a61e4d", "#087f5b",
)  # fmt: skip


def plot(run: Run, path: Path) -> bool:
    """Draw the run; False where matplotlib is missing or there is nothing to compare."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    peers = [key for key in run.titles if key != BASE]
    rows = [r for r in run.rows if any(_ratio(r, k) is not None for k in peers)]
    if not rows:
        return False
    rows = [r for r in run.rows if _get(r, BASE).status == "ok"]
    figure = Figure(figsize=(9.5, 1.8 + 0.34 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for i, key in enumerate(peers):
        _dots(axes, rows, key, run.titles[key], i)
    _missing(axes, rows, peers)
    axes.axvline(1.0, color="black", linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [f"{r.name}  ({r.shape})" for r in rows], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", which="major", color="#dee2e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(
        "time / torchjac's time   (right of the line: torchjac is faster)\n"
        "hollow: more than this, stopped;   x: out of memory"
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    figure.legend(loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    return True


def _get(row: Row, key: str) -> Measurement:
    return row.measurements.get(key, ABSENT)


def _ratio(row: Row, key: str) -> float | None:
    return ratio(_get(row, key), _get(row, BASE))


def _style(key: str, index: int) -> dict[str, Any]:
    marker = "^" if key in PEER_METHODS else "s" if key.startswith(BASE) else "o"
    return {"marker": marker, "color": COLORS[index % len(COLORS)]}


def _dots(axes: Any, rows: list[Row], key: str, title: str, index: int) -> None:
    points = [(f, y) for y, row in enumerate(rows) if (f := _ratio(row, key)) is not None]
    if points:
        x, y = zip(*points, strict=True)
        axes.scatter(x, y, s=34, alpha=0.85, label=title, linewidths=0, **_style(key, index))


def _missing(axes: Any, rows: list[Row], peers: list[str]) -> None:
    """Methods without a time: how long they had, or that memory ran out."""
    edge = 2 * max(f for row in rows for k in peers if (f := _ratio(row, k)) is not None)
    for y, row in enumerate(rows):
        base = _get(row, BASE).seconds
        for i, key in enumerate(peers):
            style, status = _style(key, i), _get(row, key).status
            if status == "timeout":
                bound = CALL_LIMIT / base
                style["edgecolors"] = style.pop("color")
                axes.scatter(bound, y, s=34, facecolors="none", linewidths=1.2, **style)
            elif status == "memory":
                axes.scatter(edge, y, s=30, marker="x", color="#868e96", linewidths=1.2)
