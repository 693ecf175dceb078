"""Verification of compiled code by passes of autograd: u'J and Jv for random u and v."""

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
from torchjac.passes.autograd_graph import traverse
from torchjac.passes.forward import check_transposable, recorded_gradients
from torchjac.passes.freivalds import tolerance
from torchjac.passes.seeds import random_vectors
from torchjac.passes.structure import analyze
from torchjac.request import Output
from torchjac.sparsity.pattern import Pattern

Parts = Sequence[Tensor]
# Size of a product, absolute or relative to the largest, below which cancellation may dominate it.
_SMALL_PRODUCT = 1e-3


class Reference:
    """Products of a Jacobian with random vectors, by passes over the graph of its program.

    Attributes:
        transposable: Whether the backward pass is proved linear, so that its transpose is v -> Jv.
            User code in the backward pass may be nonlinear, or detach its result; then there is no
            reference for Jv.
    """

    def __init__(self, program: EagerGraph):
        """Computes u'J, and Jv if the backward pass can be transposed.

        Raises:
            RefusedHere: The products are not finite.
        """
        self._program = program
        self._cotangents = random_vectors(program.outputs)
        self._tangents = [w.detach() for w in random_vectors(program.inputs)]
        self._jvp: Sequence[Tensor | None] | None = None
        self._graph_gradients: Sequence[Tensor | None] | None = None
        try:
            # The structure of one row has no graph, which the check needs.
            check_transposable(program, replace(analyze(program), graph=traverse(program)))
            with modes.recording():
                gradients, _ = recorded_gradients(program, self._cotangents)
                self._jvp = self._jvp_through(gradients)
            self._graph_gradients = gradients
        except (PlanRefused, RuntimeError):  # there is no Jv
            gradients = backward(program.outputs, self._cotangents, program.inputs)
        self.transposable = self._jvp is not None
        self._cotangents = [cotangent.detach() for cotangent in self._cotangents]
        self._vjp = [None if g is None else g.detach() for g in gradients]
        if not all(_finite(products) for products in (self._vjp, self._jvp or ())):
            raise RefusedHere("values are not finite")

    def _jvp_through(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        pairs = [
            (g, v)
            for g, v in zip(gradients, self._tangents, strict=True)
            if g is not None and g.requires_grad
        ]
        products = backward([g for g, _ in pairs], [v for _, v in pairs], self._cotangents)
        return [None if p is None else p.detach() for p in products]

    def check(self, parts: Parts, output: Output) -> None:
        """Compares the products of a result.

        Args:
            parts: The parts of the output (`layout.assemble`).
            output: The output, with a pattern if the output is sparse.

        Raises:
            Disagrees: The products differ by more than rounding.
            RefusedHere: The result is not finite, or too small to distinguish from rounding.
        """
        if not _finite(parts):
            raise RefusedHere("values are not finite")
        nest = self._program.nest
        inputs, outputs = self._program.inputs, self._program.outputs
        cotangents = _scatter(self._cotangents, nest.live_outputs, len(nest.outputs))
        tangents = self._tangents
        with torch.no_grad(), modes.real_values():

            def products(of: Parts, u: Sequence[Tensor | None], v: Parts) -> tuple[Any, Any]:
                if output.pattern is not None:
                    return _sparse_products(of[0], output.pattern, u, v)
                return _dense_products(of, u, v, self._program.batch is not None)

            vjp, jvp = products(parts, cotangents, tangents)
            # Terms may be far larger than their sum, and rounding is relative to the terms.
            sizes = products(
                [p.abs() for p in parts],
                [None if s is None else s.abs() for s in cotangents],
                [t.abs() for t in tangents],
            )
            self._compare("u'J", vjp, self._vjp, sizes[0], inputs)
            if self._jvp is not None:
                live, live_sizes = ([p[i] for i in nest.live_outputs] for p in (jvp, sizes[1]))
                self._compare("Jv", live, self._jvp, live_sizes, outputs)

    def check_graph(self, parts: Parts, leaves: Parts, parameters: Parts) -> None:
        """Compares the derivative of a dense result: that of <u'J, w> for random u and w.

        Args:
            parts: Blocks that have a graph, row by row.
            leaves: Copies of the inputs from which the blocks were computed.
            parameters: Further tensors on which both the blocks and the program depend.

        Raises:
            PlanRefused: User code may run in the backward pass.
            Disagrees: The derivatives differ by more than rounding.
            RefusedHere: The derivatives are not finite.
        """
        if self._graph_gradients is None:
            raise PlanRefused("code of the user's may run in the backward pass")
        nest, inputs = self._program.nest, self._program.inputs
        cotangents = _scatter(self._cotangents, nest.live_outputs, len(nest.outputs))
        products, _ = _dense_products(
            parts, cotangents, self._tangents, self._program.batch is not None
        )
        triples = [
            (p.reshape(w.shape), g, w)
            for p, g, w in zip(products, self._graph_gradients, self._tangents, strict=True)
            if isinstance(p, Tensor) and g is not None
        ]
        inner_product = sum((p * w).sum() for p, _, w in triples)
        reference = sum((g * w).sum() for _, g, w in triples)
        got = _gradients(inner_product, [*leaves, *parameters])
        want = _gradients(reference, [*inputs, *parameters])
        if not (_finite(got) and _finite(want)):
            raise RefusedHere("values are not finite")
        zeros = [torch.zeros_like(t) for t in (*inputs, *parameters)]
        filled = [z if g is None else g for g, z in zip(got, zeros, strict=True)]
        sizes = [z.abs() if w is None else w.abs() for w, z in zip(want, zeros, strict=True)]
        largest = max(float(s.amax()) for s in sizes if s.numel())
        sizes = [s.clamp(min=1e-6 * largest) for s in sizes]  # tensors with negligible derivatives
        self._compare("the derivative of <u'J, w>", filled, want, sizes, zeros)

    def _compare(
        self,
        name: str,
        computed: Sequence[Any],
        expected: Sequence[Tensor | None],
        sizes: Sequence[Any],
        like: Parts,
    ) -> None:
        kinds = (*self._program.inputs, *self._program.outputs)
        relative_tolerance = _tolerance(max(torch.finfo(t.dtype).eps for t in kinds))
        errors: list[tuple[float, float]] = []
        for got, want, terms, leaf in zip(computed, expected, sizes, like, strict=True):
            reference = torch.zeros_like(leaf) if want is None else want
            value = got.reshape(leaf.shape) if isinstance(got, Tensor) else torch.zeros_like(leaf)
            largest = torch.maximum(reference.abs().amax(), torch.as_tensor(terms).amax().to(leaf))
            errors.append((float((value - reference).abs().amax()), float(largest)))
        floor = _SMALL_PRODUCT * min(1.0, max((size for _, size in errors), default=0.0))
        for number, (difference, size) in enumerate(errors):
            if difference <= relative_tolerance * max(size, floor):
                continue
            if difference <= relative_tolerance * _SMALL_PRODUCT:
                raise RefusedHere("values are too small to be told from rounding")
            raise Disagrees(
                f"it does not agree with a pass of autograd: {name} of leaf {number} differs "
                f"by {difference:.3g}, where the largest element is {size:.3g}"
            )


def _tolerance(eps: float) -> float:
    """Relative tolerance of rounding: larger than between passes over one graph.

    Compiled code recomputes the values of the function in another order, and the derivative may
    amplify their rounding. Errors of compiled code are much larger than the tolerance.
    """
    return max(tolerance(eps), min(1e5 * eps, 1e-3))


def _gradients(value: Any, leaves: Parts) -> Sequence[Tensor | None]:
    """Gradients of a scalar with respect to tensors; None for a tensor without influence."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return [None] * len(leaves)
    used = [leaf.requires_grad for leaf in leaves]
    one = torch.ones_like(value)
    gradients = iter(backward([value], [one], [x for x, u in zip(leaves, used, strict=True) if u]))
    return [next(gradients) if u else None for u in used]


def _finite(tensors: Sequence[Tensor | None]) -> bool:
    return all(t is None or bool(t.isfinite().all()) for t in tensors)


def _scatter(values: Sequence[Tensor], positions: Sequence[int], size: int) -> list[Tensor | None]:
    """A list of a size with values at some positions, and None at the remaining positions."""
    scattered: list[Tensor | None] = [None] * size
    for position, value in zip(positions, values, strict=True):
        scattered[position] = value
    return scattered


def _sparse_products(
    values: Tensor, pattern: Pattern, cotangents: Sequence[Tensor | None], tangents: Parts
) -> tuple[list[Tensor], list[Tensor]]:
    """Products u'J for each input leaf and Jv for each output leaf, of values of a pattern."""
    heights = [math.prod(s) for s in pattern.row_shapes]
    widths = [math.prod(s) for s in pattern.column_shapes]
    rows = torch.from_numpy(pattern.rows.astype(np.int64))
    columns = torch.from_numpy(pattern.columns.astype(np.int64))
    sides = [
        torch.zeros(size) if s is None else s.reshape(-1)
        for s, size in zip(cotangents, heights, strict=True)
    ]
    u, v = torch.cat(sides).to(values.dtype), torch.cat([t.reshape(-1) for t in tangents])
    vjp = values.new_zeros(sum(widths)).index_add_(0, columns, values * u[rows])
    jvp = values.new_zeros(sum(heights))
    jvp.index_add_(0, rows, values * v.to(values.dtype)[columns])
    return list(torch.split(vjp, widths)), list(torch.split(jvp, heights))


def _dense_products(
    parts: Parts, cotangents: Sequence[Tensor | None], tangents: Parts, batched: bool
) -> tuple[list[Any], list[Any]]:
    """Products u'J for each input leaf and Jv for each output leaf, of dense blocks."""
    vjp: list[Any] = [0.0] * len(tangents)
    jvp: list[Any] = [0.0] * len(cotangents)
    for part, (i, j) in zip(
        parts, product(range(len(cotangents)), range(len(tangents))), strict=True
    ):
        u, v = cotangents[i], tangents[j]
        if u is None:
            continue
        samples = u.shape[0] if batched else 1
        left = u.reshape(samples, 1, -1).to(part.dtype)
        block = part.reshape(samples, left.shape[2], -1)
        right = v.reshape(samples, -1, 1).to(part.dtype)
        vjp[j] = vjp[j] + left @ block
        jvp[i] = jvp[i] + block @ right
    return vjp, jvp
