"""Tuples, lists and dicts taken apart: what is needed of torch's pytree where torch has none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class TreeSpec:
    """A container without its leaves.

    Attributes:
        type: Its class; None for a leaf.
        context: Keys of a dict; None for others.
        parts: Specs of what it holds.
    """

    type: Any
    context: Any
    parts: tuple[TreeSpec, ...]

    @property
    def num_leaves(self) -> int:
        """Number of leaves."""
        return 1 if self.is_leaf() else sum(part.num_leaves for part in self.parts)

    def is_leaf(self) -> bool:
        """Whether it is no container."""
        return self.type is None

    def children(self) -> list[TreeSpec]:
        """Specs of what it holds."""
        return list(self.parts)


_LEAF = TreeSpec(None, None, ())
SUPPORTED_NODES: MappingProxyType[type, Any] = MappingProxyType({})


def tree_structure(tree: Any) -> TreeSpec:
    """A tree without its leaves."""
    return tree_flatten(tree)[1]


def tree_flatten(tree: Any) -> tuple[list[Any], TreeSpec]:
    """Leaves of a tree, and the structure they came from."""
    pairs, spec = tree_flatten_with_path(tree)
    return [leaf for _, leaf in pairs], spec


def tree_flatten_with_path(tree: Any) -> tuple[list[tuple[tuple[str, ...], Any]], TreeSpec]:
    """Leaves of a tree with the way to each, and the structure they came from."""
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
    """The tree with these leaves."""
    return _unflatten(iter(leaves), spec)


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same tree with a function applied to each leaf."""
    leaves, spec = tree_flatten(tree)
    return tree_unflatten([function(leaf) for leaf in leaves], spec)


def keystr(path: Sequence[str]) -> str:
    """The way to a leaf, as one would write it in Python."""
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
