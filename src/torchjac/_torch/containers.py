"""Pytrees of tuples, lists and dicts: the fallback where torch's pytree is missing or changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class TreeSpec:
    """A container without its leaves.

    Attributes:
        type: Class of the container; None for a leaf.
        context: Keys of a dict; None for every other container.
        parts: Specs of the elements.
    """

    type: Any
    context: Any
    parts: tuple[TreeSpec, ...]

    @property
    def num_leaves(self) -> int:
        """Number of leaves."""
        return 1 if self.is_leaf() else sum(part.num_leaves for part in self.parts)

    def is_leaf(self) -> bool:
        """Whether the tree is a single leaf."""
        return self.type is None

    def children(self) -> list[TreeSpec]:
        """Specs of the elements."""
        return list(self.parts)


_LEAF = TreeSpec(None, None, ())
SUPPORTED_NODES: MappingProxyType[type, Any] = MappingProxyType({})


def tree_structure(tree: Any) -> TreeSpec:
    """The spec of a tree."""
    return tree_flatten(tree)[1]


def tree_flatten(tree: Any) -> tuple[list[Any], TreeSpec]:
    """The leaves and the spec of a tree."""
    pairs, spec = tree_flatten_with_path(tree)
    return [leaf for _, leaf in pairs], spec


def tree_flatten_with_path(tree: Any) -> tuple[list[tuple[tuple[str, ...], Any]], TreeSpec]:
    """The leaves of a tree, each with its path, and the spec."""
    kind = type(tree)
    if kind is dict:
        keys: list[Any] = list(tree)
    elif kind in (tuple, list) or _is_namedtuple(tree):
        keys = list(range(len(tree)))
    else:
        return [((), tree)], _LEAF
    leaves: list[tuple[tuple[str, ...], Any]] = []
    parts = []
    for key in keys:
        pairs, spec = tree_flatten_with_path(tree[key])
        name = f".{tree._fields[key]}" if _is_namedtuple(tree) else f"[{key!r}]"
        leaves += [((name, *path), leaf) for path, leaf in pairs]
        parts.append(spec)
    return leaves, TreeSpec(kind, tuple(keys) if kind is dict else None, tuple(parts))


def tree_unflatten(leaves: Sequence[Any], spec: TreeSpec) -> Any:
    """The tree of a spec with these leaves."""
    return _unflatten(iter(leaves), spec)


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """The tree with a function applied to each leaf."""
    leaves, spec = tree_flatten(tree)
    return tree_unflatten([function(leaf) for leaf in leaves], spec)


def keystr(path: Sequence[str]) -> str:
    """The path to a leaf as Python text."""
    return "".join(path)


def _unflatten(leaves: Any, spec: TreeSpec) -> Any:
    if spec.is_leaf():
        return next(leaves)
    children = [_unflatten(leaves, part) for part in spec.parts]
    if spec.type is dict:
        return dict(zip(spec.context, children, strict=True))
    return spec.type(*children) if hasattr(spec.type, "_fields") else spec.type(children)


def _is_namedtuple(tree: Any) -> bool:
    return isinstance(tree, tuple) and hasattr(tree, "_fields")
