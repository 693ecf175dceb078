"""The record of what ran, and why."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from torchjac._torch.private import failures


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way in which the Jacobian could have been computed.

    Attributes:
        name: Mode and chunk.
        predicted: Seconds that the cost model expects.
        measured: Seconds of the fastest run so far, or None if it has not run.
    """

    name: str
    predicted: float
    measured: float | None


@dataclass(frozen=True, slots=True)
class Counts:
    """What a straight line of operations does, and what shaped it.

    Attributes:
        operations: How many there are.
        multiplications: One for each number that an operation computes, all of a matrix product.
        bytes: Read and written.
        constant: Share of the products behind entries that is the same for every input.
        lanes: Independent samples; 1 without a batch.
        waists: Values that took the place of rows: number of elements, operation, line.
        blame: Operations that made a sparse result dense.
    """

    operations: int
    multiplications: int
    bytes: int
    constant: float
    lanes: int = 1
    waists: tuple[str, ...] = ()
    blame: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """What one Jacobian took.

    Attributes:
        entry: The call: `jac`, `jacobian` or `hessian`.
        engine: `plain`, `color`, `accumulate`, or `torch.func` inside a torch.func transform.
        mode: `reverse`, `forward`, `replicated`, or `torch.func`.
        passes: Passes through the graph, without the one that checks.
        chunk: Seeds that one pass carried; 1 is a loop of plain passes.
        budget: Bytes that a chunk was allowed to hold; None where there was nothing to choose.
        rows: Rows m of the Jacobian (of one sample's, with a batch).
        columns: Columns n.
        batch: Number of samples, or None.
        layout: Layout of the result.
        seconds: Wall time of passes and layout, without the function itself.
        independence: How a batch is known to be independent: `proved` by lanes, or `tested`.
        pattern: The pattern that passes were restricted to, in words; None without one.
        candidates: The plans that were considered, best prediction first.
        refusals: Plans that could not be run, and why.
        counts: What an accumulated Jacobian took; None for passes.
        report: If a plan computed something else than autograd, what the issue tracker needs to
            know of it.
        degraded: Parts of torch that are not as torchjac expects in this version of torch, and
            what runs instead of them.
    """

    entry: str
    engine: str
    mode: str
    passes: int
    chunk: int
    budget: int | None
    rows: int
    columns: int
    batch: int | None
    layout: torch.layout
    seconds: float
    independence: str | None = None
    pattern: str | None = None
    candidates: tuple[Candidate, ...] = ()
    refusals: tuple[tuple[str, str], ...] = ()
    counts: Counts | None = None
    report: str | None = None
    degraded: tuple[str, ...] = field(default_factory=failures)

    def __str__(self) -> str:
        """A report of a few lines for a terminal."""
        size = f"{self.rows} x {self.columns}"
        if self.batch is not None:
            size += f", batch of {self.batch}"
        how = "row loop" if self.chunk == 1 else f"{self.chunk} at once"
        lines = [
            f"torchjac.{self.entry}: {size}, {str(self.layout).removeprefix('torch.')}",
            f"  engine   {self.engine}, {self.mode} mode",
            f"  passes   {self.passes} ({how})",
            f"  budget   {'-' if self.budget is None else _bytes(self.budget)}",
            f"  time     {_seconds(self.seconds)}",
        ]
        if self.independence is not None:
            lines.insert(3, f"  batch    independence {self.independence}")
        if self.pattern is not None:
            lines.insert(3, f"  pattern  {self.pattern}")
        if self.engine == "torch.func":
            lines = lines[:2]
        if self.counts is not None:
            lines[lines.index(f"  passes   {self.passes} ({how})")] = _counted(self.counts)
            lines += [f"  waist    {waist}" for waist in self.counts.waists]
            lines += [f"  dense by {spread}" for spread in self.counts.blame]
        if self.candidates:
            lines.append("  considered" + " " * 21 + "predicted   measured")
            for c in self.candidates:
                done = "-" if c.measured is None else _seconds(c.measured)
                lines.append(f"    {c.name:<27}{_seconds(c.predicted):>11}{done:>11}")
        for name, reason in self.refusals:
            lines.append(f"  refused  {name}: {reason}")
        lines += [f"  degraded {part}" for part in self.degraded]
        if self.report is not None:
            lines.append("  report   the issue tracker would like to see `.report` of this record")
        return "\n".join(lines)


def _counted(counts: Counts) -> str:
    parts = [
        f"{counts.operations} operations",
        f"{_count(counts.multiplications)} multiplications",
        f"{_bytes(counts.bytes)} moved",
        f"{counts.constant:.0%} constant",
    ]
    if counts.lanes > 1:
        parts.append(f"{counts.lanes} lanes")
    return f"  work     {', '.join(parts)}"


_last = threading.local()


def set_last_record(make: Callable[[], Record]) -> None:
    """Makes a record the last one of this thread; it is put together when it is asked for."""
    _last.make = make


def last_run() -> Record | None:
    """The record of the last Jacobian computed on this thread, or None.

    Example:
        >>> import torch, torchjac
        >>> q = torch.tensor([1., 2.], requires_grad=True)
        >>> J = torchjac.jac(torch.cat([2 * q, 4 * q * q], -1), q)
        >>> torchjac.last_run().passes
        1
    """
    make: Callable[[], Record] | None = getattr(_last, "make", None)
    return None if make is None else make()


def _seconds(value: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.2g} us"


def _count(value: int) -> str:
    for unit, factor in ((" G", 1e9), (" M", 1e6), (" k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return str(value)


def _bytes(value: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value} B"
