"""Warnings name the line that called torchjac: Python shows a warning once for each line."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import torchjac
from laws import value
from torchjac.errors import LocalPatternWarning, PatternWarning, UnusedInputWarning, warn

X = value(4)


def unused(x: Tensor, y: Tensor) -> Tensor:
    return x * x


def branches(x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x


CALLS: dict[str, tuple[type[Warning], Callable[[], Any]]] = {
    "call": (UnusedInputWarning, lambda: torchjac.jacobian(unused, (0, 1))(X, X)),
    "sparse": (
        UnusedInputWarning,
        lambda: torchjac.jacobian(unused, (0, 1), layout=torch.sparse_csr)(X, X),
    ),
    "value_and": (UnusedInputWarning, lambda: torchjac.jacobian(unused, (0, 1)).value_and(X, X)),
    "explain": (UnusedInputWarning, lambda: torchjac.jacobian(unused, (0, 1)).explain(X, X)),
    "has_aux": (
        UnusedInputWarning,
        lambda: torchjac.jacobian(lambda x, y: (x * x, 1), (0, 1), has_aux=True)(X, X),
    ),
    "hessian": (
        UnusedInputWarning,
        lambda: torchjac.hessian(lambda x, y: (x**3).sum(), (0, 1))(X, X),
    ),
    "pattern": (LocalPatternWarning, lambda: torchjac.jacobian(branches).pattern(X)),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_line_of_the_user_is_named(name: str) -> None:
    category, call = CALLS[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    (warning,) = [w for w in caught if w.category is category]
    assert Path(warning.filename) == Path(__file__)


def test_two_lines_give_two_warnings() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        torchjac.jacobian(unused, (0, 1))(X, X)
        torchjac.jacobian(unused, (0, 1))(X, X)
    assert len({w.lineno for w in caught if w.category is UnusedInputWarning}) == 2


def test_a_dropped_pattern() -> None:
    """Compressed passes fail a check: torch's batching rule of this backward is wrong in 2.13."""

    def f(x: Tensor) -> Tensor:
        return torch.cdist(x, x * 2, 1.0)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torchjac.jacobian(f, layout=torch.sparse_csr)(value(4, 3).float())
    for warning in caught:  # another torch may have repaired its rule
        if issubclass(warning.category, PatternWarning):
            assert Path(warning.filename) == Path(__file__)


def test_without_a_user() -> None:
    """A program whose first frame is of torchjac."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn("a text", UserWarning)
    assert caught[0].filename == __file__
