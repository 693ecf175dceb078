"""What ran is recorded: content, print, one per thread, the same for both entry points."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from torch import Tensor

import torchjac
from graphs import KINDS
from laws import PLANS, leaf, quiet, same, value
from torchjac.testing import force_plan


def f(x: Tensor) -> Tensor:
    """Five rows, three columns; works along the last axis, so that copies can be stacked."""
    return torch.cat([x.sin() * x.sum(-1, keepdim=True), x[..., :2]], -1)


def check(record: torchjac.Record, m: int, n: int) -> None:
    """What holds for every record of a plain run."""
    assert record.engine == "plain"
    assert record.mode in ("reverse", "forward", "replicated")
    assert (record.rows, record.columns) == (m, n)
    assert record.passes >= 1
    assert record.chunk >= 1
    assert record.budget > 0
    assert record.layout == torch.strided
    assert 0 < record.seconds < 60


def test_record_of_jacobian() -> None:
    record = torchjac.jacobian(f).explain(value(3))
    check(record, 5, 3)
    assert record.entry == "jacobian"
    assert record.batch is None
    assert torchjac.last_run() == record


def test_record_of_jac() -> None:
    x = leaf(3)
    torchjac.jac(f(x), x)
    record = torchjac.last_run()
    check(record, 5, 3)
    assert record.entry == "jac"


def test_record_of_hessian() -> None:
    record = torchjac.hessian(lambda x: f(x).prod()).explain(value(3))
    check(record, 3, 3)
    assert record.entry == "hessian"


def test_record_of_a_batch_counts_one_sample() -> None:
    record = torchjac.jacobian(lambda x: x.exp().repeat(1, 2), batched=True).explain(value(7, 3))
    check(record, 6, 3)
    assert record.batch == 7


def test_record_is_a_frozen_value() -> None:
    record = torchjac.jacobian(f).explain(value(3))
    assert dataclasses.is_dataclass(record)
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.mode = "other"
    with pytest.raises((AttributeError, TypeError)):
        record.refusals.append("x")


def test_budget_and_layout_are_in_the_record() -> None:
    J = torchjac.jacobian(f, layout=torch.sparse_csr, memory_budget=12345)
    record = J.explain(value(3))
    assert record.budget == 12345
    assert record.layout == torch.sparse_csr


@pytest.mark.parametrize(("mode", "chunk"), PLANS)
def test_record_tells_the_forced_plan(mode: str, chunk: int) -> None:
    """Mode, chunk and passes are what ran, not what was meant."""
    with quiet(), force_plan(mode=mode, chunk=chunk):
        record = torchjac.jacobian(f).explain(value(3))
    seeds = 3 if mode == "forward" else 5
    assert record.mode == mode
    assert record.chunk == min(chunk, seeds)
    assert record.passes == -(-seeds // record.chunk)


def test_record_prints() -> None:
    """Short lines for a terminal, with the numbers that matter."""
    with quiet():
        record = torchjac.jacobian(KINDS["function_through_numpy"][0]).explain(value(4))
    text = str(record)
    assert all(len(line) <= 160 for line in text.splitlines())
    for word in ("jacobian", "4", "reverse", "plain"):
        assert word in text
    assert "loop" in text
    assert all(reason.splitlines()[0][:40] in text for _, reason in record.refusals)


def test_candidates_carry_their_predictions() -> None:
    """The plans that were weighed: name, predicted seconds, measured seconds if it ran."""
    J = torchjac.jacobian(lambda x: (value(30, 20) @ x.sin()).tanh())
    x = value(20)
    for _ in range(6):
        record = J.explain(x)
    assert record.candidates
    assert all(c.name and c.predicted > 0 for c in record.candidates)
    assert any(c.measured is not None for c in record.candidates)


def test_last_run_is_per_thread() -> None:
    """None where nothing ran; another thread's run is not seen."""
    torchjac.jacobian(f)(value(3))
    mine = torchjac.last_run()
    seen: list[object] = []

    def other() -> None:
        seen.append(torchjac.last_run())
        torchjac.jacobian(f)(value(4))
        seen.append(torchjac.last_run())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen[0] is None
    assert seen[1].columns == 4
    assert torchjac.last_run() == mine


def test_threads_do_not_disturb_each_other() -> None:
    """Many threads, many shapes, one Jacobian object."""
    J = torchjac.jacobian(f)
    wrong: list[str] = []

    def work(n: int) -> None:
        x = value(n)
        expected = torch.func.jacrev(f)(x)
        for _ in range(20):
            try:
                same(J(x), expected)
                assert torchjac.last_run().columns == n
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(n,)) for n in (2, 3, 4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_record_inside_a_transform() -> None:
    """Inside a functorch transform torch.func does the work, and the record says so."""
    torch.vmap(torchjac.jacobian(f))(value(4, 3))
    assert torchjac.last_run().mode == "torch.func"


def test_force_plan_ends_with_its_block() -> None:
    """Also after an error."""
    with pytest.raises(ZeroDivisionError), force_plan(mode="reverse", chunk=1):
        raise ZeroDivisionError
    with force_plan(mode="reverse", chunk=1):
        assert torchjac.jacobian(f).explain(value(3)).chunk == 1
    J = torchjac.jacobian(f)
    same(J(value(3)), torch.func.jacrev(f)(value(3)))


def test_refused_plan_says_why() -> None:
    """Replication calls f again: impossible on a graph that exists already."""
    x = leaf(3)
    y = f(x)
    with pytest.raises(torchjac.errors.PlanRefused, match=r"\w+"), force_plan("replicated", 5):
        torchjac.jac(y, x)


def test_repr_of_a_jacobian() -> None:
    """Says what it is."""
    assert "acobian" in repr(torchjac.jacobian(f))


def test_threads_leave_the_switches_of_torch_alone() -> None:
    """vmap's fallback is one switch for the process: it is on again when the threads are done."""
    J = torchjac.jacobian(f)

    def work(n: int) -> None:
        x = value(n)
        for _ in range(200):
            J(x)

    for _ in range(3):
        threads = [threading.Thread(target=work, args=(n,)) for n in (2, 3, 4, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch._C._functorch._is_vmap_fallback_enabled()
