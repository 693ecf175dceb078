"""The observer of a user's function under torch's own tracer, on fake tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from torchjac._torch.modes import FakeTensor, real_values
from torchjac._torch.private import private
from torchjac._torch.trace.observer import Observer

_reset_grad_fn_seq_nr = private("torch.fx.traceback.reset_grad_fn_seq_nr")
_set_grad_fn_seq_nr = private("torch.fx.traceback.set_grad_fn_seq_nr")
_DisableTorchFunction = private("torch._C.DisableTorchFunction")


class FakeTensors:
    """Tracker of the fake tensors of torch's own tracer, which have shapes and no values."""

    def __init__(self) -> None:
        """Starts outside of any autograd node."""
        self._entered = False
        self.in_function = False

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor is fake."""
        return isinstance(tensor, FakeTensor)

    def varies(self, tensor: Tensor) -> bool:
        """Whether a tensor is fake: every fake tensor varies."""
        return self.knows(tensor)

    def cotangent(self, output: Tensor) -> Tensor:
        """A cotangent of any value, as fake tensors have none."""
        return torch.zeros(output.shape, dtype=output.dtype, device=output.device)

    def enter(self, number: int | None) -> None:
        """Sets the sequence number that torch's tracer records with each operation."""
        if self._entered:
            _reset_grad_fn_seq_nr()
        self._entered = number is not None
        if number is not None:
            _set_grad_fn_seq_nr(number)


class FakeObserver(Observer):
    """As `Observer`, for operations on fake tensors.

    A read of the value of an external tensor (an edge count, a switch) is no branch on the input,
    and returns the value.
    """

    def __init__(self) -> None:
        """Starts without a call."""
        super().__init__(FakeTensors())
        self._untracked = False

    def check(self, func: Any, args: tuple[Any, ...]) -> None:
        """As `Watch.check`, but torch may access the (empty) storage of a fake tensor."""
        if getattr(func, "__name__", "") not in _HARMLESS:
            super().check(func, args)

    def during_backward(self) -> AbstractContextManager[Any]:
        """An empty context: fake tensors have no values to escape."""
        return nullcontext()

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a call; a read of an external tensor returns its value."""
        name = getattr(func, "__name__", "")
        if func == _GET_DATA:
            self._untracked = True  # a write through .data does not change the version
        if name in _READING and args and self._has_value(args[0]):
            with real_values():
                return func(*args, **kwargs)
        if name in _INDEXING and len(args) > 1:
            args = (args[0], self._positions(args[1]), *args[2:])
        return super().run(func, args, kwargs)

    def _has_value(self, leaf: Any) -> bool:
        """Whether a tensor is a constant, and no write to it is possible so far."""
        if not isinstance(leaf, Tensor) or self.is_ours(leaf) or not leaf.is_leaf:
            return False
        if self._untracked:
            return False
        if leaf.requires_grad or isinstance(leaf, torch.nn.Parameter):
            return False  # training changes parameters
        with _DisableTorchFunction():
            return not self.aliases or all(a._version == 0 for a, _ in self.aliases.values())

    def _positions(self, index: Any) -> Any:
        """An index with known masks replaced by positions, whose shape is known too."""
        parts = index if isinstance(index, tuple) else (index,)
        if not any(map(self._is_mask, parts)):
            return index
        indices: list[Any] = []
        with real_values():
            for part in parts:
                indices += part.nonzero().unbind(1) if self._is_mask(part) else (part,)
        return tuple(indices)

    def _is_mask(self, part: Any) -> bool:
        mask = isinstance(part, Tensor) and part.dtype == torch.bool and part.ndim > 0
        return mask and self._has_value(part)


_HARMLESS = frozenset({"_typed_storage", "storage", "untyped_storage"})
_GET_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_INDEXING = frozenset({"__getitem__", "__setitem__"})
_READING = frozenset({"item", "tolist", "__bool__", "__int__", "__float__", "__index__"})
