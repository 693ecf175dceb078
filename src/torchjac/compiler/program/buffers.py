"""Buffers of large results, which the next call writes to if nothing else refers to them.

The system takes back memory of 32 MiB and more at once (`MAPPED_BYTES` of `host/costs.py`), and
maps it page by page for the next allocation. Writing into fresh memory runs at 2 GB/s, into memory
that is mapped at 15 GB/s.
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


class ReusedBuffer:
    """Allocates one result; the next call gets the same memory if nothing refers to the result.

    The last buffer stays allocated as long as this object lives.

    Args:
        zeros: Whether the buffer is filled with zeros.
    """

    # The name in generated code.
    __name__ = __qualname__ = "reused"

    def __init__(self, zeros: bool) -> None:
        """Begins with no buffer."""
        self._zeros = zeros
        self._buffer: Tensor | None = None
        self._unshared: tuple[int, ...] = ()
        self._lock = threading.Lock()

    def __call__(self, size: Sequence[int], *, dtype: torch.dtype) -> Tensor:
        """A tensor of this size on the CPU."""
        with self._lock:  # two threads never get the same buffer
            buffer = self._buffer
            fits = (
                buffer is not None and buffer.dtype == dtype and buffer.numel() == math.prod(size)
            )
            if (
                buffer is None
                or not fits
                or not STORAGES.holds()
                or _owners(buffer) != self._unshared
            ):
                make = torch.zeros if self._zeros else torch.empty
                buffer = self._buffer = make(size, dtype=dtype)
                self._unshared = _owners(buffer) if STORAGES.holds() else ()
            elif self._zeros:
                buffer.zero_()
            # A new tensor: it has neither the autograd history nor the version of the last one.
            memory = buffer.untyped_storage()
            steps = [math.prod(size[axis + 1 :]) for axis in range(len(size))]
            return torch.empty(0, dtype=dtype).set_(memory, 0, tuple(size), steps)

    def __deepcopy__(self, memo: object) -> ReusedBuffer:
        """Memory is not copied."""
        return ReusedBuffer(self._zeros)


def _owners(tensor: Tensor) -> tuple[int, ...]:
    """The number of tensors and arrays that share its memory, of references to it; size, address.

    Memory that was resized, or moved to be shared with another process, has another size or
    another address.
    """
    memory = tensor.untyped_storage()
    count: int = _users(memory._cdata)
    return count, sys.getrefcount(memory), memory.nbytes(), memory.data_ptr()


@corner("the count of tensors that share memory", "memory of large results is not used again")
def STORAGES() -> bool:
    """The count tells whether another tensor or array shares memory."""
    tensor = torch.zeros(4, dtype=torch.float64)
    alone = _owners(tensor)
    view = tensor[1:]
    shared = _owners(tensor)
    del view
    again = _owners(tensor)
    array = tensor.numpy()
    lent = _owners(tensor)
    return alone == again and alone not in (shared, lent) and array.shape == (4,)
