"""Every differentiable op PyTorch describes, as a kernel: right, or refused as the board says.

The board (`data/kernel_scoreboard.json`) holds, for each op of which a plan has no kernel, why;
`python tests/test_kernel_opinfo.py` writes it anew.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from accumulating import plan_of, run
from laws import oracle_jacobian, quiet
from opinfo_exceptions import TORCH_DISAGREES
from test_accumulate import OPS, agrees, cases, elsewhere, realized
from test_kernel import cache  # noqa: F401
from torchjac.call import Call, arguments
from torchjac.compiler.compiled import Compiled
from torchjac.compiler.native import with_kernel
from torchjac.errors import CaptureRefused, PlanRefused
from versions import COUNTED, board, write_board

SCOREBOARD = "kernel_scoreboard"


def plan(f: Any, *args: Any, argnums: Any) -> Compiled | None:
    """Its plan; None if the accumulate engine has none."""
    try:
        return plan_of(f, *args, argnums=argnums)[0]
    except (CaptureRefused, PlanRefused, RuntimeError):
        return None


def refusal(n: str) -> str | None:
    """Checks the smallest sample of an op, in both precisions; gives why there is no kernel."""
    why = None
    for case in sorted(cases(n), key=lambda c: c.size)[-1:]:
        f, tensors = realized(case), case.tensors
        argnums = tuple(range(len(tensors)))
        for dtype in (torch.float64, torch.float32):
            torch.manual_seed(0)
            points = [tensors, *(elsewhere(tensors, k) for k in range(2))]
            inputs = [tuple(x.detach().to(dtype) for x in point) for point in points]
            compiled = (
                plan(f, *inputs[0], argnums=argnums) if all(map(_filled, inputs[0])) else None
            )
            if compiled is None:
                continue
            call = Call(f, argnums, False, inputs[0], {})
            try:
                compiled = replace(
                    compiled, program=with_kernel(compiled.programs, arguments(call), None, 20.0)
                )
            except PlanRefused as refused:
                why = why or re.sub(r"\d+", "n", str(refused).split("; ")[0])
                continue
            for point in () if n in TORCH_DISAGREES else inputs:
                try:
                    want = oracle_jacobian(f, argnums)(*point)
                except RuntimeError:  # not defined there
                    continue
                agrees(run(compiled, f, *point, argnums=argnums), want)
    return why


def _filled(x: torch.Tensor) -> bool:
    return bool(x.numel())


@pytest.mark.parametrize("n", OPS)
def test_operations(n: str) -> None:
    """Its largest small sample, in double and single precision, here and elsewhere."""
    with quiet():
        reason, counted = refusal(n), board(SCOREBOARD)
    if counted is not None:
        assert reason == counted.get(n)


def test_refusals_are_meant() -> None:
    """None of them is an error that nobody thought of, in any version of torch."""
    for version in COUNTED:
        counted = board(SCOREBOARD, version)
        assert counted is not None
        assert not [n for n, why in counted.items() if "Error: " in why]


if __name__ == "__main__":
    with quiet():
        write_board(SCOREBOARD, {n: why for n in OPS if (why := refusal(n)) is not None})
