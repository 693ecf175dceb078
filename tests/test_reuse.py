"""Memory of large results is used again only where nobody can tell."""

from __future__ import annotations

import copy
import gc
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import torchjac
from accumulating import plan_of, run
from laws import same, value
from torchjac.compiler.program.buffers import ReusedBuffer
from torchjac.host.costs import MAPPED_BYTES

N = 2100  # 2100 x 2100 doubles are more than 32 MiB
assert N * N * 8 > MAPPED_BYTES
A = value(N)
SIZE = (1000,)


class TestReusedBuffer:
    @pytest.mark.parametrize("zeros", [True, False])
    def test_the_same_memory_once_it_is_dead(self, zeros: bool) -> None:
        give = ReusedBuffer(zeros)
        first = give(SIZE, dtype=torch.float64)
        where = first.data_ptr()
        first.fill_(7)
        second = give(SIZE, dtype=torch.float64)
        assert second.data_ptr() != where
        second_at = second.data_ptr()
        del second
        third = give(SIZE, dtype=torch.float64)
        assert third.data_ptr() == second_at
        assert bool((first == 7).all())
        if zeros:
            third.fill_(3)
            del third
            assert not give(SIZE, dtype=torch.float64).any()

    @pytest.mark.parametrize(
        "held",
        [
            lambda t: t,
            lambda t: t[3:5],
            lambda t: t.view(10, 100).T,
            lambda t: t.detach(),
            lambda t: t.numpy(),
            lambda t: t.numpy()[::2],
            lambda t: t.untyped_storage(),
            lambda t: torch.utils.dlpack.to_dlpack(t),
            lambda t: memoryview(t.numpy()),
            lambda t: t.requires_grad_().sum(),
            lambda t: torch.nn.Parameter(t),
            lambda t: iter(t),
        ],
    )
    def test_not_while_somebody_holds_it(self, held: Any) -> None:
        give = ReusedBuffer(zeros=False)
        first = give(SIZE, dtype=torch.float64)
        where = first.data_ptr()
        holder = held(first)
        del first
        gc.collect()
        assert give(SIZE, dtype=torch.float64).data_ptr() != where
        del holder

    @pytest.mark.parametrize(
        "done",
        [
            lambda t: t.untyped_storage().resize_(0),
            lambda t: t.untyped_storage().resize_(16),
            lambda t: t.share_memory_(),
            lambda t: t.set_(),
        ],
    )
    def test_not_where_memory_is_another_one(self, done: Any) -> None:
        """Freed early, or shared with another process."""
        give = ReusedBuffer(zeros=False)
        first = give(SIZE, dtype=torch.float64)
        done(first)
        del first
        second = give(SIZE, dtype=torch.float64).fill_(3)
        assert second.untyped_storage().nbytes() == 8000
        assert not second.is_shared()

    def test_another_size_or_dtype(self) -> None:
        give = ReusedBuffer(zeros=False)
        give(SIZE, dtype=torch.float64)
        assert give((20, 5), dtype=torch.float64).shape == (20, 5)
        assert give((20, 5), dtype=torch.float32).dtype == torch.float32

    def test_no_history(self) -> None:
        give = ReusedBuffer(zeros=False)
        first = give(SIZE, dtype=torch.float64)
        first.requires_grad_()
        del first
        second = give(SIZE, dtype=torch.float64)
        assert not second.requires_grad
        assert second.is_leaf

    def test_threads_never_share(self) -> None:
        give = ReusedBuffer(zeros=False)
        wrong = []

        def work(k: int) -> None:
            for _ in range(300):
                mine = give(SIZE, dtype=torch.float64).fill_(k)
                if not bool((mine == k).all()):
                    wrong.append(k)

        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_a_copy_has_its_own(self) -> None:
        give = ReusedBuffer(zeros=False)
        first = give(SIZE, dtype=torch.float64)
        where = first.data_ptr()
        del first
        assert copy.deepcopy(give)(SIZE, dtype=torch.float64).data_ptr() != where


def outer(x: Tensor) -> Tensor:
    """A dense Jacobian that is cheap."""
    return torch.cat([(x[0] * A).sin(), x[1:] * 2])


def rank_one(x: Tensor) -> Tensor:
    return A * torch.tanh(x).sum()


@pytest.mark.parametrize("f", [outer, rank_one])
def test_results_keep_their_numbers(f: Any) -> None:
    """Whatever is held, written to, or dropped between calls."""
    x = value(N, seed=1)
    plan, first = plan_of(f, x)
    results = [(x, first)]
    for k in range(4):
        point = x + 0.1 * k
        J = run(plan, f, point)
        if k % 2:
            J.fill_(5)  # the caller's, to do what he likes with
            del J
        else:
            results.append((point, J))
    for point, J in results:
        same(J, torchjac.jacobian(f)(point))
    for point, J in results:
        same(run(plan, f, point), J)


def test_memory_is_used_again() -> None:
    x = value(N, seed=1)
    plan, first = plan_of(outer, x)
    assert "reused" in plan.program.module.code
    del first
    where = {run(plan, outer, x + 0.1 * k).data_ptr() for k in range(4)}
    assert len(where) <= 2
