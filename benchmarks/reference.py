"""The values that every method must reproduce, by the row loop over `torch.autograd.grad`.

Where the loop over all rows would take too long, a random choice of rows is computed, and every
row is still covered by ``J @ v`` for one random vector v.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.methods import Arguments, graph_of
from benchmarks.workloads import Workload
from benchmarks.workloads.base import generator, normal

LOOP_SECONDS = 15.0
"""Longer row loops are replaced by a choice of rows and a product."""
SAMPLED_ROWS = 64

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Reference:
    """What is known of J.

    Attributes:
        rows: Which rows were computed (of one sample, if batched).
        values: Those rows: ``(rows, n)`` or ``(B, rows, n)``.
        vector: Random v, and `product` ``J @ v`` (empty where all rows are known).
        product: See `vector`.
    """

    rows: Array
    values: Array
    vector: Array
    product: Array

    def error(self, got: Array | dict[str, Array]) -> float:
        """Largest deviation, each row measured against its own largest entry (inf if unusable).

        Args:
            got: J, or the entries of a large sparse one: `row`, `column`, `value`, `shape`.
        """
        m = self.product.size or len(self.rows)
        if isinstance(got, dict):
            return self._sparse_error(got, m)
        if got.shape != (*self.values.shape[:-2], m, self.values.shape[-1]):
            return float("inf")
        worst = _row_error(got[..., self.rows, :], self.values)
        if self.product.size:
            size = np.abs(got) @ np.abs(self.vector)
            worst = max(worst, _off(got @ self.vector, size, self.product))
        return worst if np.isfinite(worst) else float("inf")

    def _sparse_error(self, got: dict[str, Array], m: int) -> float:
        row, column, value = got["row"], got["column"], got["value"]
        n = self.values.shape[-1]
        if tuple(got["shape"]) != (m, n):
            return float("inf")
        place = np.full(m, -1)
        place[self.rows] = np.arange(len(self.rows))
        mine = place[row] >= 0
        some = np.zeros((len(self.rows), n))
        np.add.at(some, (place[row[mine]], column[mine]), value[mine])
        worst = _row_error(some, self.values)
        if self.product.size:
            product = np.bincount(row, value * self.vector[column], minlength=m)
            size = np.bincount(row, np.abs(value * self.vector[column]), minlength=m)
            worst = max(worst, _off(product, size, self.product))
        return worst if np.isfinite(worst) else float("inf")


def _off(got: Array, size: Array, product: Array) -> float:
    return float(np.max(np.abs(got - product) / np.where(size > 0, size, 1)))


def _row_error(got: Array, expected: Array) -> float:
    scale = np.abs(expected).max(-1, keepdims=True)
    return float(np.max(np.abs(got - expected) / np.where(scale > 0, scale, 1)))


def tolerance(dtype: np.dtype[Any]) -> float:
    """How far a right result may be off: rounding, with room for another order of sums."""
    return 1e-3 if dtype == np.float32 else 1e-9


def reference(w: Workload, args: Arguments) -> Reference:
    """The Reference of `w` at `args`."""
    out, inputs = graph_of(w, args)

    def row(i: int) -> torch.Tensor:
        seed = torch.zeros((*out.shape[: int(w.batched)], w.m), dtype=out.dtype)
        seed[..., i] = 1
        grads = torch.autograd.grad(out, inputs, seed.view(out.shape), retain_graph=True)
        shape = (-1,) if w.batch is None else (w.batch, -1)
        return torch.cat([g.reshape(shape) for g in grads], -1)

    row(0)
    start = time.perf_counter()
    row(w.m - 1)
    if (time.perf_counter() - start) * w.m < LOOP_SECONDS:
        rows = torch.arange(w.m)
        vector = product = torch.empty(0)
    else:
        rows = torch.randperm(w.m, generator=generator(0))[:SAMPLED_ROWS]
        vector, product = _product(w, args)
    values = torch.stack([row(int(i)) for i in rows], -2)
    return Reference(rows.numpy(), values.numpy(), vector.numpy(), product.numpy())


def _product(w: Workload, args: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """A random v and ``J @ v`` by one forward-mode pass."""
    gen = generator(1)
    tangents = [normal(gen, *args[i].shape, dtype=args[i].dtype) for i in w.positions]
    shape = (-1,) if w.batch is None else (w.batch, -1)

    def f(*xs: torch.Tensor) -> torch.Tensor:
        full = list(args)
        for i, x in zip(w.positions, xs, strict=True):
            full[i] = x
        return w.f(*full)

    _, product = torch.func.jvp(f, tuple(args[i] for i in w.positions), tuple(tangents))
    if w.batched:
        raise NotImplementedError("a batched workload this slow has no one vector for all samples")
    return torch.cat([t.reshape(shape) for t in tangents], -1), product.reshape(w.m)
