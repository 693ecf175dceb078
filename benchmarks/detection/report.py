"""What a run found: its JSON form, its tables, and which targets and laws it missed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.table import duration, size, times


@dataclass(frozen=True)
class Laws:
    """Patterns compared; None where there was nothing to compare with.

    Attributes:
        numeric: Entries of the Jacobian that are not zero at one of some random points, if all
            rows were computed.
        missed: Such entries, of the rows that were computed, that torchjac's pattern lacks.
        asdex_missed: Those that asdex's lacks.
        beyond: Entries of torchjac's pattern that asdex's lacks.
    """

    numeric: int | None = None
    missed: int | None = None
    asdex_missed: int | None = None
    beyond: int | None = None


@dataclass(frozen=True)
class Entry:
    """One problem.

    Attributes:
        name: Its name.
        spec: The call that builds it.
        m: Rows.
        n: Columns.
        timed: Whether its stages were timed.
        faster: Target: how many times faster than asdex detection has to be.
        within: Target: seconds that detection may take.
        nnz: Entries of torchjac's pattern.
        asdex_nnz: Entries of asdex's.
        first: Seconds of torchjac's first call in a process.
        peak: Bytes that torchjac's whole call took beyond what the process held.
        asdex_peak: The same of asdex.
        laws: The patterns compared.
        samples: Seconds, one sample a round: `capture`, `detect`, `whole`, `asdex`.
        failure: Why there is nothing.
        asdex_failure: Why there is nothing of asdex.
    """

    name: str
    spec: str
    m: int
    n: int
    timed: bool = True
    faster: float | None = None
    within: float | None = None
    nnz: int = 0
    asdex_nnz: int | None = None
    first: float = 0.0
    peak: int = 0
    asdex_peak: int = 0
    laws: Laws = Laws()
    samples: dict[str, tuple[float, ...]] = field(default_factory=dict)
    failure: str = ""
    asdex_failure: str = ""

    def seconds(self, stage: str) -> float | None:
        """The median."""
        samples = self.samples.get(stage)
        return statistics.median(samples) if samples else None

    def ratio(self, stage: str) -> float | None:
        """How many times longer asdex takes: the median over rounds."""
        pairs = zip(self.samples.get("asdex", ()), self.samples.get(stage, ()), strict=False)
        ratios = [a / b for a, b in pairs]
        return statistics.median(ratios) if ratios else None

    @property
    def targets(self) -> list[tuple[bool, str]]:
        """Whether each target was reached, and what came of it; without those not measured."""
        reached = []
        ratio, seconds = self.ratio("detect"), self.seconds("detect")
        if self.faster is not None and ratio is not None:
            text = f"{self.name}: {times(ratio)} faster than asdex, to reach {times(self.faster)}"
            reached.append((ratio >= self.faster, text))
        if self.within is not None and seconds is not None:
            text = f"{self.name}: {duration(seconds)}, to reach {duration(self.within)}"
            reached.append((seconds <= self.within, text))
        return reached

    @property
    def breaches(self) -> list[str]:
        """Laws that do not hold: soundness, and no more entries than asdex."""
        broken = [f"{self.name}: {self.failure}"] if self.failure else []
        if self.laws.missed:
            broken.append(f"{self.name}: the pattern lacks {self.laws.missed} nonzeros")
        if self.asdex_nnz is not None and self.nnz > self.asdex_nnz:
            broken.append(f"{self.name}: {self.nnz} entries, asdex has {self.asdex_nnz}")
        return broken


@dataclass(frozen=True)
class Report:
    """A run."""

    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    options: dict[str, Any]
    entries: list[Entry] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write all raw numbers."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> Report:
        """Read what `save` wrote."""
        raw = json.loads(path.read_text())
        entries = [
            Entry(
                **{
                    **e,
                    "laws": Laws(**e["laws"]),
                    "samples": {k: tuple(v) for k, v in e["samples"].items()},
                }
            )
            for e in raw.pop("entries")
        ]
        return Report(**raw, entries=entries)

    @property
    def breaches(self) -> list[str]:
        """Laws that do not hold."""
        return [text for entry in self.entries for text in entry.breaches]


def markdown(report: Report) -> str:
    """The tables: times, targets, laws."""
    timed = [e for e in report.entries if e.timed]
    parts = ["# Sparsity detection"]
    if timed:
        parts += [_times(timed), _where(report)]
        targets = [t for e in timed for t in e.targets]
        if targets:
            lines = [f"- {'reached' if good else '**missed**'}: {text}" for good, text in targets]
            parts += ["**Targets**", "\n".join(lines)]
    parts += ["**Patterns**", _patterns(report.entries), _LAWS]
    if report.breaches:
        parts += ["**Laws broken**", "\n".join(f"- {b}" for b in report.breaches)]
    failed = [f"- {e.name}: {e.asdex_failure}" for e in report.entries if e.asdex_failure]
    if failed:
        parts += ["**asdex failed**", "\n".join(failed)]
    return "\n\n".join(parts) + "\n"


_LAWS = (
    "Numeric: nonzeros of the Jacobian at three random points (– where only 64 of its rows were "
    "computed). Missed: such nonzeros that a pattern lacks, which for a sound one is 0. Beyond: "
    "entries of torchjac's pattern that asdex's lacks."
)


def _times(entries: Sequence[Entry]) -> str:
    head = (
        *("problem", "J", "nnz", "asdex nnz", "capture", "detect", "asdex", "detect ratio"),
        *("whole", "whole ratio", "first call", "peak", "bytes/nnz", "asdex peak"),
    )
    return _grid(head, [_row(e) for e in entries])


def _row(e: Entry) -> tuple[str, ...]:
    return (
        e.name,
        f"{e.m} x {e.n}",
        *(str(e.nnz), _or_dash(e.asdex_nnz, str)),
        *(_or_dash(e.seconds(s), duration) for s in ("capture", "detect", "asdex")),
        _or_dash(e.ratio("detect"), times),
        _or_dash(e.seconds("whole"), duration),
        _or_dash(e.ratio("whole"), times),
        duration(e.first),
        size(e.peak),
        f"{e.peak / e.nnz:.0f}" if e.nnz else "–",
        size(e.asdex_peak) if e.asdex_nnz is not None else "–",
    )


def _patterns(entries: Sequence[Entry]) -> str:
    head = ("problem", "J", "nnz", "asdex nnz", "numeric", "missed", "asdex missed", "beyond")
    rows = []
    for e in entries:
        counts = (e.asdex_nnz, e.laws.numeric, e.laws.missed, e.laws.asdex_missed, e.laws.beyond)
        rows.append((e.name, f"{e.m} x {e.n}", str(e.nnz), *(_or_dash(c, str) for c in counts)))
    return _grid(head, rows)


def _or_dash(value: Any, show: Any) -> str:
    return "–" if value is None else show(value)


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = (":--", *["--:"] * (len(head) - 1))
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rows))


def _where(report: Report) -> str:
    named = ", ".join(f"{k.removeprefix('peers ')} {v}" for k, v in report.versions.items())
    cpus = report.machine["cpus"]
    return (
        f"{report.machine['cpu']}, {cpus} CPU{'' if cpus == 1 else 's'}, {report.date[:10]}; "
        f"{named}. Medians of fresh calls after a first one, all in turns. Capture: from the "
        "function to the graph of its derivative; detect: from the graph to the pattern; whole: "
        "`torchjac.jacobian(f).pattern(x)`; asdex: `jacobian_sparsity`, its tracing included. "
        "Ratios are asdex's time over ours, medians over rounds. First call: the first in a "
        "process, lazy imports included. Peak: resident memory beyond what the process held "
        "before the whole call."
    )
