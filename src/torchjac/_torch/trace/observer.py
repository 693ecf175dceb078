"""The observer: a function mode between a user's function and torch during a trace."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchjac._torch.modes import real_values
from torchjac._torch.private import corner, private
from torchjac._torch.trace.ir import NotRecorded, distinct_cotangent

_sequence_number = private("torch._C._autograd._get_sequence_nr")
_is_wrapped = private("torch._C._functorch.is_functorch_wrapped_tensor")
_DisableTorchFunction = private("torch._C.DisableTorchFunction")
_DisableFuncTorch = private("torch._C._DisableFuncTorch")
_hooks = private("torch._C._autograd._top_saved_tensors_default_hooks")


def next_sequence() -> int:
    """Sequence number of the next autograd node of this thread."""
    number: int = _sequence_number()
    return number


class TensorTracker(Protocol):
    """The observer's view of a recorder: which tensors depend on the input.

    Attributes:
        in_function: Whether the function itself runs now.
    """

    in_function: bool

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor is an input, or was created during the trace."""

    def varies(self, tensor: Tensor) -> bool:
        """Whether the elements of a tensor depend on the input."""

    def cotangent(self, output: Tensor) -> Tensor:
        """The cotangent of an output, an input of the backward pass."""

    def enter(self, number: int | None) -> None:
        """Sets the autograd node that runs next, by its sequence number."""


class Watch(TorchFunctionMode):
    """Refuses bypasses of torch's operations, through which values would escape the recording.

    Attributes:
        refusals: All refusals, even if the user's code caught the exceptions.
    """

    def __init__(self, tracker: TensorTracker, refusals: list[NotRecorded]) -> None:
        """Binds a tracker and a list of refusals."""
        super().__init__()
        self.refusals = refusals
        self._tracker = tracker

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Checks a call, then runs it."""
        kwargs = kwargs or {}
        self.check(func, (*args, *kwargs.values()))
        return func(*args, **kwargs)

    def check(self, func: Any, args: tuple[Any, ...]) -> None:
        """Checks a call of a function.

        Raises:
            NotRecorded: The call bypasses torch's operations.
        """
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        if func == _SET_DATA:
            self.refuse("it assigns to .data of a tensor, which leaves no trace")
        elif name in _HIDDEN and self.is_ours(first):
            self.refuse(f"it takes a tensor out of torch, by way of {name}")
        elif name in _READING and self._varies(first):
            self.refuse(f"what it does depends on the values of its input, by way of {name}")
        elif name in _MAKING and any(
            self._varies(t) for a in args if not isinstance(a, Tensor) for t in _tensors(a)
        ):
            self.refuse(f"it makes a tensor of numbers taken from tensors, by way of {name}")
        elif name in _SIZED and any(self._varies(a) for a in args[1:]):
            self.refuse(f"what it does depends on the values of its input, by way of {name}")

    def check_kinds(self, kinds: Any) -> None:
        """Checks the types of tensors in a call: subclasses may redefine operations.

        Raises:
            NotRecorded: A tensor subclass is not from torch.
        """
        for kind in kinds:
            if kind.__module__.split(".", 1)[0] != "torch":
                self.refuse(f"operations mean what {kind.__name__}, a kind of tensor, says")

    def refuse(self, reason: str) -> None:
        """Records a refusal, and raises it.

        Raises:
            NotRecorded: Always.
        """
        self.refusals.append(NotRecorded(reason))
        raise self.refusals[-1]

    def is_ours(self, value: Any) -> bool:
        """Whether a value is a tensor of the trace, not an external one."""
        if not isinstance(value, Tensor):
            return False
        return _is_wrapped(value) or self._tracker.knows(value)

    def _varies(self, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return False
        if _is_wrapped(value):
            return True
        return self._tracker.varies(value)


class Observer(Watch):
    """Watches a user's function during a trace, and records the line of each operation.

    An alias replaces each external tensor that the function reads, so that in-place operations
    leave no history on the user's tensor.

    Attributes:
        calls: For each call in order: first sequence number, sequence number after the last, file
            and line.
        aliases: Alias and original of each external tensor, by the id of the original.
    """

    def __init__(self, tracker: TensorTracker) -> None:
        """Starts without a call."""
        super().__init__(tracker, [])
        self.calls: list[tuple[int, int, str, int]] = []
        self.aliases: dict[int, tuple[Tensor, Tensor]] = {}
        self._writes = False

    def __enter__(self) -> Observer:
        """Marks the start of the function."""
        super().__enter__()  # type: ignore[no-untyped-call]
        self._tracker.in_function = True
        return self

    def __exit__(self, *error: Any) -> None:
        """Marks the end of the function."""
        self._tracker.in_function = False
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    @property
    def originals(self) -> dict[int, Tensor]:
        """The external tensors, by the ids of their aliases."""
        return {id(alias): leaf for alias, leaf in self.aliases.values()}

    def cotangent(self, output: Tensor) -> Tensor:
        """A tensor to begin a backward pass with."""
        return self._tracker.cotangent(output)

    def enter(self, number: int | None) -> None:
        """Says which autograd node runs from here on, by its sequence number."""
        self._tracker.enter(number)

    def during_backward(self) -> AbstractContextManager[Any]:
        """The watch of a user's code in a backward pass."""
        return Watch(self._tracker, self.refusals)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Checks and runs a call, and records its line."""
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():
            return func(*args, **kwargs)  # the body of a control flow operator (torch.cond)
        self.check(func, (*args, *kwargs.values()))
        self.check_kinds(types)
        if getattr(func, "__name__", "") == "backward":
            self.refuse("it calls backward(), which writes to .grad of tensors from elsewhere")
        if func == _GET_GRAD and args[0].requires_grad and not self.is_ours(args[0]):
            self.refuse("it reads .grad of a tensor from elsewhere, which changes on its own")
        before = next_sequence()
        result = self.run(func, args, kwargs)
        after = next_sequence()
        if after > before:
            frame = _user_frame(sys._getframe(1))
            if frame is not None:
                self.calls.append((before, after, frame.f_code.co_filename, frame.f_lineno))
        return result

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a call, with aliases in place of external tensors."""
        name = getattr(func, "__name__", "")
        if name == "__deepcopy__":  # a copy of an external tensor is external too
            with real_values():
                return func(*args, **kwargs)
        if (
            name == "one_hot"
            and len(arguments := [*args, *kwargs.values()]) == 2
            and arguments[1] > 0
        ):
            return _one_hot(*arguments)
        self._writes = name in _WRITING or (name.endswith("_") and not name.endswith("__"))
        self._writes |= name.startswith("__i") or "out" in kwargs
        args, kwargs = self._aliased(args), self._aliased(kwargs)
        if name in _BACKWARD or _saving_hooks() is not None:  # torch calls a user's code
            # Twice: torch deactivates the outer watch while it handles the call.
            with self.during_backward(), self.during_backward():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _aliased(self, argument: Any) -> Any:
        """An argument with aliases in place of external tensors."""
        if isinstance(argument, Tensor):
            return self._alias(argument)
        kind = type(argument)
        if kind is tuple or kind is list:
            return kind([self._aliased(a) for a in argument])
        if kind is dict:
            return {k: self._aliased(a) for k, a in argument.items()}
        return argument

    def _alias(self, leaf: Tensor) -> Tensor:
        if self.is_ours(leaf) or not leaf.is_leaf:
            return leaf
        if id(leaf) not in self.aliases:
            if leaf.requires_grad and not self._writes:
                return leaf  # a user's cache may hold results, whose graph must reach the leaf
            with _DisableTorchFunction(), _DisableFuncTorch():
                alias = leaf.data  # with a version of its own
                if leaf.requires_grad:
                    alias.requires_grad_()
            self.aliases[id(leaf)] = alias, leaf  # the original too, or its id could be reused
        return self.aliases[id(leaf)][0]


class NullObserver:
    """An `Observer` that records only cotangents."""

    def __init__(self) -> None:
        """Starts without a cotangent."""
        self.cotangents: list[Tensor] = []

    def __enter__(self) -> NullObserver:
        """Does nothing."""
        return self

    def __exit__(self, *_: object) -> None:
        """Does nothing."""

    def cotangent(self, output: Tensor) -> Tensor:
        """The cotangent of an output, equal to that of a recorder."""
        self.cotangents.append(distinct_cotangent(output))
        return self.cotangents[-1]

    def enter(self, number: int | None) -> None:
        """Does nothing."""

    def during_backward(self) -> AbstractContextManager[Any]:
        """An empty context."""
        return nullcontext()


_GET_GRAD = torch.Tensor.grad.__get__  # type: ignore[union-attr]
_WRITING = frozenset({"__setitem__"})
_BACKWARD = frozenset({"backward", "grad"})
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
# Methods that move numbers into a tensor, or out of one, without an operation.
_HIDDEN = frozenset(
    {
        "__array__",
        "__deepcopy__",
        "__dlpack__",
        "__format__",
        "__reduce_ex__",
        "apply_",
        "map2_",
        "map_",
        "__repr__",
        "_typed_storage",
        "data_ptr",
        "numpy",
        "share_memory_",
        "storage",
        "untyped_storage",
    }
)
_READING = frozenset(
    {"__bool__", "__complex__", "__float__", "__index__", "__int__", "item", "tolist"}
)
# Functions that read values of their second and later arguments without an operation.
_SIZED = frozenset(
    {"_pack_padded_sequence", "_pad_packed_sequence", "ctc_loss", "nested_tensor", "tensor_split"}
)
# Functions that read tensors in lists while no mode is active.
_MAKING = frozenset({"as_tensor", "asarray", "new", "new_tensor", "scalar_tensor", "tensor"})


def _saving_hooks() -> Any:
    """The hooks of a user for saved tensors, or None."""
    return _hooks(False)


def _one_hot(classes: Tensor, number: int) -> Tensor:
    """As torch's `one_hot`, without its check of the range, which reads values."""
    return (classes.unsqueeze(-1) == torch.arange(number, device=classes.device)).to(torch.int64)


def _tensors(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for part in argument:
            yield from _tensors(part)


def _user_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost frame outside of torch and torchjac."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "").split(".", 1)[0]
        generated = frame.f_code.co_filename.startswith("<")
        if module not in _NOT_THE_USER and not generated:
            return frame
        frame = frame.f_back
    return None


_NOT_THE_USER = frozenset({"torch", "torchjac", "functorch"})


@corner("torch's function mode", "nothing is planned")
def OBSERVING() -> bool:
    """Autograd numbers nodes in order, and a function mode sees calls without an operation."""
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    before = next_sequence()
    y = x.sin()
    number: int = y.grad_fn._sequence_nr()  # type: ignore[union-attr]
    numbered = before <= number < next_sequence()
    seen: list[str] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(getattr(func, "__name__", ""))
            same = func in (_SET_DATA, _GET_GRAD)
            seen.extend(["known"] if same else [])
            return func(*args, **(kwargs or {}))

    with Mode():
        y.detach().numpy()
        x.detach().tolist()
        x.data = torch.zeros(2, dtype=torch.float64)
        with _DisableTorchFunction(), _DisableFuncTorch():
            x.exp()
        _ = x.grad
    return (
        numbered
        and {"detach", "numpy", "tolist"} <= set(seen)
        and "exp" not in seen
        and seen.count("known") == 2
        and not _is_wrapped(x)
        and _saving_hooks() is None
    )
