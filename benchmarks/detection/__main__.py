"""The command line: choose problems, measure, write JSON and tables."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from benchmarks.cli import _make_importable, _pin, _warn_if_busy, machine, versions
from benchmarks.detection.measure import Settings, measure
from benchmarks.detection.problems import QUICK, SMALL, TIMED, Problem, build
from benchmarks.detection.report import Entry, Report, markdown
from benchmarks.progress import progress
from benchmarks.workers import ROOT, WorkerDied, WorkerTimeout


def parser() -> argparse.ArgumentParser:
    """All options."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.detection",
        description="Time sparsity detection beside asdex, and compare the patterns.",
        epilog="For example: --only 'brusselator*' 'heat(n=1000)'.",
    )
    p.add_argument("--only", nargs="+", metavar="CALL", help="family calls, or patterns of them")
    p.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    p.add_argument("--peers-python", metavar="PATH", help="a Python with jax and asdex")
    p.add_argument("--cpus", type=int, metavar="N", help="pin every process to N CPUs")
    p.add_argument("--rounds", type=int, metavar="N", help="samples of each stage at most")
    p.add_argument("--seed", type=int, default=0, help="of the inputs")
    p.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    p.add_argument("--render", type=Path, metavar="JSON", help="measure nothing, draw this file")
    return p


def chosen(only: Sequence[str] | None, quick: bool) -> list[list[Problem]]:
    """Problems in groups that share their processes.

    Raises:
        ValueError: If a name fits nothing.
    """
    known = QUICK if quick else (*TIMED, *SMALL)
    if only:
        problems: list[Problem] = []
        for wanted in only:
            fits = [p for p in known if fnmatch(p.spec, wanted)]
            if not fits:
                build(wanted)  # a family call, or an error that lists the families
            problems += fits or [Problem(wanted)]
        known = tuple(dict.fromkeys(problems))
    if quick:
        return [list(known)]
    alone = [[p] for p in known if p.timed]
    together = [p for p in known if not p.timed]
    return [*alone, together] if together else alone


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 1 if a law does not hold."""
    p = parser()
    args = p.parse_args(argv)
    _make_importable()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.render:
        return _finish(Report.load(args.render), args.out)
    try:
        groups = chosen(args.only, args.quick)
    except ValueError as exc:
        p.error(str(exc))
    _pin(args.cpus)
    settings = Settings(peers_python=args.peers_python, seed=args.seed)
    if args.quick:
        settings = Settings(2, 2, 1.0, args.peers_python, args.seed)
    if args.rounds:
        settings = Settings(args.rounds, min(args.rounds, 3), 30.0, args.peers_python, args.seed)
    report = Report(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        machine=machine(),
        versions=versions(args.peers_python),
        options={"quick": args.quick, "seed": args.seed},
    )
    _warn_if_busy(report.machine["load_at_start"])
    with progress(sum(map(len, groups))) as announce:
        for group in groups:
            done = 0
            try:
                for entry in measure(group, settings, announce):
                    report.entries.append(entry)
                    report.save(args.out / "detection.json")  # an interrupted run keeps what it has
                    announce(f"{entry.name}: done", advance=True)
                    done += 1
            except (WorkerDied, WorkerTimeout) as exc:
                report.entries.extend(_failed(problem, exc) for problem in group[done:])
                report.save(args.out / "detection.json")
    return _finish(report, args.out)


def _failed(problem: Problem, exc: Exception) -> Entry:
    w = build(problem.spec)
    return Entry(w.name, problem.spec, w.m, w.n, problem.timed, failure=str(exc))


def _finish(report: Report, out: Path) -> int:
    text = markdown(report)
    (out / "detection.md").write_text(text)
    print(text)
    print(f"written to {out}: detection.json, detection.md")
    for breach in report.breaches:
        print(breach, file=sys.stderr)
    return 1 if report.breaches else 0


if __name__ == "__main__":
    raise SystemExit(main())
