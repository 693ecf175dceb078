"""Replays known programs, and compares their C, programs and records between two revisions.

    python tools/replay.py --out now.json --texts now
    python tools/replay.py --against main~1

Collected are the C of every kernel, every program of tensor operations, and the record of every
call, as text in which names are numbered and times are left out. Decisions follow a clock that
moves only when read, so two runs of one revision agree. Results are not compared: tests do that.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_WORKERS = 2  # processes at once
_SHOWN = 4  # differences to show
_LINES = 30  # lines of each difference
_SLOWEST = 12  # slowest cases to name

# Texts of each case, or hashes of them, by kind.
Texts = dict[str, dict[str, list[str]]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Replays; 0 if all agree, 1 if revisions differ or a case crashed, 2 if nothing ran."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, help="file for the hashes, as JSON")
    parser.add_argument("--texts", type=Path, help="folder for the texts")
    parser.add_argument("--against", metavar="REV", help="a revision to compare with")
    parser.add_argument("-k", metavar="SUBSTRING", default="", help="cases with this in the name")
    asked = parser.parse_args(arguments)
    if asked.against is None:
        return _one(asked)
    return _against(asked)


def _one(asked: argparse.Namespace) -> int:
    """Replays this revision."""
    started = time.perf_counter()
    texts, crashed = replay(asked.k)
    if not texts and not crashed:
        _say(f"no case has {asked.k!r} in its name")
        return 2
    if asked.texts is not None:
        _write_texts(asked.texts, texts)
    hashes = json.dumps(_hashes(texts), indent=1, sort_keys=True) + "\n"
    if asked.out is not None:
        asked.out.write_text(hashes, encoding="utf-8")
    kinds = {k: sum(len(f[k]) for f in texts.values()) for k in ("c", "program", "record")}
    _say(f"{len(texts)} cases, {kinds}, {time.perf_counter() - started:.0f} s")
    for name in crashed:
        _say(f"crashed: {name}")
    return int(bool(crashed))


def replay(part: str) -> tuple[Texts, list[str]]:
    """The texts of all cases with `part` in their name, and the cases that crashed.

    Each case has a process of its own, forked from one that is warm: no case sees traces of another
    case.
    """
    _prepare()
    from replaying.cases import cases
    from replaying.collect import warm_up

    warm_up()
    waiting = [case for case in cases() if part in case.name]
    texts: Texts = {}
    crashed: list[str] = []
    running: dict[int, tuple[str, Path, float]] = {}
    took: dict[str, float] = {}
    total = len(waiting)
    with tempfile.TemporaryDirectory(prefix="torchjac-replay-") as folder:
        while waiting or running:
            while waiting and len(running) < _WORKERS:
                case, file = waiting.pop(0), Path(folder) / f"{len(waiting)}.json"
                running[_started(case, file)] = (case.name, file, time.perf_counter())
            process, status = os.wait()
            name, file, started = running.pop(process)
            took[name] = time.perf_counter() - started
            if status:
                crashed.append(name)
            else:
                texts.update(json.loads(file.read_text(encoding="utf-8")))
            _say(f"{total - len(waiting) - len(running)}/{total} {name}", end="\r")
    slowest = sorted(took, key=lambda name: -took[name])[:_SLOWEST]
    _say(f"\nslowest: {', '.join(f'{name} {took[name]:.1f} s' for name in slowest)}")
    return texts, crashed


def _prepare() -> None:
    """Finds torchjac, tests and benchmarks in this checkout; one thread."""
    places = [ROOT / "src", ROOT / "tests", ROOT, ROOT / "tools"]
    sys.path[:0] = [str(p) for p in places]
    import torch

    torch.set_num_threads(1)
    import torchjac

    assert Path(torchjac.__file__).is_relative_to(ROOT / "src"), torchjac.__file__


def _started(case: Any, file: Path) -> int:
    """A process that replays a case and writes its texts to a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python: there may be threads
        process = os.fork()
    if process:
        return process
    status = 1
    try:
        from replaying.collect import replayed

        file.write_text(json.dumps(replayed(case)), encoding="utf-8")
        status = 0
    except BaseException as error:
        _say(f"\n{case.name}: {type(error).__name__}: {error}")
    finally:
        os._exit(status)  # nothing of the parent's is cleaned up twice


def _hashes(texts_of_cases: Texts) -> Texts:
    from replaying.normal import digest

    return {
        case: {kind: list(map(digest, texts)) for kind, texts in about.items()}
        for case, about in texts_of_cases.items()
    }


def _write_texts(folder: Path, texts_of_cases: Texts) -> None:
    """A file for each case and kind."""
    folder.mkdir(parents=True, exist_ok=True)
    for case, about in texts_of_cases.items():
        for kind, texts in about.items():
            if texts:
                text = "\n\n".join(f"-- {i}\n{t}" for i, t in enumerate(texts))
                (folder / _file(case, kind)).write_text(text + "\n", encoding="utf-8")


def _file(case: str, kind: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', case)}.{kind}.txt"


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


# Two revisions.


def _against(asked: argparse.Namespace) -> int:
    """Replays another revision and this one, and compares."""
    with (
        tempfile.TemporaryDirectory(prefix="torchjac-against-") as name,
        _checkout(asked.against, Path(name) / "tree") as other,
    ):
        if not (other / "tools" / "replay.py").exists():
            _say(f"{asked.against} has no tools/replay.py")
            return 2
        folder = Path(name)
        whole = True
        for tree, side in ((other, "before"), (ROOT, "after")):
            _say(f"{side}: {asked.against if tree is other else 'this checkout'}")
            whole &= _run(tree, folder, side, asked.k)
            if not (folder / f"{side}.json").exists():
                return 2
        if asked.out is not None:
            asked.out.write_bytes((folder / "after.json").read_bytes())
        return compare(folder) or int(not whole)


@contextmanager
def _checkout(revision: str, tree: Path) -> Iterator[Path]:
    """A revision in a worktree of its own, removed in the end."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(tree), revision], check=True)
    try:
        yield tree
    finally:
        subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def _run(tree: Path, folder: Path, side: str, part: str) -> bool:
    """Runs a checkout's own replay; True if no case crashed."""
    out, texts = folder / f"{side}.json", folder / side
    command = [sys.executable, str(tree / "tools" / "replay.py")]
    command += ["--out", str(out), "--texts", str(texts), "-k", part]
    path = os.pathsep.join([str(tree / "src"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, cwd=tree).returncode == 0


def compare(folder: Path) -> int:
    """Prints the differences of `before` and `after` in a folder; 1 if there are any."""
    before, after = (
        json.loads((folder / f"{side}.json").read_text(encoding="utf-8"))
        for side in ("before", "after")
    )
    for name in sorted(before.keys() ^ after.keys()):
        print(f"only {'before' if name in before else 'after'}: {name}")
    different = [
        (name, kind)
        for name in sorted(before.keys() & after.keys())
        for kind in sorted(before[name].keys() | after[name].keys())
        if before[name].get(kind) != after[name].get(kind)
    ]
    for name, kind in different:
        print(f"differs: {name} ({kind})")
    for name, kind in different[:_SHOWN]:
        _show(folder, _file(name, kind))
    alike = len(before.keys() & after.keys()) - len({name for name, _ in different})
    print(f"{alike} cases are alike, {len({name for name, _ in different})} differ")
    return int(bool(different))


def _show(folder: Path, file: str) -> None:
    """Prints the first lines of a difference."""
    before, after = (
        path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for path in (folder / "before" / file, folder / "after" / file)
    )
    names = f"before/{file}", f"after/{file}"
    lines = difflib.unified_diff(before, after, *names, n=2, lineterm="")
    for line in list(lines)[:_LINES]:
        print(line)


if __name__ == "__main__":
    sys.exit(main())
