"""The first use of a plan is compared with autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchjac._torch.autograd import backward
from torchjac._torch.modes import real_values
from torchjac.capture import Program
from torchjac.capture.derivative import Derivative
from torchjac.engines.plain.check import tolerance
from torchjac.engines.plain.seeds import weights
from torchjac.errors import PlanRefused, RefusedHere
from torchjac.structure import Pattern


def agrees(
    parts: tuple[Tensor, ...],
    pattern: Pattern | None,
    derivative: Derivative,
    program: Program,
) -> None:
    """Compares u'J of the entries with a pass of autograd, for a random u.

    Raises:
        PlanRefused: They differ by more than rounding.
    """
    cotangent = weights(program.outputs)
    expected = backward(program.outputs, cotangent, program.inputs)
    every = iter(cotangent)
    live = [
        next(every) if i in program.nest.live_outputs else None
        for i in range(len(program.nest.outputs))
    ]
    finite = all(bool(p.isfinite().all()) for p in parts)
    if not finite or not all(e is None or bool(e.isfinite().all()) for e in expected):
        raise RefusedHere("values are not finite")
    with torch.no_grad(), real_values():
        if pattern is None:
            found = _products(parts, live, len(program.inputs), program.batch is not None)
        else:
            u = torch.cat(
                [
                    torch.zeros(s.numel()) if c is None else c.reshape(-1)
                    for c, s in zip(live, derivative.row_shapes, strict=True)
                ]
            )
            flat = torch.zeros(pattern.shape[1], dtype=parts[0].dtype)
            where = torch.from_numpy(pattern.columns.astype(np.int64))
            rows = torch.from_numpy(pattern.rows.astype(np.int64))
            flat.index_add_(0, where, parts[0] * u.to(parts[0].dtype)[rows])
            found = list(torch.split(flat, [t.numel() for t in program.inputs]))
        for given, want, got in zip(program.inputs, expected, found, strict=True):
            reference = torch.zeros_like(given) if want is None else want.detach()
            difference = (got.reshape(given.shape) - reference).abs()
            size = reference.abs().amax()
            eps = max(torch.finfo(t.dtype).eps for t in (given, *program.outputs))
            if not bool((difference <= tolerance(eps) * size).all()):
                raise PlanRefused("it does not agree with a pass of autograd")


def _products(
    parts: tuple[Tensor, ...], live: list[Tensor | None], inputs: int, batched: bool
) -> list[Tensor]:
    """U'J of dense blocks, for each input leaf."""
    totals: list[Any] = [0.0] * inputs
    for k, part in enumerate(parts):
        u = live[k // inputs]
        if u is None:
            continue
        if batched:
            samples = u.shape[0]
            weight = u.reshape(samples, 1, -1).to(part.dtype)
            made = weight @ part.reshape(samples, weight.shape[2], -1)
        else:
            made = u.reshape(1, -1).to(part.dtype) @ part.reshape(u.numel(), -1)
        totals[k % inputs] = totals[k % inputs] + made
    return totals
