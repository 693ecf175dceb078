"""How much memory a Jacobian may use beside its result."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from torchjac.errors import ArgumentError

# A quarter leaves room for the result, for the rest of the program and for what the estimate of a
# pass misses (temporaries inside operations).
_SHARE = 4
_FLOOR = 64 * 2**20


def default_budget(device: torch.device) -> int:
    """Bytes that passes may hold at once on a device: a quarter of what is free now."""
    return max(_FLOOR, _free(device) // _SHARE)


def check_budget(budget: int | None) -> int | None:
    """Returns the budget if it is a positive number of bytes, or None.

    Raises:
        ArgumentError: It is neither.
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
    return min(_free_in_system(), _free_in_cgroup())


def _free_in_system() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30  # no way to ask: what a small laptop has to spare


def _free_in_cgroup() -> int:
    """What a container still allows (cgroup v2); a very large number where there is no limit."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return int(limit) - used
    except (OSError, ValueError):
        return 2**62
