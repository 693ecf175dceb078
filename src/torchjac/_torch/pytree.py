"""Pytrees: nested containers of tensors, as in torch.func."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from torchjac._torch import containers
from torchjac._torch.private import checking_here, corner, private, private_type

_torch = private("torch.utils._pytree")
TreeSpec = private_type("torch.utils._pytree.TreeSpec")


def children(spec: Any) -> list[Any]:
    """The specs of the elements (a method since torch 2.10, an attribute before)."""
    specs: list[Any] = spec.children() if hasattr(spec, "children") else spec.children_specs
    return specs


@corner("torch's pytree", "only tuples, lists and dicts are containers")
def TREES() -> bool:
    """Leaves, specs and paths of containers."""
    tree = {"b": [1, (2, None)], "a": 3}
    leaves, spec = _torch.tree_flatten(tree)
    paths, _ = _torch.tree_flatten_with_path(tree)
    return (
        sorted(map(str, leaves)) == ["1", "2", "3", "None"]
        and _torch.tree_unflatten(leaves, spec) == tree
        and (spec.num_leaves, spec.is_leaf(), spec.type) == (4, False, dict)
        and [c.num_leaves for c in children(spec)] in ([3, 1], [1, 3])
        and "['b'][1][0]" in [_torch.keystr(path) for path, _ in paths]
        and _torch.tree_structure(0).is_leaf()
        and _torch.SUPPORTED_NODES[list].unflatten_fn([1], None) == [1]
    )


with checking_here():  # an import must not wait for a thread
    _pytree: Any = _torch if TREES.holds() else containers
LEAF: Any = _pytree.tree_structure(0)


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves and the spec of a tree."""
    if isinstance(tree, Tensor):
        return [tree], LEAF
    leaves, spec = _pytree.tree_flatten(tree)
    return leaves, spec


def unflatten(leaves: Sequence[Any], spec: Any) -> Any:
    """The tree of a spec with these leaves: inverse of `flatten`."""
    if spec is LEAF:
        return leaves[0]
    return _pytree.tree_unflatten(list(leaves), spec)


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Applies a function to every leaf."""
    return function(tree) if isinstance(tree, Tensor) else _pytree.tree_map(function, tree)


def leaf_names(root: str, tree: Any) -> list[str]:
    """The path to each leaf as Python text, such as `inputs['w'][0]`."""
    paths, _ = _pytree.tree_flatten_with_path(tree)
    return [root + _pytree.keystr(path) for path, _ in paths]


def functions(cls: type) -> tuple[Any, ...]:
    """The flatten and unflatten functions of a container class; empty for any other class."""
    node = _pytree.SUPPORTED_NODES.get(cls)
    return () if node is None else (node.flatten_fn, node.unflatten_fn)
