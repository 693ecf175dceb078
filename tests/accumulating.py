"""Jacobians by the accumulate engine, whatever they cost, at any point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchjac.call import Call
from torchjac.capture.eager import capture_function
from torchjac.compiler.compile import Known, compile_jacobian
from torchjac.compiler.compiled import Compiled
from torchjac.request import Mode, Request, output_of


def plan_of(
    f: Callable[..., Any],
    *args: Any,
    argnums: int | tuple[int, ...] = 0,
    layout: torch.layout = torch.strided,
    batched: bool = False,
    orders: tuple[Mode, ...] = ("reverse", "forward"),
    **kwargs: Any,
) -> tuple[Compiled, Any]:
    """The plan of a function, and the Jacobian at these arguments.

    Raises:
        CaptureRefused, PlanRefused: There is none.
    """
    call = Call(f, argnums, False, args, kwargs)
    program, _ = capture_function(call, batched=batched, create_graph=False, replayable=False)
    request = Request(output=output_of(layout), batched=batched)
    return compile_jacobian(call, program, request, Known(passes=1.0, orders=orders))


def graph_plan_of(f: Callable[..., Any], x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The plan of a function of one tensor that keeps its graph, and the Jacobian here.

    Raises:
        CaptureRefused, PlanRefused: There is none.
    """
    call = Call(f, 0, False, (x,), {})
    program, _ = capture_function(call, batched=False, create_graph=True, replayable=False)
    plan, first = compile_jacobian(call, program, Request(create_graph=True), Known(passes=1.0))
    return lambda x: plan(Call(f, 0, False, (x,), {})), first


def run(
    plan: Compiled,
    f: Callable[..., Any],
    *args: Any,
    argnums: int | tuple[int, ...] = 0,
    **kwargs: Any,
) -> Any:
    """The Jacobian at other arguments by the plan; None where it leaves them to passes."""
    return plan(Call(f, argnums, False, args, kwargs))
