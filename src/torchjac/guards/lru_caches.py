"""The results in a cache of `functools.lru_cache`, which only the garbage collector shows."""

from __future__ import annotations

import gc
from typing import Any


def cached_results(function: Any) -> dict[int, tuple[Any, Any]] | None:
    """Arguments and result of each cached call, by the identity of the arguments.

    Args:
        function: The result of `functools.lru_cache`.

    Returns:
        A dictionary; None where the results are not visible.
    """
    size = function.cache_info().currsize
    if not size:
        return {}
    # Key, result and type of one link after the other, if their number is limited; then the table.
    met = gc.get_referents(function)
    start = 1 if met[0] is type(function) else 0
    limited = function.cache_info().maxsize is not None
    step = 3 if _is_link(met[start + 2]) else 2
    end = start + step * size if limited else start
    table = met[end] if end < len(met) else None
    if type(table) is not dict or len(table) != size:
        return None
    if not limited:
        return {id(key): (key, result) for key, result in table.items()}
    keys, results = met[start:end:step], met[start + 1 : end : step]
    if {*map(id, keys)} != {*map(id, table)}:
        return None
    return {id(key): (key, result) for key, result in zip(keys, results, strict=True)}


def _is_link(value: Any) -> bool:
    return isinstance(value, type) and value.__name__ == "_lru_list_elem"
