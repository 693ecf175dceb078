"""Memory of large results, used again once nobody looks at it.

The system gives memory of 32 MiB and more back at once, and makes it page by page when it is asked
for again: results of that size are written at 2 GB/s into fresh memory, at 15 GB/s into used one.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from torchjac._torch.private import corner, private

_users = private("torch._C._storage_Use_Count")


class Reused:
    """Gives memory for one result; the same again if nothing refers to it any more.

    What it gave last stays allocated as long as this object lives.

    Args:
        zeros: Whether it is to be filled with zeros.
    """

    # What generated code calls it.
    __name__ = __qualname__ = "reused"

    def __init__(self, zeros: bool) -> None:
        """Begins with no memory."""
        self._zeros = zeros
        self._kept: Tensor | None = None
        self._alone: tuple[int, ...] = ()
        self._lock = threading.Lock()

    def __call__(self, size: Sequence[int], *, dtype: torch.dtype) -> Tensor:
        """A tensor of this size on the CPU."""
        with self._lock:  # two threads never get the same
            kept = self._kept
            fits = kept is not None and kept.dtype == dtype and kept.numel() == math.prod(size)
            if kept is None or not fits or not STORAGES.holds() or _state(kept) != self._alone:
                make = torch.zeros if self._zeros else torch.empty
                kept = self._kept = make(size, dtype=dtype)
                self._alone = _state(kept) if STORAGES.holds() else ()
            elif self._zeros:
                kept.zero_()
            # A tensor of its own: history and version of what was there before are not its.
            memory = kept.untyped_storage()
            steps = [math.prod(size[axis + 1 :]) for axis in range(len(size))]
            return torch.empty(0, dtype=dtype).set_(memory, 0, tuple(size), steps)

    def __deepcopy__(self, memo: object) -> Reused:
        """Memory is not copied."""
        return Reused(self._zeros)


def _state(tensor: Tensor) -> tuple[int, ...]:
    """How many tensors, arrays and others share its memory, who holds it as an object, where it is.

    Memory that was resized, or moved to be shared with another process, is elsewhere or of another
    size.
    """
    memory = tensor.untyped_storage()
    count: int = _users(memory._cdata)
    return count, sys.getrefcount(memory), memory.nbytes(), memory.data_ptr()


@corner("the count of tensors that share memory", "memory of large results is not used again")
def STORAGES() -> bool:
    """The count tells whether another tensor or array shares memory."""
    tensor = torch.zeros(4, dtype=torch.float64)
    alone = _state(tensor)
    view = tensor[1:]
    shared = _state(tensor)
    del view
    again = _state(tensor)
    array = tensor.numpy()
    lent = _state(tensor)
    return alone == again and alone not in (shared, lent) and array.shape == (4,)
