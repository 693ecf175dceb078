"""A cached capture answers only for calls that its guard holds for.

Each case is a function and a change. The law for a change that matters: the guard says so in
words, and a Jacobian through the cache is the one of the function as it is now. The law for a
change that does not: the capture is used again.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import changes
import changes_objects
from changes import Case
from changes_objects import Net, fresh
from guarding import Cached, D, X, call, direct, guarded, reason
from torchjac.guards.builder import MOST_CHECKS, Policy
from torchjac.guards.guard import Guard, Unguardable, build_guard
from torchjac.jit.cache import CaptureCache

k = 2.0

MATTERS = changes.MATTERS + changes_objects.MATTERS
IRRELEVANT = changes.IRRELEVANT + changes_objects.IRRELEVANT


@pytest.mark.parametrize("case", MATTERS, ids=lambda c: c.__name__)
class TestWhatMatters:
    def test_the_guard_names_the_change(self, case: Callable[[], Case]) -> None:
        f, change = fresh(case)
        c = call(f)
        guard = guarded(c)
        assert guard.mismatch(c) is None
        change()
        mismatch = guard.mismatch(c)
        assert mismatch is not None
        assert len(mismatch.reason) > 10
        assert "cannot be compared" not in mismatch.reason

    def test_the_predicate_passes_until_the_change(self, case: Callable[[], Case]) -> None:
        f, change = fresh(case)
        predicate = guarded(call(f)).predicate
        assert predicate is not None
        assert all(predicate((X.clone(),)) for _ in range(3))
        change()
        assert not predicate((X,))

    def test_the_answer_is_that_of_the_function_as_it_is(self, case: Callable[[], Case]) -> None:
        f, change = fresh(case)
        jacobian = Cached(f)
        before = jacobian()
        assert torch.allclose(before, direct(f))
        assert torch.equal(jacobian(), before)
        assert jacobian.traces == 1, "the second call uses the capture"
        change()
        after = jacobian()
        assert torch.allclose(after, direct(f))
        assert not torch.allclose(after, before)
        assert jacobian.traces == 2


@pytest.mark.parametrize("case", IRRELEVANT, ids=lambda c: c.__name__)
def test_what_does_not_matter_changes_nothing(case: Callable[[], Case]) -> None:
    f, change = fresh(case)
    jacobian = Cached(f)
    jacobian()
    change()
    assert torch.allclose(jacobian(), direct(f))
    assert jacobian.traces == 1


class TestPolicy:
    def test_parameters_by_shape(self) -> None:
        net = Net()
        guard = guarded(call(net), Policy(parameters="shapes"))
        with torch.no_grad():
            net.lin.weight.mul_(2)
        net.lin.bias = nn.Parameter(torch.zeros(3, dtype=D))
        assert guard.mismatch(call(net)) is None
        net.shift.add_(1)
        assert guard.mismatch(call(net)) is not None

    @pytest.mark.parametrize(
        "change",
        [
            lambda net: setattr(net.lin, "bias", None),
            lambda net: setattr(net.lin, "bias", nn.Parameter(torch.zeros(4, dtype=D))),
            lambda net: net.lin.bias.requires_grad_(False),
            lambda net: net.float(),
        ],
        ids=["none", "shape", "requires_grad", "dtype"],
    )
    def test_shape_is_not_nothing(self, change: Callable[[Net], object]) -> None:
        net = Net()
        guard = guarded(call(net), Policy(parameters="shapes"))
        change(net)
        assert guard.mismatch(call(net)) is not None

    def test_buffers_by_shape(self) -> None:
        net = Net()
        guard = guarded(call(net), Policy(buffers="shapes"))
        net.shift.add_(1)
        assert guard.mismatch(call(net)) is None
        with torch.no_grad():
            net.lin.weight.mul_(2)
        assert guard.mismatch(call(net)) is not None


def draws(x: Tensor) -> Tensor:
    return x * random.random()


class Magic:
    def __getattr__(self, name: str) -> float:
        return 2.0


class Meta(type):
    @property
    def k(cls) -> float:
        return 2.0


class WithMeta(metaclass=Meta):
    pass


big = np.zeros(100_000)
objects = np.array([[]], dtype=object)
magic = Magic()
generator = (i for i in range(3))
counting = iter(range(9))
numbers = random.Random(0)
stream = sys.stdout
wide = list(range(MOST_CHECKS + 1))


class TestUnguardable:
    @pytest.mark.parametrize(
        ("f", "says"),
        [
            (draws, "random"),
            (lambda x: x * np.random.rand(), "numpy.random"),
            (lambda x: x * time.time(), "time"),
            (lambda x: x * time.perf_counter(), "time"),
            (lambda x: x * len(open("f").read()), "open"),  # noqa: SIM115
            (lambda x: x * eval("2"), "eval"),
            (lambda x: x * next(generator), "global generator"),
            (lambda x: x * next(counting), "global counting"),
            (lambda x: x * numbers.random(), "Random"),
            (lambda x: x * stream.fileno(), "stream"),
            (lambda x: x * magic.anything, "__getattr__"),
            (lambda x: x * WithMeta.k, "metaclass"),
            (lambda x: x * big.sum(), "too many to compare"),
            (lambda x: x * objects.size, "array of Python objects"),
            (lambda x: x * wide[0], "values would have to be checked"),
        ],
        ids=lambda v: v if isinstance(v, str) else "",
    )
    def test_is_refused_with_the_reason(self, f: Callable[..., Any], says: str) -> None:
        assert says in reason(f)

    def test_computed_names_need_all_attributes(self) -> None:
        class Model:
            def __init__(self) -> None:
                self.k, self.stream = 2.0, sys.stdout

            def __call__(self, x: Tensor) -> Tensor:
                return x * getattr(self, "k")  # noqa: B009

        assert "stream" in reason(Model())

    def test_tensors_of_other_kinds(self) -> None:
        class Own(Tensor):
            pass

        own = torch.rand(3).as_subclass(Own)
        assert "Own" in reason(lambda x: x * own)
        assert "Own" in reason(lambda x, y: x * y, X, own)

    def test_keys_that_are_objects(self) -> None:
        keyed = {object: 1.0}
        assert "key" in reason(lambda x: x * keyed[object])

    def test_no_capture_is_stored(self) -> None:
        jacobian = Cached(lambda x: x.sin() * len(str(next(generator, 0))))
        cache: CaptureCache[str] = CaptureCache()
        assert cache.get_or_create(call(jacobian.f), lambda: "made") == "made"
        assert len(cache) == 0
        assert cache.refused is not None
        assert "generator" in cache.refused

    def test_large_inference_tensors(self) -> None:
        with torch.inference_mode():
            small, large = torch.ones(3), torch.ones(100_000)
        guard = guarded(call(lambda x: x * small))
        with torch.inference_mode():
            small.add_(1)
        assert guard.mismatch(call(lambda x: x * small)) is not None
        assert "inference" in reason(lambda x: x * large.sum())

    def test_a_property_that_fails_is_no_failure(self) -> None:
        class Odd:
            def __init__(self) -> None:
                self.value = Bad()

            def __call__(self, x: Tensor) -> Tensor:
                return x * len([self.value])

        class Bad(int):
            def __eq__(self, other: object) -> bool:
                raise ValueError("no")

            __hash__ = None  # type: ignore[assignment]

        assert isinstance(build_guard(call(Odd())), (Guard, Unguardable))


class TestRecursion:
    def test_a_list_in_itself(self) -> None:
        loop: list[Any] = [1.0]
        loop.append(loop)
        f = lambda x: x * loop[1][0]  # noqa: E731
        guard = guarded(call(f))
        assert guard.mismatch(call(f)) is None
        loop[0] = 2.0
        assert guard.mismatch(call(f)) is not None
        loop[0], loop[1] = 1.0, [1.0, loop]
        assert guard.mismatch(call(f)) is not None

    def test_objects_that_know_each_other(self) -> None:
        class Node:
            def __init__(self, up: Any):
                self.up, self.value = up, 1.0

            def f(self, x: Tensor) -> Tensor:
                return x * self.up.up.value

        root = Node(None)
        root.up = Node(root)
        guard = guarded(call(root.f))
        assert guard.mismatch(call(root.f)) is None
        root.up.value = 3.0
        assert guard.mismatch(call(root.f)) is not None

    def test_functions_that_call_each_other(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def even(x: Tensor, n: int = 4) -> Tensor:
            return x * k if n == 0 else odd(x, n - 1)

        def odd(x: Tensor, n: int) -> Tensor:
            return even(x, n - 1)

        guard = guarded(call(even))
        assert guard.mismatch(call(even)) is None
        monkeypatch.setitem(globals(), "k", 5.0)
        assert guard.mismatch(call(even)) is not None

    def test_shared_parameters_stay_shared(self) -> None:
        net = nn.Sequential(nn.Linear(3, 3, dtype=D), nn.Linear(3, 3, dtype=D))
        net[1].weight = net[0].weight
        guard = guarded(call(net), Policy(parameters="shapes"))
        assert guard.mismatch(call(net)) is None
        net[1].weight = nn.Parameter(net[0].weight.detach().clone())
        mismatch = guard.mismatch(call(net))
        assert mismatch is not None
        assert "same object" in mismatch.reason

    def test_deep_nesting(self) -> None:
        deep: list[Any] = []
        for _ in range(5000):
            deep = [deep]
        assert "deeply" in reason(lambda x: x * len(deep))
