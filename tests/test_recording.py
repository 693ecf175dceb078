"""Noting what runs: nothing gets past it, and nothing of it is left behind."""

from __future__ import annotations

import copy
import functools
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchjac
from laws import value
from patterns import numeric, pattern_of
from torchjac._torch.trace import trace as tracing
from torchjac.call import Call
from torchjac.capture.eager import capture_graph
from torchjac.capture.trace import trace_function, trace_graph
from torchjac.errors import CaptureRefused

N = 5
D = torch.float64
X = value(N)


def swallowed(take: Callable[[Tensor], int]) -> Callable[[Tensor], Tensor]:
    """A function that goes on where a value cannot be had."""

    def f(x: Tensor) -> Tensor:
        try:
            k = take(x.detach())
        except Exception:
            k = 0
        return x.roll(k)

    return f


def assigned(x: Tensor) -> Tensor:
    z = torch.zeros(N, dtype=D)
    z.data = x.detach()
    return z * x


def parameter(x: Tensor) -> Tensor:
    p = nn.Parameter(torch.zeros(N, dtype=D))
    p.data = x.detach()
    return p * x


def by_address(x: Tensor) -> Tensor:
    import ctypes

    first = ctypes.c_double.from_address(x.data_ptr()).value
    return x * first


def by_numpy(x: Tensor) -> Tensor:
    filled = torch.zeros(N, dtype=D)
    filled.numpy()[:] = x.detach().numpy()
    return filled * x


def pooled(take: Callable[[Tensor], Any]) -> Any:
    """What another thread makes of a tensor: no mode is active there."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(take).result()


def caught(x: Tensor) -> Tensor:
    """Goes another way where a factorization fails."""
    try:
        return torch.linalg.cholesky(x.diag()).sum(0) * x
    except RuntimeError:
        return x.roll(1)


def by_hook(x: Tensor) -> Tensor:
    """A hook that runs in a backward pass inside the function."""
    seen: list[float] = []
    y = x * x
    y.register_hook(lambda g: seen.extend((g * x.detach()).tolist()))
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    return x.roll(1) if seen[0] > 0 else x * 2


class Leaks(Tensor):
    """A kind of tensor that says what operations mean."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def by_hooks_for_saving(x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(), torch.from_numpy):
        return x.sin() * x


WEIGHT = torch.ones(N, dtype=D, requires_grad=True)


def by_gradients(x: Tensor) -> Tensor:
    WEIGHT.grad = None
    (WEIGHT * x.detach()).sum().backward()
    assert WEIGHT.grad is not None
    return x * WEIGHT.grad


WAYS_AROUND: dict[str, Callable[[Tensor], Tensor]] = {
    "assigned data": assigned,
    "assigned data of a parameter": parameter,
    "address": by_address,
    "numpy": by_numpy,
    "dlpack": lambda x: torch.from_dlpack(x.detach()) * x,
    "as an array": lambda x: x * torch.from_numpy(np.asarray(x.detach())),
    "deep copy": lambda x: x * copy.deepcopy(x.detach()),
    "storage": lambda x: x * x.detach().untyped_storage().nbytes(),
    "string": lambda x: x * len(str(x.detach())),
    "list": lambda x: x * torch.tensor(x.detach().tolist(), dtype=D),
    "tensor of elements": lambda x: x * torch.tensor([v.detach() for v in x], dtype=D),
    "legacy constructor": lambda x: x * torch.DoubleTensor([v.detach() for v in x]),
    "function": lambda x: x * x.detach().clone().apply_(lambda v: v > 0),
    "split": lambda x: torch.cat(
        torch.tensor_split(x, (x.detach() > 0).sum().reshape(1).clamp(0, N))[::-1]
    ),
    "split, by keyword": lambda x: torch.cat(
        torch.tensor_split(x, tensor_indices_or_sections=(x.detach() > 0).sum().reshape(1))[::-1]
    ),
    "thread": lambda x: x * pooled(lambda: (x.detach() > 0).to(D)),
    "number from a thread": lambda x: x.roll(pooled(lambda: int(x.detach().argmax()))),
    "dlpack capsule": lambda x: (
        torch.from_dlpack(torch.utils.dlpack.to_dlpack(x.detach().clone())) * x
    ),
    "failure that is caught": caught,
    "hook": by_hook,
    "kind of tensor": lambda x: (x.detach().as_subclass(Leaks) * 1).as_subclass(Tensor) * x,
    "hooks for saving": by_hooks_for_saving,
    "gradients": by_gradients,
    "compiled": torch.compile(lambda x: x.roll(1) if x.sum() > 0 else x * 1, backend="eager"),
    "swallowed numpy": swallowed(lambda x: int(x.numpy().argmax())),
    "swallowed item": swallowed(lambda x: int(x.argmax().item())),
    "swallowed bool": swallowed(lambda x: 1 if x[0] > 0 else 2),
}


@pytest.mark.parametrize("name", WAYS_AROUND)
def test_a_way_around_is_refused(name: str) -> None:
    with pytest.raises(CaptureRefused):
        trace_function(Call(WAYS_AROUND[name], 0, False, (X,), {}), ())


@pytest.mark.parametrize("name", WAYS_AROUND)
def test_a_sparse_jacobian_is_right_all_the_same(name: str) -> None:
    f = WAYS_AROUND[name]
    for point in (X, value(N, seed=7)):
        jacobian = torchjac.jacobian(f, layout=torch.sparse_csr)(point)
        np.testing.assert_allclose(jacobian.to_dense().numpy(), numeric(f, point))


class Doubled(torch.autograd.Function):
    """Its backward goes by way of NumPy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.from_numpy(grad.numpy() * 2)


class Filled(torch.autograd.Function):
    """Its backward fills memory out of torch's sight, as a kernel of an extension does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        filled = torch.empty_like(grad)
        with torch._C.DisableTorchFunction():
            filled.numpy()[:] = grad.numpy() * 2
        return filled


@pytest.mark.parametrize("function", [Doubled, Filled])
def test_a_backward_out_of_sight_is_refused(function: Any) -> None:
    with pytest.raises(CaptureRefused):
        trace_function(Call(function.apply, 0, False, (X,), {}), ())
    x = X.clone().requires_grad_()
    program = capture_graph(
        function.apply(x), x, batched=False, retain_graph=True, create_graph=False
    )
    with pytest.raises(CaptureRefused):
        trace_graph(program, ())


READ = torch.tensor([2, 0, 1])
MASK = torch.tensor([True, False, True, True, False])
LAYER = nn.LSTM(1, 2, batch_first=True).double()
ORDINARY: dict[str, Callable[[Tensor], Tensor]] = {
    "copy of a constant": lambda x: x * copy.deepcopy(READ).sum(),
    "many beside each other": lambda x: torch.stack([v * 2 for _ in range(4) for v in x.unbind()]),
    "many sums beside each other": lambda x: torch.stack(
        [x[:k].sum() * x[0] for k in range(1, N) for _ in range(3)]
    ),
    "samples of a recurrent network": lambda x: LAYER(x.reshape(N, 1, 1))[0],
    "compiled": torch.compile(lambda x: x.roll(1) * x, backend="eager"),
    "items of constants": lambda x: x * READ.sum().item() + READ[0] * x,
    "lists of constants": lambda x: torch.stack([x[i] for i in torch.arange(3).tolist()]),
    "branch on a constant": lambda x: x if READ[0] > 1 else -x,
    "mask": lambda x: x[MASK],
    "mask made here": lambda x: x[torch.arange(N) > 2] * 2,
    "written through a mask": lambda x: x.clone().masked_fill_(MASK, 0.0),
    "put through a mask": lambda x: x.index_put((MASK,), torch.zeros((), dtype=D)),
    "asked for its type": lambda x: x.roll(1) if type(x) is Tensor else x,
    "shape": lambda x: x * (x.numel() > 3) * x.stride(0) * x.dim(),
    "array": lambda x: x * torch.from_numpy(np.arange(5.0)),
}


WIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "classes": lambda x: x.sum() * F.one_hot(x.detach().argsort(), N)[0].to(D) + x,
    "factorization": lambda x: torch.linalg.cholesky(torch.diag(x.abs() + 1)).diagonal(),
}


@pytest.mark.parametrize("name", WIDE)
def test_what_holds_for_every_input_may_be_wide(name: str) -> None:
    f = WIDE[name]
    assert not ((pattern_of(f, X) == 0) & (numeric(f, X) != 0)).any()


@pytest.mark.parametrize("name", ORDINARY)
def test_what_is_ordinary_is_global(name: str) -> None:
    f = ORDINARY[name]
    np.testing.assert_array_equal(pattern_of(f, X) != 0, numeric(f, X) != 0)


class TestNothingIsLeftBehind:
    def test_constants_that_are_written_to(self) -> None:
        weights, flag = torch.ones(N, dtype=D), torch.zeros(2, dtype=torch.int64)

        def f(x: Tensor) -> Tensor:
            weights[1:].mul_(x[:-1].detach())
            flag.add_(1)
            return x * weights

        before = weights._version, flag._version
        pattern_of(f, X)
        assert weights.tolist() == [1] * N
        assert flag.tolist() == [0, 0]
        assert (weights._version, flag._version) == before

    def test_running_statistics(self) -> None:
        norm = nn.BatchNorm1d(3).double()
        before = copy.deepcopy(norm.state_dict())
        pattern_of(norm, value(4, 3))
        for name, tensor in norm.state_dict().items():
            assert torch.equal(tensor, before[name]), name

    def test_the_input(self) -> None:
        x = X.clone()

        def f(x: Tensor) -> Tensor:
            x.detach().zero_()
            return x * x

        pattern_of(f, x)
        assert torch.equal(x, X)
        assert x._version == 0

    def test_what_a_cache_keeps(self) -> None:
        @functools.cache
        def grid(n: int) -> Tensor:
            return torch.linspace(0, 1, n, dtype=D)

        pattern_of(lambda x: x * grid(N), X)
        assert type(grid(N)) is Tensor
        assert torch.equal(grid(N), torch.linspace(0, 1, N, dtype=D))

    def test_when_it_fails(self) -> None:
        buffer = torch.ones(N, dtype=D)

        def f(x: Tensor) -> Tensor:
            buffer.zero_()
            raise ValueError("no")

        with pytest.raises(CaptureRefused):
            trace_function(Call(f, 0, False, (X,), {}), ())
        assert buffer.tolist() == [1] * N

    def test_the_compiler_is_not_imported(self) -> None:
        """It takes longer than anything else here."""
        import subprocess

        program = (
            "import sys, torch, torchjac\n"
            "torchjac.jacobian(lambda x: x.sin() * x.roll(1)).pattern(torch.ones(5))\n"
            "sys.exit('torch._dynamo' in sys.modules)\n"
        )
        assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

    def test_a_graph_that_a_cache_keeps(self) -> None:
        weight = torch.ones(N, dtype=D, requires_grad=True)

        @functools.cache
        def scale() -> Tensor:
            return weight.exp()

        pattern_of(lambda x: x * scale(), X)
        scale().sum().backward()
        assert weight.grad is not None

    def test_a_generator_of_the_user(self) -> None:
        generator = torch.Generator().manual_seed(3)
        before = generator.get_state()
        pattern_of(lambda x: x.clone().mul_(torch.rand(N, generator=generator, dtype=D)), X)
        assert torch.equal(generator.get_state(), before)

    def test_warning_filters(self) -> None:
        before = list(warnings.filters)
        threads = [Thread(target=lambda: pattern_of(torch.sin, X)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert warnings.filters == before

    def test_the_same_memory_is_saved_once(self) -> None:
        buffer = torch.zeros(400, 10, dtype=D)
        views = list(buffer)

        def f(x: Tensor) -> Tensor:
            for view in views:
                view[:N].add_(1)
            return x * 2

        np.testing.assert_array_equal(pattern_of(f, X), 2 * np.eye(N))
        assert not buffer.any()


def test_indices_of_the_input_are_not_slices() -> None:
    """What is not known of an index is not taken for no index."""
    table = torch.eye(N, dtype=D)
    columns = torch.arange(N)

    def f(x: Tensor) -> Tensor:
        return (table[x.detach().argsort()[:, None], columns] * x).sum(1)

    assert (pattern_of(f, X) != 0).all()
    assert (pattern_of(lambda x: (table[x.detach().argsort()] * x).sum(1), X) != 0).all()


def test_tensors_without_values() -> None:
    pattern = torchjac.jacobian(lambda x: x.sin()).pattern(torch.empty(3, device="meta"))
    assert pattern.nnz == 3


class TestWrites:
    """In-place operations are rewritten as functional ones."""

    @pytest.mark.parametrize(
        "f",
        [
            lambda x: x.clone().mul_(x).view(N, 1).squeeze_(1),
            lambda x: torch.zeros(N, dtype=D).copy_(x).add_(x.flip(0)),
            lambda x: torch.empty(N, dtype=D).fill_(2.0).mul_(x),
            lambda x: x.clone().index_add_(0, READ, x[:3]),
            lambda x: torch.zeros(N, dtype=D).scatter_(0, READ, x[:3]),
        ],
        ids=["chain", "copy", "fill", "index_add", "scatter"],
    )
    def test_patterns_are_exact(self, f: Callable[[Tensor], Tensor]) -> None:
        np.testing.assert_array_equal(pattern_of(f, X) != 0, numeric(f, X) != 0)

    def test_a_loop(self) -> None:
        def f(x: Tensor) -> Tensor:
            filled = torch.empty_like(x)
            filled[0] = x[0]
            for i in range(1, N):
                filled[i] = x[i] * filled[i - 1].detach().clone()
            return filled

        np.testing.assert_array_equal(pattern_of(f, X) != 0, np.eye(N, dtype=bool))


def test_operations_carry_their_numbers() -> None:
    numbers = []

    def f(observer: tracing.Observer, x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        y = x.sin()
        node = y.grad_fn
        assert node is not None
        numbers.append(node._sequence_nr())
        with tracing.numbered([node], observer):
            return list(torch.autograd.grad(y.sum(), x))

    module, lines = tracing.trace(f, [X], parameters_vary=True, keep=())
    (cos,) = [n for n in module.graph.nodes if n.target is torch.ops.aten.cos.default]
    assert tracing.sequence_of(cos) == numbers[0]
    assert lines == {}
