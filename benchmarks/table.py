"""The run as Markdown tables, for the results folder and for the README."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.peers import PEER_METHODS
from benchmarks.results import Measurement, Row, Run, ratio

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
BASE = "torchjac"
OURS = (BASE, "torchjac-csr", "torchjac-compiled", "torchjac-csr-compiled")
MEMORY = ("torchjac", "torchjac-csr", "jacrev", "jacfwd", "grad-rows")
"""Methods whose peak memory is shown."""
ABSENT = Measurement("absent")


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale or unit == "µs":
            return f"{_digits(seconds / scale)} {unit}"
    raise AssertionError


def times(factor: float) -> str:
    """A ratio: ``3.1x``."""
    return f"{factor:.0f}x" if factor >= 100 else f"{factor:.2g}x"


def _digits(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def size(peak: int) -> str:
    """Bytes for people."""
    return f"{peak / 1e9:.1f} GB" if peak >= 1e9 else f"{_digits(peak / 1e6)} MB"


def cell(m: Measurement, base: Measurement) -> str:
    """Time and ratio to `base`, or why there is none."""
    if m.status == "ok":
        factor = None if m is base else ratio(m, base)
        text = duration(m.seconds)
        return text if factor is None else f"{text} ({times(factor)})"
    return {
        "absent": "–",
        "memory": "out of memory",
        "timeout": m.detail,
        "wrong": "**wrong**",
        "error": "error",
    }[m.status]


def _memory(m: Measurement) -> str:
    if m.status == "memory":
        return "out of memory"
    return size(m.peak) if m.status == "ok" else "–"


def _first(m: Measurement) -> str:
    return duration(m.setup + m.first) if m.status == "ok" else "–"


def _grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = [":--", ":--", *["--:"] * (len(head) - 2)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def _table(run: Run, keys: Sequence[str], show: Callable[[Row, str], str]) -> str:
    """Workloads against methods; methods and workloads with nothing to show are left out."""
    used = [k for k in keys if any(_get(r, k).status != "absent" for r in run.rows)]
    peers = [k for k in used if k != BASE]
    rows = [r for r in run.rows if any(_get(r, k).status != "absent" for k in peers or used)]
    head = ["workload", "J", *(run.titles[k] for k in used)]
    return _grid(head, [[r.name, r.shape, *(show(r, k) for k in used)] for r in rows])


def _get(row: Row, key: str) -> Measurement:
    return row.measurements.get(key, ABSENT)


def _time_cell(row: Row, key: str) -> str:
    return cell(_get(row, key), _get(row, BASE))


def _where(run: Run) -> str:
    v = run.versions
    named = ", ".join(f"{name.removeprefix('peers ')} {text}" for name, text in v.items())
    cpus = run.machine["cpus"]
    return (
        f"{run.machine['cpu']}, {cpus} CPU{'' if cpus == 1 else 's'}, {run.date[:10]}; {named}. "
        "Median seconds a call after warm-up, all methods in turns; in brackets the time as a "
        "multiple of torchjac's (above 1x: torchjac is faster). On batched workloads `jacrev` and "
        "`jacfwd` are under `vmap`, `functional` and `grad` sum the output over the batch. Memory: "
        "peak above what the process held before the call. asdex, and CasADi where J is sparse, "
        "return the stored entries only, as torchjac CSR does. Values of every method are checked "
        "against the row loop over `torch.autograd.grad`."
    )


def readme_block(run: Run) -> str:
    """The tables for the README: PyTorch, the other systems, memory."""
    torch_keys = [k for k in run.titles if k not in PEER_METHODS]
    peer_keys = [*OURS, *(k for k in run.titles if k in PEER_METHODS)]
    parts = ["**Against PyTorch**", _table(run, torch_keys, _time_cell)]
    if any(k in PEER_METHODS for k in run.titles):
        known = [k for k in peer_keys if k in run.titles]
        parts += ["**Against other systems**", _table(run, known, _time_cell)]
    memory_keys = [k for k in MEMORY if k in run.titles]
    parts += [
        "**Peak memory**",
        _table(run, memory_keys, lambda r, k: _memory(_get(r, k))),
        _where(run),
    ]
    return "\n\n".join(parts)


def markdown(run: Run) -> str:
    """The whole report: the README's tables, first calls, and everything that went wrong."""
    parts = ["# Benchmark", readme_block(run), "**First call** (setup, tracing, compiling)"]
    parts.append(_table(run, list(run.titles), lambda r, k: _first(_get(r, k))))
    troubles = [
        f"- {row.name}, {run.titles[key]}: {m.status}: {m.detail}"
        for row in run.rows
        for key, m in row.measurements.items()
        if m.status in ("wrong", "error")
    ]
    if troubles:
        parts += ["**Wrong or failed**", "\n".join(troubles)]
    return "\n\n".join(parts) + "\n"


def update_readme(path: Path, run: Run) -> None:
    """Replace what is between the two markers.

    Raises:
        ValueError: If the markers are not there.
    """
    text = path.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{path.name} has no {BEGIN} ... {END}")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    path.write_text(f"{before}{BEGIN}\n\n{readme_block(run)}\n\n{END}{after}")
