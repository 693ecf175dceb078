"""The format of files on disk: NumPy arrays and one JSON text, no pickle.

Plans (`compiler/store.py`) and patterns (`sparsity/pattern_io.py`) are files of this format. A file
holds data, never code.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

# Name of the array that holds the JSON text.
_ABOUT = "about"


def pack(about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of a file.

    Args:
        about: Values that JSON can express.
        arrays: Arrays by name; `about` is not a name of theirs.
    """
    text = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
    file = io.BytesIO()
    named: dict[str, Any] = {**arrays, _ABOUT: text}
    np.savez_compressed(file, **named)
    return file.getvalue()


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The JSON text and the arrays of a file.

    Raises:
        Exception: The bytes are no such file: whatever readers of archives, arrays and JSON raise.
    """
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    about = json.loads(arrays.pop(_ABOUT).tobytes())
    if not isinstance(about, dict):
        raise ValueError("its text is not an object")
    return about, arrays
