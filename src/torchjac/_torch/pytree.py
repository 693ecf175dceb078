"""Nested containers of tensors, as torch.func takes and gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree

TreeSpec = _pytree.TreeSpec
LEAF: TreeSpec = _pytree.tree_structure(0)


def flatten(tree: Any) -> tuple[list[Any], TreeSpec]:
    """Leaves of a tree and the structure they came from."""
    if isinstance(tree, Tensor):
        return [tree], LEAF
    return _pytree.tree_flatten(tree)


def unflatten(leaves: Sequence[Any], spec: TreeSpec) -> Any:
    """The tree with these leaves: inverse of `flatten`."""
    if spec is LEAF:
        return leaves[0]
    return _pytree.tree_unflatten(list(leaves), spec)


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Applies a function to every leaf."""
    return function(tree) if isinstance(tree, Tensor) else _pytree.tree_map(function, tree)


def leaf_names(root: str, tree: Any) -> list[str]:
    """Where each leaf stands, as one would write it in Python: `inputs['w'][0]`."""
    paths, _ = _pytree.tree_flatten_with_path(tree)
    return [root + _pytree.keystr(path) for path, _ in paths]
