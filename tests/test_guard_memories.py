"""Functions that remember their results."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from guarding import Cached, D, X, call, direct
from torchjac.guards.lru_caches import cached_results
from torchjac.jit.cache import CaptureCache


class TestMemories:
    def test_more_results_change_nothing(self) -> None:
        @functools.lru_cache
        def ones(n: int) -> Tensor:
            return torch.ones(n, dtype=D)

        jacobian = Cached(lambda x: x.sin() * ones(x.numel()))
        for n in (3, 4, 3, 4, 5, 3, 4, 5):
            x = torch.rand(n, dtype=D)
            ones(n)  # else the tracer would leave tensors without values in it
            assert torch.allclose(jacobian(x), direct(jacobian.f, x))
        assert jacobian.traces == 3

    def test_results_of_the_first_call_are_known(self) -> None:
        held = [2.0]

        @functools.lru_cache
        def scale(n: int) -> float:
            return held[0]

        f = lambda x: x * scale(3)  # noqa: E731
        cache: CaptureCache[Tensor] = CaptureCache()
        assert cache.get_or_create(call(f), lambda: f(X)) is not None
        assert cache.refused is None
        assert cache.lookup(call(f)) is not None
        scale.cache_clear()
        assert cache.lookup(call(f)) is None

    def test_a_cache_that_always_grows(self) -> None:
        count = iter(range(100))
        scale = functools.lru_cache(lambda n: n)
        cache: CaptureCache[Tensor] = CaptureCache()

        def make() -> Tensor:
            return X * scale(next(count))

        f = lambda x: x * scale(0)  # noqa: E731
        for _ in range(3):
            cache.get_or_create(call(f), make)
        assert cache.lookup(call(f)) is not None, "what it read itself is still known"

    @pytest.mark.parametrize("size", [None, 1, 3, 128])
    @pytest.mark.parametrize("arguments", [[], [1], [3, 4, 3], [(1, 2), "a", 2.0, None]])
    def test_cached_results(self, size: int | None, arguments: list[Any]) -> None:
        memory = functools.lru_cache(maxsize=size)(lambda n: {n: [n]})
        for n in arguments:
            memory(n)
        held = cached_results(memory)
        assert held is not None
        assert len(held) == memory.cache_info().currsize
        results = [result for _, result in held.values()]
        known = list(dict.fromkeys(arguments)) if size is None else None
        if known is not None:
            assert results == [{n: [n]} for n in known]
        for result in results:
            (n,) = result
            assert memory(n) is result

    def test_keys_that_are_results(self) -> None:
        memory = functools.lru_cache(lambda n, m=0: n)
        for n in (3, 4, 4, 3):
            memory(n)
            memory(n, m=1)
        held = cached_results(memory)
        assert held is not None
        assert sorted(result for _, result in held.values()) == [3, 3, 4, 4]
