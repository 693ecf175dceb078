"""What of arguments and of settings of torch a capture depends on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from changes import Color
from changes_objects import Config, Net
from guarding import Cached, D, X, call, direct, guarded
from torchjac.call import Call


class TestArguments:
    def holds(self, old: Call, new: Call) -> bool:
        return guarded(old).mismatch(new) is None

    def test_values_of_floating_point_arguments_do_not_count(self) -> None:
        f = Cached(lambda x, y: x.sin() * y)
        y = torch.rand(3, dtype=D)
        f(X, y)
        assert torch.allclose(f(X + 1, y), direct(lambda x: x.sin() * y, X + 1))
        f(X, y * 2)
        f(torch.stack([X, X])[1], y)
        assert f.traces == 1

    @pytest.mark.parametrize(
        ("old", "new", "says"),
        [
            (torch.zeros(3), torch.zeros(4), "shape"),
            (torch.zeros(3), torch.zeros(3, 1), "shape"),
            (torch.zeros(3), torch.zeros(3, dtype=D), "dtype"),
            (torch.zeros(2, 3), torch.zeros(3, 2).T, "strides"),
            (torch.zeros(3), torch.zeros(1).expand(3), "strides"),
            (torch.zeros(3), torch.zeros(3, device="meta"), "device"),
            (torch.zeros(3), 0.0, "changed"),
            (torch.zeros(3), torch.zeros(3).to_sparse(), "kind"),
        ],
    )
    def test_metadata_counts(self, old: Any, new: Any, says: str) -> None:
        mismatch = guarded(call(torch.sin, old)).mismatch(call(torch.sin, new))
        assert mismatch is not None
        assert says in mismatch.reason

    def test_strides_of_axes_with_one_element_do_not(self) -> None:
        old, new = torch.zeros(1, 3), torch.zeros(3, 1).T
        assert old.stride() != new.stride()
        assert self.holds(call(torch.sin, old), call(torch.sin, new))

    def test_place_in_a_storage_counts_only_for_who_asks(self) -> None:
        big = torch.rand(6)
        asks = lambda x: x.as_strided((2,), (1,), 0)  # noqa: E731
        assert self.holds(call(torch.sin, big[:3]), call(torch.sin, big[3:]))
        assert not self.holds(call(asks, big[:3]), call(asks, big[3:]))

    def test_requires_grad_counts_for_arguments_that_are_not_differentiated(self) -> None:
        f = lambda x, y: x * y  # noqa: E731
        a, b = torch.rand(3), torch.rand(3, requires_grad=True)
        assert self.holds(call(f, a, a), call(f, b, a))
        assert not self.holds(call(f, a, a), call(f, a, b))
        assert not self.holds(call(f, b, a), call(f, b, b))

    def test_integers_count_by_value(self) -> None:
        f = Cached(lambda x, i: x[i] * 2)
        index = torch.tensor([0, 1])
        plain = lambda i: direct(lambda x: x[i] * 2)  # noqa: E731
        assert torch.equal(f(X, index), plain([0, 1]))
        f(X, torch.tensor([0, 1]))
        f(X, torch.tensor([2, 0, 1])[1:])
        assert f.traces == 1
        assert torch.equal(f(X, torch.tensor([0, 2])), plain([0, 2]))
        index[1] = 2
        assert torch.equal(f(X, index), plain([0, 2]))
        assert f.traces == 2
        index[0] = 1
        assert torch.equal(f(X, index), plain([1, 2]))

    def test_bools_count_by_value(self) -> None:
        f = lambda x, m: torch.where(m, x, 0)  # noqa: E731
        a = torch.tensor([True, False, True])
        assert self.holds(call(f, X, a), call(f, X, a.clone()))
        assert not self.holds(call(f, X, a), call(f, X, ~a))

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            (2, 3),
            (2, 2.0),
            (1, True),
            (0.0, -0.0),
            ("sum", "mean"),
            (None, 0),
            ((1, 2), [1, 2]),
            ([1], [1, 2]),
            ({"a": 1}, {"b": 1}),
            (slice(1), slice(2)),
            (torch.float32, torch.float64),
            (np.float32(1), np.float64(1)),
            (np.array([1.0]), np.array([2.0])),
            (np.array([1.0]), np.array([[1.0]])),
            (Color.RED, Color.BLUE),
            (torch.sin, torch.cos),
            (torch.Size([2]), torch.Size([3])),
        ],
    )
    def test_other_arguments_count_by_value(self, old: Any, new: Any) -> None:
        f = lambda x, o: x  # noqa: E731
        assert self.holds(call(f, X, old), call(f, X, old))
        assert not self.holds(call(f, X, old), call(f, X, new))
        assert not self.holds(call(f, X, o=old), call(f, X, o=new))

    def test_nan_is_itself(self) -> None:
        f = lambda x, o: x  # noqa: E731
        assert self.holds(call(f, X, float("nan")), call(f, X, float("nan")))

    def test_nesting_counts(self) -> None:
        f = lambda p: p  # noqa: E731
        a = torch.rand(3)
        nested = [{"a": a}, {"b": a}, [a], (a,), a, {"a": a, "b": a}, {"a": [a]}]
        for i, old in enumerate(nested):
            for j, new in enumerate(nested):
                assert self.holds(call(f, old), call(f, new)) is (i == j)
        assert self.holds(call(f, {"a": a}), call(f, {"a": a + 1}))

    def test_how_arguments_are_passed_counts(self) -> None:
        f = lambda x, y=None: x  # noqa: E731
        assert not self.holds(call(f, X, X), call(f, X, y=X))
        assert not self.holds(call(f, X, X), call(f, X))
        assert not self.holds(call(f, X), call(f, X, X))

    def test_what_is_differentiated_counts(self) -> None:
        old, new = Call(torch.add, 0, False, (X, X), {}), Call(torch.add, 1, False, (X, X), {})
        assert not self.holds(old, new)
        assert not self.holds(old, Call(torch.add, (0,), False, (X, X), {}))
        assert not self.holds(old, Call(torch.add, 0, True, (X, X), {}))

    def test_objects_among_arguments(self) -> None:
        f = lambda x, c: x * c.scale  # noqa: E731
        config = Config(1.0, {})
        guard = guarded(call(f, X, config))
        assert guard.mismatch(call(f, X, Config(1.0, {}))) is None
        config.scale = 2.0
        mismatch = guard.mismatch(call(f, X, config))
        assert mismatch is not None
        assert mismatch.reason == "args[1].scale changed from 1.0 to 2.0"

    def test_sizes_zero_and_one(self) -> None:
        for shape in [(), (0,), (1,), (0, 3), (1, 1)]:
            a = torch.zeros(shape)
            assert self.holds(call(torch.sin, a), call(torch.sin, a.clone()))
            assert not self.holds(call(torch.sin, a), call(torch.sin, torch.zeros(2, 2)))


class TestSettings:
    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda: torch.autocast("cpu", dtype=torch.bfloat16), "autocast"),
            (torch.no_grad, "grad mode"),
            (torch.inference_mode, "grad mode"),
            (lambda: torch.device("meta"), "function modes"),
        ],
        ids=["autocast", "no_grad", "inference", "device"],
    )
    def test_modes_count(self, change: Callable[[], Any], says: str) -> None:
        c = call(torch.sin)
        guard = guarded(c)
        with change():
            mismatch = guard.mismatch(c)
            assert mismatch is not None
            assert says in mismatch.reason
            assert guarded(c).mismatch(c) is None
        assert guard.mismatch(c) is None

    def test_dtype_of_autocast_counts(self) -> None:
        c = call(torch.sin)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            guard = guarded(c)
        with torch.autocast("cpu", dtype=torch.float16):
            assert guard.mismatch(c) is not None

    def test_default_dtype_counts(self) -> None:
        f = Cached(lambda x: x * torch.ones(3).sum().double())
        f()
        torch.set_default_dtype(D)
        try:
            f()
            assert f.traces == 2
        finally:
            torch.set_default_dtype(torch.float32)
        f()
        assert f.traces == 2

    def test_deterministic_algorithms_count(self) -> None:
        c = call(torch.sin)
        guard = guarded(c)
        torch.use_deterministic_algorithms(True)
        try:
            assert guard.mismatch(c) is not None
        finally:
            torch.use_deterministic_algorithms(False)

    def test_hooks_of_all_modules_count(self) -> None:
        net = Net()
        guard = guarded(call(net))
        handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: o * 2)
        try:
            assert guard.mismatch(call(net)) is not None
        finally:
            handle.remove()
        assert guard.mismatch(call(net)) is None
