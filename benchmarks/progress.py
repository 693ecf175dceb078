"""Where the run is: a bar with rich, plain lines without."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Protocol


class Announce(Protocol):
    """Says what is running; `advance` when a workload is done."""

    def __call__(self, text: str, advance: bool = False) -> None:
        """Show `text`."""


@contextlib.contextmanager
def progress(total: int) -> Iterator[Announce]:
    """An `Announce` for `total` workloads; on a terminal with rich a live bar."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeElapsedColumn as Elapsed
    except ImportError:
        Progress = None  # type: ignore[assignment, misc]
    if Progress is None or not sys.stderr.isatty():
        yield _lines(total)
        return
    from rich.console import Console

    columns = (BarColumn(24), MofNCompleteColumn(), Elapsed(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("start", total=total)

        def announce(text: str, advance: bool = False) -> None:
            bar.update(task, description=text, advance=1 if advance else 0)

        yield announce


def _lines(total: int) -> Announce:
    start, done = time.monotonic(), 0

    def announce(text: str, advance: bool = False) -> None:
        nonlocal done
        if advance:
            done += 1
            seconds = time.monotonic() - start
            print(f"[{done}/{total}] {seconds:6.1f} s  {text}", file=sys.stderr, flush=True)

    return announce
