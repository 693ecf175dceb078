"""Devices: a tensor program allocates where its inputs are; other stages refuse with a reason.

No GPU is needed: fake tensors of torch have a device and no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import torchjac
from laws import value
from numpy_target import NumpyTarget
from torchjac._torch.storage import ALLOCATOR, allocator
from torchjac._torch.trace.recorder import Recorder
from torchjac._torch.trace.recording import Recording, finish_recording
from torchjac.call import Call
from torchjac.capture.eager import capture_function
from torchjac.compiler.codegen.build import build_source
from torchjac.compiler.codegen.executable import Executable
from torchjac.compiler.codegen.target import Launch, SourceUnit
from torchjac.compiler.program import peephole
from torchjac.compiler.program.optimize import fold_constants, optimized_graph, plain_graph
from torchjac.errors import PlanError
from torchjac.jit import dispatcher

LONG = 3000


def scattered(x: Tensor) -> Tensor:
    index = torch.arange(4, device=x.device)
    return torch.zeros_like(x).index_add(0, index, x.exp())


def written_to(x: Tensor) -> Tensor:
    out = x.new_zeros(2, 4, 4)
    out.select(0, 0).sub_(x.sin())
    out.select(0, 1).add_(x * x)
    return out


def large(x: Tensor) -> Tensor:
    return torch.zeros(LONG, device=x.device).index_copy_(
        0, torch.arange(4, device=x.device), x.select(0, 0)
    )


# Indexing in brackets would ask for a GPU.
PROGRAMS: dict[str, Callable[[Tensor], Tensor]] = {
    "pointwise": lambda x: (x.sin() * 2 + x.exp()).sum(0),
    "product": lambda x: x @ x.t(),
    "numbers": lambda x: x * torch.full((), 3.0, device=x.device) + torch.full_like(x, 2.0),
    "constants": lambda x: torch.cat([x, x.new_ones(1, 4)]) - torch.eye(5, 4, device=x.device),
    "gather": lambda x: x.index_select(0, torch.arange(0, 4, 2, device=x.device)).cos(),
    "scatter": scattered,
    "writes": written_to,
    "solve": lambda x: torch.linalg.solve(x @ x.t() + torch.eye(4, device=x.device), x),
    "large": large,
}


class FakeRecorder(Recorder):
    """Records fake tensors, which ask for their device by an operation."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        return super().__torch_dispatch__(func, types, args, kwargs)


def recording_of(f: Callable[..., Tensor], x: Tensor) -> Recording:
    recorder = FakeRecorder((), parameters_vary=True)
    recorder.input(x)
    with torch.no_grad(), recorder:
        result = f(x)
    return fold_constants(finish_recording(recorder, [result]))


class Devices(TorchDispatchMode):
    """Collects the device of each result of an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.types |= {x.device.type for x in tree_leaves(result) if isinstance(x, Tensor)}
        return result


@pytest.mark.parametrize("lower", [optimized_graph, plain_graph])
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tensor_programs_allocate_on_the_device_of_their_inputs(
    device: str, name: str, lower: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every intermediate result and constant of a program is on the device of the input."""
    if device == "cuda":  # else memory is reused, and a fake tensor has none
        monkeypatch.setattr(peephole, "MAPPED_BYTES", LONG)
    with FakeTensorMode():
        x = torch.empty(4, 4, device=device)
        module, constants = lower(recording_of(PROGRAMS[name], x))
        with torch.no_grad(), Devices() as devices:
            result = module(x, *constants)
    assert devices.types | {c.device.type for c in constants} == {device}
    assert all(r.device.type == device for r in result)


def test_a_cpu_default_does_not_leak_into_a_program() -> None:
    """The test above sees a tensor on another device."""
    with FakeTensorMode(), Devices() as devices:
        torch.empty(2, device="cuda") + torch.ones(())
    assert devices.types == {"cpu", "cuda"}


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_the_allocator_allocates_on_its_device(device: str) -> None:
    """Inductor's function, which knows the CPU only, serves the CPU alone."""
    with FakeTensorMode() if device == "cuda" else torch.no_grad():
        result = allocator(device)((2, 3), (1, 2), torch.float32)
    assert result.device.type == device
    assert (result.shape, result.stride()) == ((2, 3), (1, 2))
    if device == "cpu":
        assert (allocator(device) is allocator(device)) == ALLOCATOR.holds()


class Elsewhere(NumpyTarget):
    """A target of tensors without memory."""

    limits = replace(NumpyTarget.limits, device="meta")

    def entry(self, library: Any, unit: SourceUnit) -> Launch:
        return lambda *addresses: True


def kernel_on(target: NumpyTarget) -> Executable:
    x = value(4, 4)
    return Executable(build_source([(recording_of(torch.sin, x), 1)], None, target=target))


def test_an_executable_allocates_on_the_device_of_its_target() -> None:
    """Results and scratch memory."""
    kernel = kernel_on(Elsewhere())
    x = torch.empty(4, 4, dtype=torch.float64, device="meta")
    assert [y.device.type for y in kernel([x]) or ()] == ["meta"]
    (result,), is_finite = kernel.launcher()([x])
    assert is_finite
    assert result.device.type == "meta"
    assert kernel._workspace(64).device.type == "meta"


def test_an_executable_refuses_other_devices() -> None:
    """By name, before an address reaches the target."""
    with pytest.raises(ValueError, match=r"a kernel for \(4, 4\), .* on meta"):
        kernel_on(NumpyTarget())([torch.empty(4, 4, dtype=torch.float64, device="meta")])
    kernel = kernel_on(NumpyTarget())
    with FakeTensorMode(), pytest.raises(ValueError, match="on cuda"):
        kernel([torch.empty(4, 4, dtype=torch.float64, device="cuda")])


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_the_compiler_refuses_other_devices(side: str) -> None:
    """Whichever side of the function they are on."""
    call = Call(torch.sin, 0, False, (value(3),), {})
    program, _ = capture_function(call, batched=False, create_graph=False, replayable=False)
    assert dispatcher._is_supported(program)
    with FakeTensorMode():
        on_gpu = replace(program, **{side: (torch.empty(3, device="cuda"),)})
    assert not dispatcher._is_supported(on_gpu)


def test_the_reason_of_a_refusal_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call on another device is answered by passes."""
    monkeypatch.setattr(dispatcher, "_is_supported", lambda program: False)
    J = torchjac.jacobian(torch.sin, compile=True)
    assert torch.equal(J(value(3)), value(3).cos().diag())
    assert "not on the CPU" in str(J._dispatcher.refused)


def test_a_plan_on_another_device_is_refused(tmp_path: Path) -> None:
    """Where a plan is asked for by name."""
    J = torchjac.jacobian(torch.sin)
    with pytest.raises(PlanError, match="there is no plan: not supported"):
        J.save(tmp_path / "plan", torch.ones(3, device="meta"))
