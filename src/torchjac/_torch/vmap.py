"""One level of vmap around a backward pass, without vmap's own argument handling."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from torchjac._torch.autograd import backward
from torchjac._torch.operators import aten, known
from torchjac._torch.private import Gone, corner, private, private_function

# `torch.autograd.grad(..., is_grads_batched=True)` goes through two layers of pytrees, which cost
# more than the pass itself on small graphs (2->4 example: 50 us; this module: 26 us).

_NOTHING = nullcontext()

_functorch = private("torch._C._functorch")
_predispatch = private("torch._functorch.predispatch")

# Operations whose batching rule is wrong in torch 2.13.
WRONGLY_BATCHED = known({aten._cdist_backward.default})


def batched_backward(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    inputs: Sequence[Tensor],
    create_graph: bool = False,
    around: AbstractContextManager[object] = _NOTHING,
) -> tuple[Tensor | None, ...]:
    """Pulls a stack of cotangents back in one pass.

    Args:
        outputs: Outputs of the graph.
        cotangents: For each output a stack of cotangents along the leading axis.
        inputs: Inputs of the graph.
        create_graph: Whether gradients must be differentiable.
        around: A context around the pass alone.

    Returns:
        One stack of gradients per input, `None` where no output depends on the input.
    """
    if not (BATCHING.known or BATCHING.holds()):
        with around:
            return public_batched_backward(outputs, cotangents, inputs, create_graph)
    return _batched_backward(outputs, cotangents, inputs, create_graph, around)


def _batched_backward(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    inputs: Sequence[Tensor],
    create_graph: bool = False,
    around: AbstractContextManager[object] = _NOTHING,
) -> tuple[Tensor | None, ...]:
    if not getattr(_predispatch, "DECOMPOSITIONS_LOADED", False):  # a call takes 3 us
        _load_decompositions()
    size = cotangents[0].shape[0]
    level = _functorch._vmap_increment_nesting(size, "error")
    try:
        stacked = [_functorch._add_batch_dim(c, 0, level) for c in cotangents]
        with around:
            grads = backward(outputs, stacked, inputs, True, create_graph)
        return tuple(
            None if g is None else _functorch._remove_batch_dim(g, level, size, 0) for g in grads
        )
    finally:
        _functorch._vmap_decrement_nesting()


def strict_batched_backward(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    inputs: Sequence[Tensor],
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """As `batched_backward`; an operation without a batching rule raises (see `missing_rule`).

    By default torch loops over the stack inside an operation without a batching rule. torch has one
    switch for all threads, which stays off while any thread needs it off. So use this function for
    the first pass of a program only.
    """
    if not (BATCHING.known or BATCHING.holds()):
        return public_batched_backward(outputs, cotangents, inputs, create_graph)
    with _fallback_off:
        return batched_backward(outputs, cotangents, inputs, create_graph)


def looping_batched_backward(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    inputs: Sequence[Tensor],
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """As `batched_backward`, without torch's warning at every operation with a loop."""
    if not (BATCHING.known or BATCHING.holds()):
        return public_batched_backward(outputs, cotangents, inputs, create_graph)
    with _warning_off:
        return batched_backward(outputs, cotangents, inputs, create_graph)


class _Off:
    """Holds a process-wide switch of torch off while at least one thread is inside."""

    def __init__(self, switch: Callable[[bool], None]) -> None:
        self._switch = switch
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        """The first thread turns the switch off."""
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._switch(False)

    def __exit__(self, *_: object) -> None:
        """The last thread turns the switch on again, its default."""
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._switch(True)


_fallback_off = _Off(private("torch._C._functorch._set_vmap_fallback_enabled"))
_warning_off = _Off(private("torch._C._functorch._set_vmap_fallback_warning_enabled"))


def without_loop_warnings() -> AbstractContextManager[object]:
    """A context without torch.vmap's warnings about operations with a loop."""
    return _warning_off if BATCHING.known or BATCHING.holds() else _NOTHING


def legacy_batched_backward(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    inputs: Sequence[Tensor],
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """As `batched_backward`, by the older vmap behind `is_grads_batched=True`.

    The older vmap loops without a warning over the stack in every operation without a rule (tanh
    and gelu among them). Yet it handles some graphs that functorch refuses: autocast with a norm
    layer, operations of `torch.library`, and `_cdist_backward`, whose functorch rule is wrong in
    torch 2.13.
    """
    return torch.autograd.grad(
        outputs,
        inputs,
        cotangents,
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        is_grads_batched=True,
    )


def missing_rule(error: BaseException) -> str | None:
    """Name of the operation without a batching rule in an error message, or None."""
    match = re.search(r"(\w+::[\w.]+) hit the vmap fallback", str(error))
    return match.group(1) if match else None


def public_batched_backward(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    inputs: Sequence[Tensor],
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """As `batched_backward`, by public functions, which take twice as long."""
    used: list[bool] = []

    def one(*seeds: Tensor) -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(
            outputs, inputs, seeds, True, create_graph, allow_unused=True
        )
        used[:] = [g is not None for g in gradients]
        return tuple(g for g in gradients if g is not None)

    size = cotangents[0].shape[0]
    if not size:  # torch.vmap takes no empty stack
        one(*(c.new_zeros(c.shape[1:]) for c in cotangents))
        none = (x.new_zeros((0, *x.shape)) for x in inputs)
        return tuple(z if is_used else None for z, is_used in zip(none, used, strict=True))
    gradients_ = iter(torch.vmap(one)(*cotangents))
    return tuple(next(gradients_) if is_used else None for is_used in used)


def _load_decompositions() -> None:
    """Loads the decompositions that batched passes need."""
    for module in (_predispatch, private("torch._functorch.vmap")):
        load = getattr(module, "lazy_load_decompositions", None)
        if load is not None and not isinstance(load, Gone):
            load()
            return


@corner("a level of torch's vmap", "torch.vmap and torch.autograd.grad batch the passes")
def BATCHING() -> bool:
    """A stack of cotangents yields a stack of gradients; the fallback can be switched off."""
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    stack = torch.eye(4, dtype=torch.float64)
    unused = torch.ones(3, requires_grad=True)
    gradient, none = _batched_backward([torch.cat([2 * x, x * x])], [stack], [x, unused])
    rows = [[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, 4.0]]
    if gradient is None or gradient.tolist() != rows or none is not None:
        return False
    with _fallback_off, _warning_off:
        off = not _functorch._is_vmap_fallback_enabled()
    return off and transform() is None


# The innermost active transform, or None.
transform: Callable[[], Any] = private_function(
    "torch._C._functorch.peek_interpreter_stack", lambda: None
)


def inside_transform() -> bool:
    """Whether the caller runs inside `torch.vmap` or a `torch.func` transform."""
    return transform() is not None


def is_transformed(tensor: Tensor) -> bool:
    """Whether the text of a tensor (slow) shows a transform, if `inside_transform` is missing."""
    return not (TRANSFORMS.known or TRANSFORMS.holds()) and repr(tensor).startswith(_WRAPPED)


_WRAPPED = ("BatchedTensor(", "GradTrackingTensor(", "FunctionalTensor(")


@corner("the stack of torch.func transforms", "the text of a tensor tells, and nothing is planned")
def TRANSFORMS() -> bool:
    """A transform is active inside a level of vmap and of grad, and none outside."""
    seen = [inside_transform()]
    _functorch._vmap_increment_nesting(2, "error")
    seen.append(inside_transform())
    _functorch._vmap_decrement_nesting()
    _functorch._grad_increment_nesting()
    seen.append(inside_transform())
    _functorch._grad_decrement_nesting()
    seen.append(inside_transform())
    return seen == [False, True, True, False]
