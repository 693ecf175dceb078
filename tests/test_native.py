"""What compiled code reads of torch's library is what Python reads of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import torchjac
from torchjac._torch import native, state
from torchjac.compiler.codegen.c import guard_reads as readings
from torchjac.compiler.codegen.c.guard_reads import unchanged
from torchjac.guards import predicate


@contextmanager
def switched(get: Callable[[], Any], put: Callable[[Any], None], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def flag(name: str) -> Callable[[], AbstractContextManager[Any]]:
    get, put = getattr(torch._C, f"_get_{name}"), getattr(torch._C, f"_set_{name}")
    return lambda: switched(get, put, not get())


CHANGES: dict[Callable[[], Any], Callable[[], AbstractContextManager[Any]]] = {
    torch.get_default_dtype: lambda: switched(
        torch.get_default_dtype, torch.set_default_dtype, torch.float64
    ),
    torch._C.is_grad_enabled: torch.no_grad,
    torch._C.is_inference_mode_enabled: torch.inference_mode,
    torch._C._len_torch_function_stack: TorchFunctionMode,
    torch._C._len_torch_dispatch_stack: TorchDispatchMode,
    torch._C._get_deterministic_algorithms: lambda: switched(
        torch._C._get_deterministic_algorithms, torch.use_deterministic_algorithms, True
    ),
    torch._C._get_mkldnn_enabled: flag("mkldnn_enabled"),
    torch._C._get_nnpack_enabled: lambda: switched(
        torch._C._get_nnpack_enabled, torch._C._set_nnpack_enabled, False
    ),
    torch._C._get_cudnn_enabled: flag("cudnn_enabled"),
    torch._C._get_flash_sdp_enabled: lambda: switched(
        torch._C._get_flash_sdp_enabled, torch._C._set_sdp_use_flash, False
    ),
    torch._C._get_mem_efficient_sdp_enabled: lambda: switched(
        torch._C._get_mem_efficient_sdp_enabled, torch._C._set_sdp_use_mem_efficient, False
    ),
    torch._C._get_math_sdp_enabled: lambda: switched(
        torch._C._get_math_sdp_enabled, torch._C._set_sdp_use_math, False
    ),
}


def test_every_setting_has_a_case() -> None:
    assert set(CHANGES) == set(native._SETTINGS)


@pytest.mark.parametrize("read", CHANGES, ids=lambda read: read.__name__.strip("_"))
def test_a_setting_is_seen_to_change(read: Callable[[], Any]) -> None:
    reading = native.setting(read)
    assert reading is not None
    same = unchanged([reading])
    assert same is not None
    before = read()
    assert same() is True
    with CHANGES[read]():
        assert read() != before
        assert same() is False
    assert read() == before
    assert same() is True


def test_most_of_what_guards_read_is_read_there() -> None:
    settings = state.plain_setting_readers()
    assert settings is not None
    left = [read for read, _ in settings if native.setting(read) is None]
    # Autocast, precision (which may throw), hooks of saved tensors, attention's fast path.
    assert len(left) == 4


class TestTensors:
    def test_writing_is_seen(self) -> None:
        x = torch.ones(3)
        reading = native.version(x)
        assert reading is not None
        assert reading.read() == (x._version, 0)
        same = unchanged([reading])
        assert same is not None
        assert same() is True
        x.add_(1)
        assert same() is False

    @pytest.mark.parametrize(
        "x",
        [torch.ones(3), torch.ones(4, 4)[1:, 1:], torch.empty(0), torch.ones(2).requires_grad_()],
    )
    def test_the_place_is_that_of_the_first_element(self, x: torch.Tensor) -> None:
        reading = native.place(x)
        assert reading is not None
        assert reading.read() == (0, x.data_ptr())

    def test_other_memory_is_seen(self) -> None:
        x, other = torch.ones(3), torch.ones(3)
        reading = native.place(x)
        assert reading is not None
        same = unchanged([reading])
        assert same is not None
        assert same() is True
        x.data = other
        assert same() is False


def test_the_first_that_differs_decides() -> None:
    x = torch.ones(3)
    readings_of = [native.setting(torch._C.is_grad_enabled), native.version(x), native.place(x)]
    same = unchanged([r for r in readings_of if r is not None])
    assert same is not None
    assert same() is True
    with torch.no_grad():
        assert same() is False
    x.mul_(2)
    assert same() is False


@pytest.mark.parametrize("missing", ["symbols", "compiler"])
def test_without_them_python_reads(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "symbols":
        monkeypatch.setattr(native, "_symbol", lambda _: None)
    else:
        monkeypatch.setattr(readings, "_library", lambda: None)
    texts: list[str] = []
    compiled = predicate.GuardCode._compiled

    def recorded(self: predicate.GuardCode, *args: Any) -> Any:
        texts.extend(self._text)
        return compiled(self, *args)

    monkeypatch.setattr(predicate.GuardCode, "_compiled", recorded)
    c = torch.tensor([2.0, 3.0])
    J = torchjac.jacobian(lambda x: (c * x).sin(), compile=True)
    x = torch.rand(2)
    for _ in range(20):
        J(x)
    assert J._dispatcher.fast_path is not None
    assert any("data_ptr" in line for line in texts)
    c.mul_(2)
    torch.testing.assert_close(J(x), torch.diag(c * (c * x).cos()))


def test_another_implementation_behind_a_tensor() -> None:
    """It is looked at before anything of it is read, which may be gone."""
    c, o, x = torch.tensor([2.0, 3.0]), torch.tensor([5.0, 6.0]), torch.rand(2)
    J = torchjac.jacobian(lambda x: (c * x).sin(), compile=True)
    for _ in range(20):
        J(x)
    assert J._dispatcher.fast_path is not None
    torch._C._swap_tensor_impl(c, o)
    del o
    torch.testing.assert_close(J(x), torch.diag(c * (c * x).cos()))
