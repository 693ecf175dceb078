"""Modes of the thread: gradients on, inference off, autocast off while passes run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchjac._torch.private import corner, private, private_function, private_type
from torchjac._torch.trace.recorder import Recorder
from torchjac._torch.vmap import is_transformed

_NOTHING = nullcontext()
FakeTensor = private_type("torch._subclasses.FakeTensor")


def _any_autocast() -> bool:
    devices = ("cpu", "cuda", "mps", "xpu")
    return any(torch.amp.is_autocast_available(d) and torch.is_autocast_enabled(d) for d in devices)


is_any_autocast_enabled = private_function("torch._C._is_any_autocast_enabled", _any_autocast)
_dispatch_depth = private_function("torch._C._len_torch_dispatch_stack", lambda: 0)
_pre_dispatch_depth = private_function(
    "torch._ops._len_torch_dispatch_stack_pre_dispatch", lambda: 0
)
_mode_of_key = private("torch._C._get_dispatch_mode")
_mode_keys = private("torch._C._TorchDispatchModeKey")
_active_modes = private("torch.utils._python_dispatch._get_current_dispatch_mode_stack")
_disable_current_modes = private("torch.utils._python_dispatch._disable_current_modes")


def recording() -> AbstractContextManager[None]:
    """A context in which autograd records, whatever the mode of the caller."""
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return _NOTHING
    return _recording()


@contextmanager
def _recording() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def passes(tensors: Iterable[Tensor]) -> Iterator[None]:
    """A context for backward passes: without inference mode and without autocast.

    torch advises to run backward passes outside autocast. Each backward operation then has the
    dtype of its forward operation; inside autocast it would be cast again.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for device in {t.device.type for t in tensors}:
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def needs_passes_context() -> bool:
    """Whether `passes` would change a mode (cheaper than entering the context)."""
    return torch.is_inference_mode_enabled() or is_any_autocast_enabled()


def tracing(tensors: Iterable[Tensor]) -> bool:
    """Whether any tensor has no readable values: a fake, meta or traced tensor."""
    if any(t.is_meta or isinstance(t, FakeTensor) or is_transformed(t) for t in tensors):
        return True
    if _dispatch_depth() == 0 or not MODES.holds():
        return False
    if any(_mode_of_key(key) is not None for key in (_mode_keys.PROXY, _mode_keys.FAKE)):
        return True
    return any(isinstance(mode, Recorder) for mode in _active_modes())


def usable_in_graph(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy that autograd can save if it is an inference tensor."""
    return tensor.clone() if tensor.is_inference() else tensor


def ordinary_tensors() -> AbstractContextManager[None]:
    """A context in which new tensors are no inference tensors, whatever the mode of the caller."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else _NOTHING


def real_values() -> AbstractContextManager[None]:
    """A context without modes and without autograd, whatever the mode of the caller."""
    stacks: int = _dispatch_depth() + _pre_dispatch_depth()
    # Uses are often nested, and leaving modes takes longer than a small operation.
    return _without_modes() if stacks or torch.is_grad_enabled() else _NOTHING


@contextmanager
def _without_modes() -> Iterator[None]:
    with _disable_current_modes(), torch.no_grad():
        yield


def save_random_states(tensors: Iterable[Tensor]) -> Callable[[], None]:
    """Saves torch's random states, also of the tensors' devices.

    Returns:
        A function that restores the states.
    """
    cpu_state = torch.get_rng_state()
    devices = {t.device for t in tensors if t.device.type == "cuda"}
    cuda_states = [(device, torch.cuda.get_rng_state(device)) for device in devices]

    def restore() -> None:
        torch.set_rng_state(cpu_state)
        for device, state in cuda_states:
            torch.cuda.set_rng_state(state, device)

    return restore


@contextmanager
def preserved_random_state(tensors: Sequence[Tensor]) -> Iterator[None]:
    """A context that restores the random states of torch (all devices), Python and NumPy.

    States that did not change are left alone, as another thread may draw from them.
    """
    python, numpy, torch_ = random.getstate(), np.random.get_state(), torch.get_rng_state()
    restore = save_random_states(tensors)
    try:
        yield
    finally:
        if random.getstate() != python:
            random.setstate(python)
        if not _is_same_numpy_state(np.random.get_state(), numpy):
            np.random.set_state(numpy)
        on_cpu = all(t.device.type == "cpu" for t in tensors)
        if not on_cpu or not torch.equal(torch.get_rng_state(), torch_):
            restore()


def _is_same_numpy_state(one: Any, other: Any) -> bool:
    """Whether two states of NumPy's generator are equal."""
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@corner("the stack of dispatch modes", "nothing is planned")
def MODES() -> bool:
    """Active modes can be counted, identified, and left."""
    with Recorder((), parameters_vary=False) as mode:
        inside = _dispatch_depth(), mode in _active_modes()
        with _without_modes():
            outside = _dispatch_depth(), torch.is_grad_enabled()
    fakes = [_mode_of_key(key) for key in (_mode_keys.PROXY, _mode_keys.FAKE)]
    return (inside, outside) == ((1, True), (0, False)) and fakes == [None, None]
