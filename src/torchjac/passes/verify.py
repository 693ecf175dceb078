"""Results of a plan are compared with passes of autograd: u'J and Jv for random u and v."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchjac._torch import modes
from torchjac._torch.autograd import backward
from torchjac.capture.eager_graph import EagerGraph
from torchjac.errors import Disagrees, PlanRefused, RefusedHere
from torchjac.passes.autograd_graph import survey
from torchjac.passes.forward import recorded, refuse_beforehand
from torchjac.passes.freivalds import tolerance
from torchjac.passes.seeds import weights
from torchjac.passes.structure import analyze
from torchjac.request import Output
from torchjac.sparsity.pattern import Pattern

Parts = Sequence[Tensor]
# A product smaller than this, or than this share of the largest, may be what is left of numbers
# that canceled.
_SMALL = 1e-3


class Reference:
    """Products of a Jacobian with random vectors, by passes over the graph of its program.

    Attributes:
        pushes: Whether there is Jv. There is none where code of the user's runs in the backward
            pass, which need not be linear, and may detach what it gives: the derivative of that
            pass is not known to be the transposed Jacobian then.
    """

    def __init__(self, program: EagerGraph):
        """Runs the passes.

        Raises:
            RefusedHere: They are not finite.
        """
        self._program = program
        self._seeds = weights(program.outputs)
        self._tangents = [w.detach() for w in weights(program.inputs)]
        self._pushed: Sequence[Tensor | None] | None = None
        self._recorded: Sequence[Tensor | None] | None = None
        try:
            # One row needs no survey to be evaluated; here it does.
            refuse_beforehand(program, replace(analyze(program), graph=survey(program)))
            with modes.recording():
                gradients, _ = recorded(program, self._seeds)
                self._pushed = self._forward(gradients)
            self._recorded = gradients
        except (PlanRefused, RuntimeError):  # not to be had; u'J is
            gradients = backward(program.outputs, self._seeds, program.inputs)
        self.pushes = self._pushed is not None
        self._seeds = [seed.detach() for seed in self._seeds]
        self._pulled = [None if g is None else g.detach() for g in gradients]
        if not all(_finite(found) for found in (self._pulled, self._pushed or ())):
            raise RefusedHere("values are not finite")

    def _forward(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        pairs = [
            (g, v)
            for g, v in zip(gradients, self._tangents, strict=True)
            if g is not None and g.requires_grad
        ]
        found = backward([g for g, _ in pairs], [v for _, v in pairs], self._seeds)
        return [None if f is None else f.detach() for f in found]

    def check(self, parts: Parts, output: Output) -> None:
        """Compares a result.

        Args:
            parts: The parts of the output (`layout.assemble`).
            output: The output, with its pattern if it has one.

        Raises:
            Disagrees: They differ by more than rounding.
            RefusedHere: The result is not finite, or too small to be told from rounding.
        """
        if not _finite(parts):
            raise RefusedHere("values are not finite")
        nest = self._program.nest
        given, made = self._program.inputs, self._program.outputs
        seeds, tangents = _spread(self._seeds, nest.live_outputs, len(nest.outputs)), self._tangents
        with torch.no_grad(), modes.real_values():

            def products(of: Parts, u: Sequence[Tensor | None], v: Parts) -> tuple[Any, Any]:
                if output.pattern is not None:
                    return _sparse(of[0], output.pattern, u, v)
                return _dense(of, u, v, self._program.batch is not None)

            pulled, pushed = products(parts, seeds, tangents)
            # What is added up may be far larger than the sum: rounding is as large as that.
            sizes = products(
                [p.abs() for p in parts],
                [None if s is None else s.abs() for s in seeds],
                [t.abs() for t in tangents],
            )
            self._compare("u'J", pulled, self._pulled, sizes[0], given)
            if self._pushed is not None:
                live, most = ([found[i] for i in nest.live_outputs] for found in (pushed, sizes[1]))
                self._compare("Jv", live, self._pushed, most, made)

    def check_graph(self, parts: Parts, leaves: Parts, beside: Parts) -> None:
        """Compares the derivative of a dense result: that of <u'J, w> for random u and w.

        Args:
            parts: Blocks that have a graph, row by row.
            leaves: What they were computed from in the place of the inputs.
            beside: Other tensors that they and the program were computed from.

        Raises:
            PlanRefused: Code of the user's runs in the backward pass.
            Disagrees: They differ by more than rounding.
            RefusedHere: They are not finite.
        """
        if self._recorded is None:
            raise PlanRefused("code of the user's may run in the backward pass")
        nest, given = self._program.nest, self._program.inputs
        seeds = _spread(self._seeds, nest.live_outputs, len(nest.outputs))
        found, _ = _dense(parts, seeds, self._tangents, self._program.batch is not None)
        every = [
            (f.reshape(w.shape), g, w)
            for f, g, w in zip(found, self._recorded, self._tangents, strict=True)
            if isinstance(f, Tensor) and g is not None
        ]
        mine = sum((f * w).sum() for f, _, w in every)
        other = sum((g * w).sum() for _, g, w in every)
        got = _gradients(mine, [*leaves, *beside])
        want = _gradients(other, [*given, *beside])
        if not (_finite(got) and _finite(want)):
            raise RefusedHere("values are not finite")
        zeros = [torch.zeros_like(t) for t in (*given, *beside)]
        filled = [z if g is None else g for g, z in zip(got, zeros, strict=True)]
        sizes = [z.abs() if w is None else w.abs() for w, z in zip(want, zeros, strict=True)]
        largest = max(float(s.amax()) for s in sizes if s.numel())
        sizes = [s.clamp(min=1e-6 * largest) for s in sizes]  # some need not matter at all
        self._compare("the derivative of <u'J, w>", filled, want, sizes, zeros)

    def _compare(
        self,
        name: str,
        found: Sequence[Any],
        wanted: Sequence[Tensor | None],
        sizes: Sequence[Any],
        like: Parts,
    ) -> None:
        kinds = (*self._program.inputs, *self._program.outputs)
        bound = _bound(max(torch.finfo(t.dtype).eps for t in kinds))
        every: list[tuple[float, float]] = []
        for got, want, most, leaf in zip(found, wanted, sizes, like, strict=True):
            reference = torch.zeros_like(leaf) if want is None else want
            given = got.reshape(leaf.shape) if isinstance(got, Tensor) else torch.zeros_like(leaf)
            largest = torch.maximum(reference.abs().amax(), torch.as_tensor(most).amax().to(leaf))
            every.append((float((given - reference).abs().amax()), float(largest)))
        floor = _SMALL * min(1.0, max((size for _, size in every), default=0.0))
        for number, (difference, size) in enumerate(every):
            if difference <= bound * max(size, floor):
                continue
            if difference <= bound * _SMALL:
                raise RefusedHere("values are too small to be told from rounding")
            raise Disagrees(
                f"it does not agree with a pass of autograd: {name} of leaf {number} differs "
                f"by {difference:.3g}, where the largest element is {size:.3g}"
            )


def _bound(eps: float) -> float:
    """Relative disagreement put down to rounding: more than between passes over one graph.

    A plan computes the function's values anew, in another order, and a derivative may be far more
    sensitive to them than they are exact. What is wrong is wrong by much more.
    """
    return max(tolerance(eps), min(1e5 * eps, 1e-3))


def _gradients(value: Any, leaves: Parts) -> Sequence[Tensor | None]:
    """Gradients of a number with respect to tensors; None where it does not depend on one."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return [None] * len(leaves)
    used = [leaf.requires_grad for leaf in leaves]
    one = torch.ones_like(value)
    found = iter(backward([value], [one], [x for x, u in zip(leaves, used, strict=True) if u]))
    return [next(found) if u else None for u in used]


def _finite(tensors: Sequence[Tensor | None]) -> bool:
    return all(t is None or bool(t.isfinite().all()) for t in tensors)


def _spread(values: Sequence[Tensor], places: Sequence[int], size: int) -> list[Tensor | None]:
    """Values in their places, None elsewhere."""
    found: list[Tensor | None] = [None] * size
    for place, value in zip(places, values, strict=True):
        found[place] = value
    return found


def _sparse(
    values: Tensor, pattern: Pattern, seeds: Sequence[Tensor | None], tangents: Parts
) -> tuple[list[Tensor], list[Tensor]]:
    """Products u'J for each input leaf and Jv for each output leaf."""
    heights = [math.prod(s) for s in pattern.row_shapes]
    widths = [math.prod(s) for s in pattern.column_shapes]
    rows = torch.from_numpy(pattern.rows.astype(np.int64))
    columns = torch.from_numpy(pattern.columns.astype(np.int64))
    sides = [
        torch.zeros(size) if s is None else s.reshape(-1)
        for s, size in zip(seeds, heights, strict=True)
    ]
    u, v = torch.cat(sides).to(values.dtype), torch.cat([t.reshape(-1) for t in tangents])
    pulled = values.new_zeros(sum(widths)).index_add_(0, columns, values * u[rows])
    pushed = values.new_zeros(sum(heights))
    pushed.index_add_(0, rows, values * v.to(values.dtype)[columns])
    return list(torch.split(pulled, widths)), list(torch.split(pushed, heights))


def _dense(
    parts: Parts, seeds: Sequence[Tensor | None], tangents: Parts, batched: bool
) -> tuple[list[Any], list[Any]]:
    """As `_sparse`, of blocks."""
    pulled: list[Any] = [0.0] * len(tangents)
    pushed: list[Any] = [0.0] * len(seeds)
    for part, (i, j) in zip(parts, product(range(len(seeds)), range(len(tangents))), strict=True):
        u, v = seeds[i], tangents[j]
        if u is None:
            continue
        samples = u.shape[0] if batched else 1
        left = u.reshape(samples, 1, -1).to(part.dtype)
        block = part.reshape(samples, left.shape[2], -1)
        right = v.reshape(samples, -1, 1).to(part.dtype)
        pulled[j] = pulled[j] + left @ block
        pushed[i] = pushed[i] + block @ right
    return pulled, pushed
