"""Costs of a Jacobian by several methods: the numbers of docs/why-rows-are-summed.md.

python examples/passes.py
"""

from __future__ import annotations

import argparse
import time
import weakref
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import grad
from torch.func import jacfwd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import arm


class Problem(NamedTuple):
    name: str
    f: Callable[[Tensor], Tensor]  # takes (n,) and also a stack of inputs, (copies, n)
    x: Tensor


class Meter(TorchDispatchMode):
    """Counts the operations that write memory, and the most bytes alive at once in their results.

    An operation that only returns a view of its input launches nothing and is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.live = self.peak = 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        storages = [t.untyped_storage() for t in tree_leaves(result) if isinstance(t, Tensor)]
        fresh = [s for s in storages if s._cdata not in known]
        self.launches += bool(fresh) or func._schema.is_mutable
        for storage in fresh:
            self.watch(storage)
        return result

    def watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def gone(_: Any) -> None:
            self.live -= size
            del self.known[key]

        self.live += size
        self.peak = max(self.peak, self.live)
        self.known[key] = weakref.ref(storage, gone)


def one_pass(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The sum of all rows, not a Jacobian: a lower bound on the cost of reverse mode."""
    x = x.requires_grad_()
    y = f(x)
    return grad(y, x, torch.ones_like(y))[0]


def row_loop(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.requires_grad_()
    y = f(x)
    basis = torch.eye(len(y), dtype=y.dtype)
    return torch.stack([grad(y, x, row, retain_graph=True)[0] for row in basis])


def batched_rows(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.requires_grad_()
    y = f(x)
    return grad(y, x, torch.eye(len(y), dtype=y.dtype), is_grads_batched=True)[0]


def vmapped_rows(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.requires_grad_()
    y = f(x)
    return torch.vmap(lambda row: grad(y, x, row)[0])(torch.eye(len(y), dtype=y.dtype))


def forward_columns(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return jacfwd(f)(x.detach())


def columns_of_backward(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The backward pass is linear in its cotangent w, so its own derivative by w is J again."""
    x = x.requires_grad_()
    y = f(x)
    w = torch.zeros_like(y, requires_grad=True)
    back = grad(y, x, w, create_graph=True)[0]
    basis = torch.eye(len(x), dtype=x.dtype)
    return torch.vmap(lambda v: grad(back, w, v)[0])(basis).T


def copies(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Row i is the gradient of output i by copy i of the input: one ordinary pass for all rows."""
    m = f(x.detach()).numel()
    stack = x.detach().expand(m, -1).clone().requires_grad_()
    return grad(f(stack).diagonal().sum(), stack)[0]


ROUTES = {
    "one pass, rows summed": one_pass,
    "loop over rows": row_loop,
    "rows batched, is_grads_batched": batched_rows,
    "rows batched, torch.vmap": vmapped_rows,
    "columns batched, jacfwd": forward_columns,
    "columns batched, backward twice": columns_of_backward,
    "copies of the input": copies,
}


def problems() -> list[Problem]:
    generator = torch.Generator().manual_seed(0)
    W1, W2 = (torch.randn(s, generator=generator) / s[1] ** 0.5 for s in ((512, 64), (256, 512)))
    return [
        Problem("2 → 4", lambda q: torch.cat([2 * q, 4 * q * q], -1), torch.tensor([1.0, 2.0])),
        Problem("arm, 7 → 12", arm.flange, arm.sample(1, dtype=torch.float32)[0]),
        Problem(
            "network, 64 → 512 → 256",
            lambda x: torch.tanh(x @ W1.T) @ W2.T,
            torch.randn(64, generator=generator),
        ),
    ]


def microseconds(run: Callable[[], Any], seconds: float) -> float:
    """Median time of a call; the first call warms up and is not counted."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="What a Jacobian costs each way.")
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each number")
    arguments = parser.parse_args()
    for name, f, x in problems():
        print(f"\n| {name} | launches | peak bytes | µs |\n|---|---:|---:|---:|")
        expected = row_loop(f, x)
        for label, route in ROUTES.items():
            with Meter() as meter:
                J = route(f, x)
            if route is not one_pass:
                torch.testing.assert_close(J, expected)
            t = microseconds(lambda route=route, f=f, x=x: route(f, x), arguments.seconds)
            print(f"| {label} | {meter.launches} | {meter.peak:,} | {t:,.0f} |")


if __name__ == "__main__":
    main()
