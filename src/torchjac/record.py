"""The record of a run: which plan computed the Jacobian, and why."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from torchjac._torch.private import failures


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that could have computed the Jacobian.

    Attributes:
        name: Mode and chunk.
        predicted: Seconds that the cost model predicts.
        measured: Seconds of the fastest run so far; None if the plan has not run.
    """

    name: str
    predicted: float
    measured: float | None


@dataclass(frozen=True, slots=True)
class Counts:
    """The work of a tensor program, and the operations that shaped it.

    Attributes:
        operations: Number of tensor operations.
        multiplications: Number of computed elements; of a matrix product, its multiplications.
        bytes: Bytes that operations read and write.
        constant: Share, from 0 to 1, of the terms of the entries that is the same for every input.
        lanes: Number of independent samples; 1 without a batch.
        waists: Bottlenecks, values at which J was split: number of elements, operation, line.
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
    """The plan of one Jacobian, and its costs.

    Attributes:
        entry: The call: `jac`, `jacobian` or `hessian`.
        engine: `plain`, `color`, `accumulate`, or `torch.func` inside a torch.func transform.
        mode: `reverse`, `forward`, `replicated`, or `torch.func`.
        passes: Number of passes through the graph, without those that check.
        chunk: Largest number of seeds in one pass; 1 is a loop of plain passes.
        budget: Largest number of bytes of a chunk; None where no plan was chosen.
        rows: Number of rows m of the Jacobian; of one sample's, with a batch.
        columns: Number of columns n of the Jacobian; of one sample's, with a batch.
        batch: Number of samples; None without a batch.
        layout: Layout of the result.
        seconds: Wall time of passes and layout, without the run of the function.
        independence: `proved` or `tested`, for the independence of samples; None without a batch.
        pattern: The pattern that passes were restricted to, in words; None without one.
        candidates: The plans that were considered, best prediction first.
        refusals: Name and reason of each plan that was refused.
        counts: The work of an accumulated Jacobian; None for passes.
        report: The bug report of a plan that disagreed with autograd; None if none did.
        degraded: Parts of this version of torch without their expected behavior, each with the
            replacement that runs instead.
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
        """A summary of a few lines for a terminal."""
        size = f"{self.rows} x {self.columns}"
        if self.batch is not None:
            size += f", batch of {self.batch}"
        chunks = "row loop" if self.chunk == 1 else f"{self.chunk} at once"
        lines = [
            f"torchjac.{self.entry}: {size}, {str(self.layout).removeprefix('torch.')}",
            f"  engine   {self.engine}, {self.mode} mode",
            f"  passes   {self.passes} ({chunks})",
            f"  budget   {'-' if self.budget is None else _format_bytes(self.budget)}",
            f"  time     {_format_seconds(self.seconds)}",
        ]
        if self.independence is not None:
            lines.insert(3, f"  batch    independence {self.independence}")
        if self.pattern is not None:
            lines.insert(3, f"  pattern  {self.pattern}")
        if self.engine == "torch.func":
            lines = lines[:2]
        if self.counts is not None:
            lines[lines.index(f"  passes   {self.passes} ({chunks})")] = _format_work(self.counts)
            lines += [f"  waist    {waist}" for waist in self.counts.waists]
            lines += [f"  dense by {spread}" for spread in self.counts.blame]
        if self.candidates:
            lines.append("  considered" + " " * 21 + "predicted   measured")
            for c in self.candidates:
                done = "-" if c.measured is None else _format_seconds(c.measured)
                lines.append(f"    {c.name:<27}{_format_seconds(c.predicted):>11}{done:>11}")
        for name, reason in self.refusals:
            lines.append(f"  refused  {name}: {reason}")
        lines += [f"  degraded {part}" for part in self.degraded]
        if self.report is not None:
            lines.append("  report   the issue tracker would like to see `.report` of this record")
        return "\n".join(lines)


def _format_work(counts: Counts) -> str:
    parts = [
        f"{counts.operations} operations",
        f"{_format_count(counts.multiplications)} multiplications",
        f"{_format_bytes(counts.bytes)} moved",
        f"{counts.constant:.0%} constant",
    ]
    if counts.lanes > 1:
        parts.append(f"{counts.lanes} lanes")
    return f"  work     {', '.join(parts)}"


_last = threading.local()


def set_last_record(make: Callable[[], Record]) -> None:
    """Sets the last record of this thread.

    Args:
        make: Makes the record; called whenever `last_run` is.
    """
    _last.make = make


def last_run() -> Record | None:
    """The record of the last Jacobian computed on this thread; None before the first one.

    Example:
        >>> import torch, torchjac
        >>> q = torch.tensor([1., 2.], requires_grad=True)
        >>> J = torchjac.jac(torch.cat([2 * q, 4 * q * q], -1), q)
        >>> torchjac.last_run().passes
        1
    """
    make: Callable[[], Record] | None = getattr(_last, "make", None)
    return None if make is None else make()


def _format_seconds(value: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.2g} us"


def _format_count(value: int) -> str:
    for unit, factor in ((" G", 1e9), (" M", 1e6), (" k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return str(value)


def _format_bytes(value: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value} B"
