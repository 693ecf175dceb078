"""A cache of captures: what it keeps, what it drops, what it says, what it holds alive."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import changes
import changes_objects as objects
import torchjac
from guarding import X, bare, call, guarded
from torchjac.guards.guard import Guard
from torchjac.jit.cache import CaptureCache
from torchjac.jit.dispatcher import Dispatcher
from torchjac.jit.patterns import Memos
from torchjac.request import Request

k = 2.0


class TestMemory:
    @pytest.mark.parametrize("kind", ["tensor", "module", "object", "list"])
    def test_nothing_stays_alive(self, kind: str) -> None:
        class Holder:
            def __init__(self) -> None:
                self.w = torch.ones(3)

            def __call__(self, x: Tensor) -> Tensor:
                return x * self.w

        objects: Any = {
            "tensor": lambda: torch.ones(3),
            "module": lambda: nn.Linear(3, 3),
            "object": Holder,
            "list": lambda: [torch.ones(3)],
        }[kind]()
        leaf = {"module": "weight", "object": "w"}.get(kind)
        inner = objects[0] if kind == "list" else getattr(objects, leaf) if leaf else objects
        held = {"it": objects}
        f = lambda x: x * len([held["it"]])  # noqa: E731
        guard = guarded(call(f))
        gone = weakref.ref(inner)
        held["it"] = None
        del objects, inner, leaf
        gc.collect()
        assert gone() is None
        assert guard.mismatch(call(f)) is not None

    def test_a_function_and_its_class_may_die(self) -> None:
        def build() -> tuple[Guard, weakref.ref[Any], weakref.ref[Any]]:
            class Model:
                def f(self, x: Tensor) -> Tensor:
                    return x * 2

            f = Model().f
            return bare(call(f)), weakref.ref(Model), weakref.ref(f.__self__)

        guard, cls, instance = build()
        gc.collect()
        assert cls() is None
        assert instance() is None
        assert guard.mismatch(call(torch.sin)) is not None

    def test_arguments_may_die(self) -> None:
        x, i = torch.rand(3), torch.tensor([1])
        guard = bare(call(lambda x, i: x[i], x, i))
        refs = weakref.ref(x), weakref.ref(i)
        del x, i
        gc.collect()
        assert [r() for r in refs] == [None, None]
        assert guard.size > 0

    def test_a_new_tensor_in_the_place_of_a_dead_one_is_another(self) -> None:
        held = [torch.ones(3)]
        f = lambda x: x * held[0]  # noqa: E731
        guard = guarded(call(f))
        for _ in range(20):  # ids and memory are given out again
            held[0] = None  # type: ignore[call-overload]
            held[0] = torch.full((3,), 2.0)
            mismatch = guard.mismatch(call(f))
            assert mismatch is not None
            assert mismatch.final


class TestSize:
    """Speed by counting: what is checked, not how long it takes."""

    def test_little_is_checked_for_a_lambda(self) -> None:
        a, b, c = 1.0, torch.ones(3), [1, 2]
        assert guarded(call(lambda x: a * b * x + c[0])).size <= 12

    def test_a_module_costs_a_constant_each(self) -> None:
        sizes = [
            guarded(call(nn.Sequential(*[nn.Linear(3, 3) for _ in range(n)]))).size
            for n in (1, 2, 3)
        ]
        assert sizes[2] - sizes[1] == sizes[1] - sizes[0] <= 25

    def test_torch_is_not_walked(self) -> None:
        assert guarded(call(lambda x: torch.nn.functional.gelu(np.float64(2) * x))).size <= 8

    def test_checks_run_no_code_of_the_user(self) -> None:
        calls = []

        class Watched:
            def __init__(self) -> None:
                self.k = 2.0

            @property
            def expensive(self) -> float:
                calls.append(1)
                return self.k

            def __call__(self, x: Tensor) -> Tensor:
                return x * self.expensive

        f = Watched()
        guard = guarded(call(f))
        assert guard.mismatch(call(f)) is None
        assert calls == []


# What torchjac keeps from call to call, and what it writes to there.
INERT = {
    "cache": (CaptureCache, "_size"),
    "dispatcher": (lambda: Dispatcher(torch.sin, 0, Request()), "refused"),
    "memory": (Memos, "_seconds"),
}


class TestCache:
    def test_the_last_used_stay(self) -> None:
        cache: CaptureCache[int] = CaptureCache(size=2)
        sizes = [call(torch.sin, torch.zeros(n)) for n in range(3)]
        for n, c in enumerate(sizes[:2]):
            cache.store(c, n)
        assert cache.lookup(sizes[0]) == 0
        cache.store(sizes[2], 2)
        assert [cache.lookup(c) for c in sizes] == [0, None, 2]
        assert len(cache) == 2

    def test_says_why_nothing_fits(self) -> None:
        c = 2
        f = lambda x: c * x  # noqa: E731
        cache: CaptureCache[str] = CaptureCache()
        cache.store(call(f), "made")
        c = 3
        assert cache.lookup(call(f)) is None
        assert cache.mismatches(call(f)) == ("closure variable c changed from 2 to 3",)
        c = 2
        assert cache.lookup(call(f)) == "made", "it holds again"

    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (changes.global_of_called, "global k (read by global helper) changed from 2.0 to 3.0"),
            (changes.global_dict, "global table['a'] changed from 2.0 to 5.0"),
            (changes.default_argument, "default argument c changed from 2.0 to 3.0"),
            (objects.bound_method, "the function.__self__.k changed from 2.0 to 3.0"),
            (objects.module_attribute, "the function.scale changed from 2.0 to 4.0"),
            (objects.module_training, "the function.training changed from True to False"),
            (
                objects.module_in_closure,
                "closure variable net.scale changed from 2.0 to 4.0",
            ),
            (objects.parameter_in_place, "the function.lin.weight was written to in place"),
            (objects.buffer_in_place, "the function.shift was written to in place"),
            (changes.closure_list, "the length of closure variable c changed from 2 to 3"),
            (
                changes.closure_tensor_replaced,
                "closure variable c was replaced: a tensor of shape (3,)",
            ),
        ],
    )
    def test_reasons_name_what_the_user_wrote(
        self, make: Callable[[], changes.Case], says: str
    ) -> None:
        f, change = objects.fresh(make)
        guard = guarded(call(f))
        change()
        mismatch = guard.mismatch(call(f))
        assert mismatch is not None
        assert mismatch.reason.startswith(says)

    def test_what_can_never_hold_again_is_dropped(self) -> None:
        w = torch.ones(3)
        f = lambda x: w * x  # noqa: E731
        cache: CaptureCache[int] = CaptureCache()
        cache.store(call(f), 1)
        w.add_(1)
        assert cache.lookup(call(f)) is None
        assert len(cache) == 0

    def test_a_function_that_changes_what_it_reads_has_no_entry(self) -> None:
        count = [0]
        cache: CaptureCache[int] = CaptureCache()

        def f(x: Tensor) -> Tensor:
            count[0] += 1
            return x * count[0]

        for _ in range(2):
            cache.get_or_create(call(f), lambda: int(f(X).numel()))
        assert len(cache) == 0
        assert cache.refused is not None
        assert "changes what it reads" in cache.refused

    def test_clear(self) -> None:
        cache: CaptureCache[int] = CaptureCache()
        cache.store(call(torch.sin), 1)
        cache.clear()
        assert cache.lookup(call(torch.sin)) is None

    def test_another_function_of_the_same_code_and_closure_is_the_same(self) -> None:
        def make(c: float) -> Callable[[Tensor], Tensor]:
            return lambda x: x * c

        cache: CaptureCache[int] = CaptureCache()
        cache.store(call(make(2.0)), 1)
        assert cache.lookup(call(make(2.0))) == 1
        assert cache.lookup(call(make(3.0))) is None

    def test_threads(self) -> None:
        cache: CaptureCache[int] = CaptureCache(size=3)
        calls = [call(torch.sin, torch.zeros(n)) for n in range(6)]
        errors: list[object] = []

        def work(start: int) -> None:
            for step in range(150):
                n = (start + step) % 6
                if cache.get_or_create(calls[n], lambda n=n: n + 1) != n + 1:  # type: ignore[misc]
                    errors.append(n)
                if step % 50 == 0:
                    cache.clear()

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert errors == []
        assert len(cache) <= 3

    def test_a_jacobian_inside_a_function(self, monkeypatch: pytest.MonkeyPatch) -> None:
        inner = torchjac.jacobian(lambda x: x.sin() * k)
        f = lambda x: inner(x).sum(0)  # noqa: E731
        f(X)
        guard = guarded(call(f))
        f(X)
        assert guard.mismatch(call(f)) is None
        monkeypatch.setitem(globals(), "k", 3.0)
        mismatch = guard.mismatch(call(f))
        assert mismatch is not None
        assert "global k" in mismatch.reason

    def test_a_nested_jacobian_is_compiled(self) -> None:
        """What the inner one learns from call to call is no change of what the outer one reads."""
        inner = torchjac.jacobian(lambda x: x.sin() * x.sum())
        outer = torchjac.jacobian(lambda x: inner(x).sum(0), compile=True)
        for _ in range(3):
            outer(X)
        record = outer.explain(X)
        assert record.engine == "accumulate"
        assert record.refusals == ()

    @pytest.mark.parametrize("name", INERT)
    def test_state_of_torchjac_is_no_reason_to_plan_anew(self, name: str) -> None:
        make, attribute = INERT[name]
        state = make()

        def f(x: Tensor) -> Tensor:
            getattr(state, attribute)
            return x.sin() * x.sum()

        J = torchjac.jacobian(f, compile=True)
        J(X)
        assert J.explain(X).engine == "accumulate"
        guard = guarded(call(f))
        setattr(state, attribute, 7.0)
        assert guard.mismatch(call(f)) is None

    @pytest.mark.parametrize("name", INERT)
    def test_a_subclass_may_hold_anything(self, name: str) -> None:
        class Own(type(INERT[name][0]())):  # type: ignore[misc]
            def __init__(self) -> None:
                """Begins without the state of the base."""
                self.k = 2.0

        own = Own()
        f = lambda x: x * own.k  # noqa: E731
        guard = guarded(call(f))
        own.k = 3.0
        assert guard.mismatch(call(f)) is not None
