"""The command line: choose, measure, write JSON, table and plot."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.measure import Settings, all_methods, measure
from benchmarks.methods import Method
from benchmarks.plot import plot
from benchmarks.progress import progress
from benchmarks.results import Measurement, Row, Run
from benchmarks.table import markdown, update_readme
from benchmarks.workers import ROOT
from benchmarks.workloads import QUICK, REGISTRY, build

PACKAGES = ("jax", "asdex", "casadi", "numpy")


def parser() -> argparse.ArgumentParser:
    """All options."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time torchjac and its peers side by side in one run on this machine.",
        epilog="Other sizes: --only 'arm(joints=12, poses=100)' 'nbody(bodies=64)'.",
    )
    p.add_argument("--only", nargs="+", metavar="NAME", help="names, patterns or family calls")
    p.add_argument("--methods", nargs="+", metavar="KEY", help="only these (see --list)")
    p.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    p.add_argument("--quick", action="store_true", help="small workloads, few repeats, no compile")
    p.add_argument("--peers-python", metavar="PATH", help="a Python with jax, asdex, casadi")
    p.add_argument("--memory", type=float, default=8.0, metavar="GIB", help="limit a method")
    p.add_argument("--cpus", type=int, metavar="N", help="pin every process to N CPUs")
    p.add_argument("--seed", type=int, default=0, help="of the inputs")
    p.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    p.add_argument("--update-readme", action="store_true", help="write the table into README.md")
    p.add_argument("--render", type=Path, metavar="JSON", help="measure nothing, draw this file")
    p.add_argument("--list", action="store_true", help="show workloads and methods")
    return p


def chosen_workloads(only: Sequence[str] | None, quick: bool) -> list[str]:
    """Names and calls to run.

    Raises:
        ValueError: If a name fits nothing.
    """
    if not only:
        return list(QUICK if quick else REGISTRY)
    specs: list[str] = []
    for wanted in only:
        fits = [name for name in REGISTRY if fnmatch(name, wanted)]
        if not fits:
            build(wanted)  # a family call, or an error that lists the names
        specs += fits or [wanted]
    return list(dict.fromkeys(specs))


def chosen_methods(args: argparse.Namespace) -> list[Method]:
    """Methods to run, torchjac first.

    Raises:
        ValueError: If a key fits nothing.
    """
    known = all_methods()
    unknown = set(args.methods or ()) - known.keys()
    if unknown:
        raise ValueError(f"no method {sorted(unknown)}; keys: {', '.join(known)}")
    keys = [key for key in known if not args.methods or key in args.methods]
    if args.no_compile or args.quick:
        compiling = {k for k, m in known.items() if m.compiles and m.prepare is not None}
        compiling -= set(args.methods or ())
        keys = [k for k in keys if k not in compiling]
    if not args.peers_python:
        keys = [key for key in keys if known[key].prepare is not None]
    return [known[key] for key in keys]


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((x.split(":", 1)[1].strip() for x in lines if "model name" in x), model)
    load = os.getloadavg() if hasattr(os, "getloadavg") else ()
    return {
        "cpu": model,
        "cpus": _cpus(),
        "system": platform.system(),
        "load_at_start": [round(x, 2) for x in load],
    }


def _cpus() -> int:
    """CPUs that the processes may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _pin(cpus: int | None) -> None:
    """Restrict this process, and with it every worker of every system, to `cpus` CPUs."""
    if cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])


def _warn_if_busy(load: Sequence[float]) -> None:
    # A second thread that has to wait for a CPU costs a scheduler's time slice at every
    # parallel loop: 0.3 ms became 16 ms on two CPUs with one busy neighbor.
    if load and load[0] > 0.25 * _cpus():
        print(
            f"the machine is busy (load {load[0]}): multi-threaded times will be far off; "
            "wait for quiet or measure on one CPU with --cpus 1",
            file=sys.stderr,
        )


def versions(peers_python: str | None) -> dict[str, str]:
    """Of Python and every package compared."""
    import torch

    by_package = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        by_package["torchjac"] = metadata.version("torchjac")
    except metadata.PackageNotFoundError:
        by_package["torchjac"] = "source tree"
    if peers_python:
        code = "import sys, importlib.metadata as m; [print(p, m.version(p)) for p in sys.argv[1:]]"
        done = subprocess.run(
            [peers_python, "-c", code, *PACKAGES], capture_output=True, text=True, check=False
        )
        by_package.update(
            {f"peers {name}": v for name, v in (x.split() for x in done.stdout.splitlines())}
        )
    return by_package


def _make_importable() -> None:
    """Let workers find `benchmarks`, and torchjac in a checkout that is not installed."""
    places = [str(ROOT), str(ROOT / "src")]
    sys.path[:0] = [p for p in places if p not in sys.path]
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*places, *([inherited] if inherited else [])])


def _list() -> None:
    for name, call in REGISTRY.items():
        w = build(name)
        print(f"{name:24} {w.shape:22} {w.stands_for}  [{call}]")
    print("\nmethods:", ", ".join(all_methods()))


def _report(run: Run, out: Path, readme: bool) -> None:
    (out / "benchmark.md").write_text(markdown(run))
    drawn = plot(run, out / "benchmark.png")
    if readme:
        update_readme(ROOT / "README.md", run)
    print(f"written to {out}: benchmark.json, benchmark.md" + (", benchmark.png" if drawn else ""))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 1 if any method gave wrong values."""
    p = parser()
    args = p.parse_args(argv)
    _make_importable()
    if args.list:
        _list()
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    if args.render:
        _report(Run.load(args.render), args.out, args.update_readme)
        return 0
    try:
        specs, methods = chosen_workloads(args.only, args.quick), chosen_methods(args)
    except ValueError as exc:
        p.error(str(exc))
    _pin(args.cpus)
    settings = Settings(
        memory=int(args.memory * 2**30), peers_python=args.peers_python, seed=args.seed
    )
    if args.quick:
        settings = replace(settings, rounds=7, method_seconds=0.2)
    run = Run(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        machine=machine(),
        versions=versions(args.peers_python),
        options={"quick": args.quick, "seed": args.seed, "memory_gib": args.memory},
        titles={m.key: m.title for m in methods},
    )
    _warn_if_busy(run.machine["load_at_start"])
    with progress(len(specs)) as announce:
        for spec in specs:
            row = _row(spec, methods, settings, announce)
            run.rows.append(row)
            run.save(args.out / "benchmark.json")  # an interrupted run keeps what it has
            announce(f"{row.name}: done", advance=True)
    print(markdown(run))
    _report(run, args.out, args.update_readme)
    wrong = [f"{r.name}/{k}" for r in run.rows for k, m in r.measurements.items() if _bad(m)]
    if wrong:
        print("wrong values:", ", ".join(wrong))
    return 1 if wrong else 0


def _bad(m: Measurement) -> bool:
    return m.status == "wrong"


def _row(spec: str, methods: Sequence[Method], settings: Settings, announce: Any) -> Row:
    """One workload; if even its reference fails, a row that says so."""
    try:
        return measure(spec, methods, settings, lambda text: announce(f"{spec}: {text}"))
    except RuntimeError as exc:
        w = build(spec)
        failed = {m.key: Measurement("error", detail=f"no reference: {exc}") for m in methods}
        return Row(w.name, spec, w.shape, w.stands_for, failed)
