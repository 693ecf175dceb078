"""The memory budget: bytes that a Jacobian may use in addition to its result."""

from __future__ import annotations

import torch

from torchjac.errors import ArgumentError
from torchjac.host import system

# The default budget is one part in _SHARE of free memory. The rest is for the result, the user's
# program, and temporaries inside operations, which the estimate of a pass leaves out.
_SHARE = 4
_FLOOR = 64 * 2**20  # bytes: the smallest default budget


def default_budget(device: torch.device) -> int:
    """Bytes that passes may hold at once on a device: a quarter of its free memory."""
    return max(_FLOOR, _free(device) // _SHARE)


def check_budget(budget: int | None) -> int | None:
    """Returns a budget that is a positive number of bytes, or None.

    Raises:
        ArgumentError: The budget is neither.
    """
    if budget is None:
        return None
    if isinstance(budget, bool) or not isinstance(budget, int) or budget <= 0:
        raise ArgumentError(
            f"torchjac: memory_budget must be a positive number of bytes (an int such as "
            f"256 * 2**20) or None, got {budget!r}."
        )
    return budget


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return system.free_memory()
