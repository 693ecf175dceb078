"""The demo: `autograd.grad` sums rows, torchjac does not; then a robot arm, timed and drawn.

python examples/demo.py --poses 4096 --out demo.png
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import functional, grad
from torch.func import jacfwd, jacrev, vmap

import arm
import torchjac
from torchjac.testing import oracle

try:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
except ImportError:
    Console = None


class Timing(NamedTuple):
    name: str
    seconds: float
    remark: str = ""


def heading(text: str) -> None:
    print(f"\n── {text} {'─' * max(0, 88 - len(text))}\n")


def summed_rows() -> None:
    """The question that the library starts from."""
    heading("Why can't I hand all rows to autograd.grad at once?")
    q = torch.tensor([1.0, 2.0], requires_grad=True)
    x = torch.cat([2 * q, 4 * q * q], -1)
    naive = grad([x[0:1], x[1:2], x[2:3], x[3:4]], [q, q, q, q], retain_graph=True)
    print("x = cat([2*q, 4*q*q]) at q = [1, 2]")
    print("\ngrad([x[0:1], x[1:2], x[2:3], x[3:4]], [q, q, q, q])     the rows come back summed:")
    print("\n".join(f"    {row.tolist()}" for row in naive))
    J = torchjac.jac(x, q)
    print("\ntorchjac.jac(x, q)                                       the Jacobian:")
    print("\n".join(f"    {row}" for row in J.tolist()))
    print("\ntorchjac.last_run()                                      and how it was computed:")
    print(torchjac.last_run())


def check(q: Tensor, J: Tensor, samples: int = 3) -> float:
    """Largest difference from the row loop, over a few of the poses."""
    few = q[:samples].clone().requires_grad_()
    expected = oracle(arm.flange(few), few, batched=True)
    return (J[:samples] - expected).abs().max().item()


def seconds_of(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def row_loop(q: Tensor) -> Tensor:
    """One pass a row; summing over the batch is allowed because the poses are independent."""
    q = q.detach().requires_grad_()
    rows = arm.flange(q).sum(0)
    return torch.stack([grad(row, q, retain_graph=True)[0] for row in rows], 1)


def routes(q: Tensor) -> list[tuple[str, Callable[[], Any], float, str]]:
    """Name, call, factor on the seconds, remark. The last is measured on few poses, and scaled."""
    J = torchjac.jacobian(arm.flange, batched=True)
    few = q[: min(32, len(q))]
    pose_loop = (lambda: [functional.jacobian(arm.flange, one) for one in few], len(q) / len(few))

    def summed(q: Tensor) -> Tensor:
        return arm.flange(q).sum(0)

    return [
        ("torchjac.jacobian(f, batched=True)", lambda: J(q), 1, ""),
        ("vmap(jacrev(f))", lambda: vmap(jacrev(arm.flange))(q), 1, ""),
        ("vmap(jacfwd(f))", lambda: vmap(jacfwd(arm.flange))(q), 1, ""),
        (
            "functional.jacobian, vectorize=True",
            lambda: functional.jacobian(summed, q, vectorize=True),
            1,
            "sum trick",
        ),
        (
            "functional.jacobian",
            lambda: functional.jacobian(summed, q),
            1,
            "sum trick",
        ),
        ("loop over the rows, autograd.grad", lambda: row_loop(q), 1, "sum trick, by hand"),
        ("loop over the poses", *pose_loop, f"{len(few)} poses, scaled"),
    ]


def measure(q: Tensor, rounds: int = 9, limit: float = 8.0) -> list[Timing]:
    """Median times. All routes take turns, so that a busy machine slows them equally."""
    todo = routes(q)
    times_of_routes: list[list[float]] = [[] for _ in todo]
    status: AbstractContextManager[Any] = nullcontext()
    if Console is not None:
        status = Console().status("timing")
    end = time.perf_counter() + limit
    with status as spinner:
        for k in range(rounds + 1):  # round 0 warms up
            if k > 2 and time.perf_counter() > end:
                break
            for (name, run, *_), times in zip(todo, times_of_routes, strict=True):
                if spinner is not None:
                    spinner.update(f"timing, round {k} of {rounds}: {name}")
                elif times == []:
                    print(f"timing: {name}", flush=True)
                times.append(seconds_of(run))
    return [
        Timing(name, median(times[1:]) * factor, remark)
        for (name, _, factor, remark), times in zip(todo, times_of_routes, strict=True)
    ]


def show(timings: list[Timing]) -> None:
    """The table: milliseconds, and the ratio to torchjac's."""
    ours = timings[0].seconds
    rows = [
        (t.name, f"{t.seconds * 1e3:.1f}", f"{t.seconds / ours:.2f}×", t.remark) for t in timings
    ]
    if Console is None:
        print(f"{'route':38}{'ms':>10}{'ratio':>10}")
        for name, ms, ratio, remark in rows:
            print(f"{name:38}{ms:>10}{ratio:>10}  {remark}")
        return
    table = Table(header_style="bold", box=SIMPLE_HEAD)
    table.add_column("route", no_wrap=True)
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    table.add_column("", style="dim", no_wrap=True)
    for i, row in enumerate(rows):
        table.add_row(*row, style="bold green" if i == 0 else None)
    Console().print(table)


def robot_arm(poses: int, out: str) -> None:
    """All Jacobians of a seven-joint arm in one call, checked, timed and drawn."""
    heading(f"A seven-joint arm in {poses} poses: position and orientation, 12 outputs, 7 inputs")
    q = arm.sample(poses)
    J_of = torchjac.jacobian(arm.flange, batched=True)
    pose, J = J_of.value_and(q)
    print(f"value {tuple(pose.shape)}, Jacobian {tuple(J.shape)}, from one evaluation of f")
    print(torchjac.last_run())
    print(f"\nlargest difference from the row loop, on 3 poses: {check(q, J):.1e}")
    measure_of = arm.manipulability(pose, J)
    best = int(measure_of.argmax())
    degrees = [round(a) for a in q[best].rad2deg().tolist()]
    print(f"most dexterous pose: {degrees} degrees, manipulability {measure_of[best]:.3f}\n")
    timings = measure(q)
    show(timings)
    try:
        from demo_picture import draw
    except ImportError as error:
        print(f"\nno picture: {error.name} is not installed (pip install 'torchjac[pictures]')")
        return
    draw(q, pose, J, timings, out)
    print(f"\npicture: {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--poses", type=int, default=4096, help="poses of the arm (default 4096)")
    parser.add_argument("--out", default="demo.png", help="where the picture goes")
    arguments = parser.parse_args()
    if arguments.poses < 1:
        parser.error("--poses must be at least 1")
    summed_rows()
    robot_arm(arguments.poses, arguments.out)


if __name__ == "__main__":
    main()
