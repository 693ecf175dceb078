"""Settings shared by all tests."""

from __future__ import annotations

import os
import tempfile

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci",
    derandomize=True,  # the same programs on every run: a failure is never a matter of luck
    deadline=None,
    max_examples=150,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    print_blob=True,
)
settings.register_profile(
    "search", settings.get_profile("ci"), derandomize=False, max_examples=3000
)
settings.load_profile(os.environ.get("TORCHJAC_TESTS", "ci"))


# Nothing of a user's is read or written; each worker of pytest-xdist has a cache of its own.
os.environ["TORCHJAC_CACHE_DIR"] = tempfile.mkdtemp(prefix="torchjac-tests-")


def pytest_configure(config: pytest.Config) -> None:
    """Let torch speak about itself: forward mode scripts its decompositions on first use."""
    config.addinivalue_line("filterwarnings", r"ignore:`torch\.jit:Warning")
