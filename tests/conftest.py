"""Settings shared by all tests."""

from __future__ import annotations

import os
import tempfile
import zlib

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["pytester"]

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


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--opinfo-share=10` runs every tenth of the tests that go through torch's OpInfo tables."""
    parser.addoption("--opinfo-share", type=int, default=1, help="run one in so many of them")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out all but a share of the OpInfo tests, the same ones on every run."""
    share = config.getoption("--opinfo-share")

    def selected(item: pytest.Item) -> bool:
        swept = "opinfo" in item.nodeid or "test_accumulate.py::test_operations" in item.nodeid
        one_of_many = swept and "[" in item.nodeid
        return not one_of_many or zlib.crc32(item.nodeid.encode()) % share == 0

    left_out = [item for item in items if not selected(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if selected(item)]


def pytest_configure(config: pytest.Config) -> None:
    """Let torch speak about itself: forward mode scripts its decompositions on first use."""
    config.addinivalue_line("filterwarnings", r"ignore:`torch\.jit:Warning")
