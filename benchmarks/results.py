"""What a run found, and its JSON form."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "wrong", "timeout", "memory", "error", "absent"]


@dataclass(frozen=True)
class Measurement:
    """One method on one workload.

    Attributes:
        status: ``ok``; ``wrong`` values; too slow; out of memory; an error; not applicable.
        detail: The limit or the message behind a status that is not ``ok``.
        samples: Seconds a call, one number a round (the same round of all methods is adjacent
            in time); a slow method has a single sample from its probe.
        rounds: Whether `samples` are rounds, so that ratios can be paired.
        setup: Seconds to prepare (capture, detect, color), before the first call.
        first: Seconds of the first call (tracing and compiling included).
        peak: Bytes above the resident memory before the call.
        error: Largest deviation from the reference, by row scale.
    """

    status: Status
    detail: str = ""
    samples: tuple[float, ...] = ()
    rounds: bool = False
    setup: float = 0.0
    first: float = 0.0
    peak: int = 0
    error: float = 0.0

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(self.samples)


def ratio(one: Measurement, base: Measurement) -> float | None:
    """Time of `one` over time of `base`: the median over paired rounds, or of medians.

    Pairs count only where they are most of the rounds: a method of few slow rounds met the other
    in its first rounds alone, and those stand for nothing.
    """
    if one.status != "ok" or base.status != "ok":
        return None
    lengths = sorted((len(one.samples), len(base.samples)))
    if one.rounds and base.rounds and 2 * lengths[0] >= lengths[1]:
        pairs = zip(one.samples, base.samples, strict=False)
        return statistics.median(a / b for a, b in pairs)
    return one.seconds / base.seconds


@dataclass(frozen=True)
class Row:
    """One workload: who it is, and a measurement per method key."""

    name: str
    spec: str
    shape: str
    stands_for: str
    measurements: dict[str, Measurement]


@dataclass(frozen=True)
class Run:
    """Everything that a run found."""

    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    options: dict[str, Any]
    titles: dict[str, str]
    rows: list[Row] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write all raw numbers."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> Run:
        """Read what `save` wrote."""
        raw = json.loads(path.read_text())
        rows = [
            Row(
                **{
                    **row,
                    "measurements": {
                        key: Measurement(**{**m, "samples": tuple(m["samples"])})
                        for key, m in row["measurements"].items()
                    },
                }
            )
            for row in raw.pop("rows")
        ]
        return Run(**raw, rows=rows)
