"""Pictures of a pattern: dots in a terminal, a plot in a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torchjac.sparsity.pattern import Pattern

# Bits of the dots of a braille character, added to its code point (U+2800 without dots).
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
_EMPTY = 0x2800
# Entries of a pattern: above this, a plot shows cells instead of one mark per entry.
_MARKS = 20_000


def braille(pattern: Pattern, width: int = 64, height: int = 24) -> str:
    """The pattern in braille characters, with a dot for each cell that holds an entry.

    Args:
        pattern: The pattern.
        width: Largest number of characters in a line; each is two dots wide.
        height: Largest number of lines; each is four dots high.
    """
    m, n = pattern.shape
    if not m or not n:
        return ""
    scale = max(m / (4 * height), n / (2 * width), 1.0)
    cells = _cells(pattern, -(-int(np.ceil(m / scale)) // 4) * 4, scale)
    lines = []
    for top in range(0, cells.shape[0], 4):
        blocks = cells[top : top + 4].reshape(4, -1, 2)
        codes = (blocks * _DOTS[:, None, :]).sum((0, 2)) + _EMPTY
        lines.append("".join(map(chr, codes)))
    return "\n".join(lines)


def _cells(pattern: Pattern, rows: int, scale: float) -> NDArray[np.bool_]:
    columns = -(-int(np.ceil(pattern.shape[1] / scale)) // 2) * 2
    cells = np.zeros((rows, columns), dtype=bool)
    cells[(pattern.rows / scale).astype(int), (pattern.columns / scale).astype(int)] = True
    return cells


def summary(pattern: Pattern) -> str:
    """A framed picture of the pattern, and its properties in a few lines."""
    m, n = pattern.shape
    picture = braille(pattern)
    lines = [f"Pattern {m} x {n}, {pattern.nnz} nonzeros ({_percent(pattern.density)})"]
    if picture:
        edge = "-" * max(map(len, picture.split("\n")))
        lines = [*lines, f"+{edge}+", *(f"|{line}|" for line in picture.split("\n")), f"+{edge}+"]
    counts = pattern.row_counts, pattern.column_counts
    if pattern.nnz:
        most = [int(c.max()) for c in counts]
        lines.append(f"  in a row, column  at most {most[0]}, {most[1]}")
        below, above = pattern.bandwidth
        lines.append(f"  bandwidth         {below} below, {above} above the diagonal")
        share = pattern.constant.mean()
        lines.append(f"  constant          {_percent(share)} of the entries")
    if pattern.blocks.size > 1:
        lines.append("  by leaf           " + _blocks(pattern))
    if pattern.lanes:
        lines.append("  lanes             " + ", ".join(map(_lane, pattern.lanes[:4])))
    valid = "every input of these shapes" if pattern.scope == "global" else "these values only"
    lines.append(f"  valid for         {valid}" + (f": {pattern.reason}" if pattern.reason else ""))
    for spread in pattern.blame[:3]:
        lines.append(f"  made dense by     {spread}")
    for assumption in pattern.assumed[:3]:
        lines.append(f"  assumed           {assumption}")
    return "\n".join(lines)


def spy(pattern: Pattern, path: str | Path | None = None, ax: Any = None) -> Any:
    """Plots a pattern, with constant entries in another color and lines between leaves.

    Args:
        pattern: The pattern.
        path: A file to save the picture in, by its ending (.png, .svg, .pdf).
        ax: Matplotlib axes to draw into; new ones by default.

    Returns:
        The axes.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    axes = _new_axes(pattern) if ax is None else ax
    m, n = pattern.shape
    constant = pattern.constant
    if pattern.nnz <= _MARKS:
        size = max(0.5, min(8.0, 250.0 / max(m, n, 1)))
        for mask, color, label in (
            (~constant, "#20639b", "depends on the input"),
            (constant, "#e08e2b", "constant"),
        ):
            if mask.any():
                axes.plot(
                    pattern.columns[mask],
                    pattern.rows[mask],
                    "s",
                    ms=size,
                    color=color,
                    label=label,
                    mew=0,
                )
        if pattern.nnz:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, markerscale=2)
    else:
        scale = max(m, n) / 400
        cells = _cells(pattern, int(np.ceil(m / scale)), scale)
        axes.imshow(
            cells,
            cmap="Blues",
            aspect="auto",
            extent=(-0.5, n - 0.5, m - 0.5, -0.5),
            interpolation="nearest",
        )
    _lines_between(axes, pattern)
    axes.set_xlim(-0.5, n - 0.5)
    axes.set_ylim(m - 0.5, -0.5)
    axes.set_xlabel(f"{n} inputs")
    axes.set_ylabel(f"{m} outputs")
    axes.set_title(f"{pattern.nnz} nonzeros, {_percent(pattern.density)}")
    if path is not None:
        axes.figure.savefig(path, dpi=160, bbox_inches="tight")
    return axes


def _new_axes(pattern: Pattern) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError(
            "torchjac: plots need matplotlib: pip install 'torchjac[pictures]'. In a terminal "
            "print(pattern) shows the same in characters."
        ) from missing
    m, n = pattern.shape
    height = float(np.clip(5 * m / max(n, 1), 2.5, 9))
    return Figure(figsize=(5.5, height)).subplots()


def _lines_between(axes: Any, pattern: Pattern) -> None:
    for shapes, line in ((pattern.row_shapes, axes.axhline), (pattern.column_shapes, axes.axvline)):
        for end in np.cumsum([int(np.prod(s)) for s in shapes])[:-1]:
            line(end - 0.5, color="#999999", lw=0.8)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _lane(lane: Any) -> str:
    return f"out[{lane.output}] axis {lane.output_axis} = in[{lane.input}] axis {lane.input_axis}"


def _blocks(pattern: Pattern) -> str:
    return "; ".join(" ".join(str(c) for c in line) for line in pattern.blocks[:6])
