"""Detects user code in a backward pass: hooks, custom functions, checkpointing.

User code may be nonlinear in the cotangent. The graph does not show user code: torch does not
expose the hooks of nodes.
"""

from __future__ import annotations

import sys
from types import FrameType, TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from torchjac._torch.autograd import ENGINE


class UserCodeDetector(TorchFunctionMode):
    """Context around a backward pass that detects user code.

    The detector has two parts. Python's profiling hook sees every Python function that runs on this
    thread. A torch function mode sees every call of torch's Python API, including hooks that are
    builtins (`h.register_hook(torch.relu)`). Operations of torch itself trigger neither.

    Attributes:
        saw_user_code: Whether user code ran; None if unknown. A Python function without calls of
            torch is invisible if the pass runs on threads of a device, or if a profiler occupies
            the profiling hook.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        ENGINE.holds()  # checks the contract now: the check runs Python code
        self._profiling = device.type == "cpu"
        self._python_calls = 0
        self._torch_calls = 0
        self.saw_user_code: bool | None = None

    def __enter__(self) -> UserCodeDetector:
        """Starts the detection."""
        super().__enter__()  # type: ignore[no-untyped-call]
        self._profiling = self._profiling and sys.getprofile() is None
        if self._profiling:
            sys.setprofile(self._event)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the detection, and sets `saw_user_code`."""
        if self._profiling:
            sys.setprofile(None)
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if self._torch_calls or self._python_calls > _OWN_CALLS:
            self.saw_user_code = True
        elif self._profiling:
            self.saw_user_code = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts a call of torch's Python API."""
        self._torch_calls += 1
        return func(*args, **(kwargs or {}))

    def _event(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            self._python_calls += 1


# Python calls of the detector itself: `backward` and `__exit__`.
_OWN_CALLS = 2
