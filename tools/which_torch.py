"""Prints which build of torch is installed, in one line of the set-up."""

from __future__ import annotations

import sys
from importlib.metadata import version


def described(torch: str, platform: str = sys.platform) -> str:
    """A line about a version of torch.

    Args:
        torch: A version, like `2.13.0+cpu`.
        platform: A value of `sys.platform`.
    """
    if "+cpu" in torch or not platform.startswith("linux"):
        return f"torch {torch}: the build for CPUs"
    return (
        f"torch {torch}: the ordinary build, with GPU libraries. pip saw no build for CPUs, which "
        f"is smaller: to use it name its index, PIP_FLAGS='--extra-index-url ...' (the address is "
        f"in torch's installation instructions), after `make clean`"
    )


if __name__ == "__main__":
    print(described(version("torch")))
