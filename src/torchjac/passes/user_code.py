"""Detects code of the user in a backward pass: hooks, custom functions, checkpointing.

Such code need not be linear in the cotangent, and it cannot be read off the graph: torch does not
tell which nodes carry hooks.
"""

from __future__ import annotations

import sys
from types import FrameType, TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from torchjac._torch.autograd import ENGINE


class UserCodeDetector(TorchFunctionMode):
    """Context around a backward pass that detects code of the user.

    Two traps: Python's profiling hook sees every Python function that runs on this thread, and a
    torch function mode sees every call of torch's Python API, also by a hook that is no Python
    function itself (`h.register_hook(torch.relu)`). Torch's own operations set off neither.

    Attributes:
        saw_user_code: Whether any ran; None if a Python function that calls nothing of torch could
            have been missed, because the pass runs on threads of a device or a profiler occupies
            the hook.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        ENGINE.holds()  # its check, at the first pass of a process, is not code of the user
        self._profiling = device.type == "cpu"
        self._calls = 0
        self._functions = 0
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
        if self._functions or self._calls > _OWN_CALLS:
            self.saw_user_code = True
        elif self._profiling:
            self.saw_user_code = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts a call of torch's Python API."""
        self._functions += 1
        return func(*args, **(kwargs or {}))

    def _event(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            self._calls += 1


# The calls that are not the pass's own: `backward` itself, and `__exit__`.
_OWN_CALLS = 2
