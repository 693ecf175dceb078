"""Noticing that a backward pass runs Python code: hooks, custom functions, checkpointing.

Such code need not be linear in the cotangent, and it cannot be read off the graph: torch does not
tell which nodes carry hooks.
"""

from __future__ import annotations

import sys
from types import FrameType, TracebackType
from typing import Any

import torch


class Watch:
    """Context around a backward pass; afterwards `saw_python` tells.

    Attributes:
        saw_python: Whether Python code ran; None if that could not be seen, because the pass runs
            on threads of a device or a profiler occupies Python's own hook.
    """

    def __init__(self, device: torch.device):
        self._possible = device.type == "cpu"
        self._calls = 0
        self.saw_python: bool | None = None

    def __enter__(self) -> Watch:
        """Begins to watch."""
        self._possible = self._possible and sys.getprofile() is None
        if self._possible:
            sys.setprofile(self._event)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends, and draws the conclusion."""
        if self._possible:
            sys.setprofile(None)
            # The calls that are not the pass's own: `backward` itself, and this method.
            self.saw_python = self._calls > _OWN_CALLS

    def _event(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            self._calls += 1


_OWN_CALLS = 2
