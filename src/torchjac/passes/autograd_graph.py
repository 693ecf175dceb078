"""The autograd graph behind a program: which operations, how many, and what a pass moves."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from torchjac._torch.autograd import (
    gradient_node,
    is_compiled,
    is_custom,
    node_outputs,
    sequence_number,
)
from torchjac.capture.eager_graph import EagerGraph


@dataclass(frozen=True, slots=True)
class Graph:
    """The operations between outputs and inputs.

    Attributes:
        nodes: Each operation once.
        operations: Their kinds.
        traffic: Bytes of the gradients at the first and the last operation of each kind.
        custom: Whether one of them runs a user's own code (a Python or C++ autograd function),
            which need not be linear in the cotangent, nor survive being batched.
    """

    nodes: tuple[Any, ...]
    operations: frozenset[type]
    traffic: int
    custom: bool

    @property
    def differentiable(self) -> bool:
        """Whether torch can differentiate its backward pass (not where torch.compile made it)."""
        return not any(map(is_compiled, self.operations))

    @property
    def kind(self) -> Hashable:
        """Equal for graphs that one plan suits, and on which one proof of it holds."""
        return len(self.nodes), self.operations, self.traffic.bit_length()


@dataclass(frozen=True, slots=True)
class Profile:
    """Size of one backward pass.

    Attributes:
        nodes: Operations on the way.
        traffic: Bytes of all gradients that one cotangent produces.
        largest: Bytes of the largest of them.
        peak: Bytes of those alive at once, at most, while the pass runs.
    """

    nodes: int
    traffic: int
    largest: int
    peak: int


def survey(program: EagerGraph) -> Graph:
    """Walks the graph from the outputs as far as the inputs (about 0.25 us an operation)."""
    roots = [gradient_node(t) for t in program.outputs]
    inputs = {t.grad_fn for t in program.inputs if t.grad_fn is not None}
    seen = set(roots)
    nodes = list(seen)
    for node in nodes:  # grows while it is walked: breadth first
        if node in inputs:
            continue  # what is behind an input does not matter
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                nodes.append(child)
    first: dict[type, Any] = {}
    last: dict[type, Any] = {}
    for node in nodes:
        kind = type(node)
        first.setdefault(kind, node)
        last[kind] = node
    # Reading a size takes 0.4 us. Those of the first and the last operation of each kind tell a
    # graph from a larger one of the same shape; a profile reads all of them.
    traffic = 0
    for kind, node in first.items():
        size = _size(node)
        traffic += size + (size if last[kind] is node else _size(last[kind]))
    return Graph(tuple(nodes), frozenset(first), traffic, any(map(is_custom, first)))


def profile(program: EagerGraph, graph: Graph) -> Profile:
    """Adds up what a pass over the part of a graph that leads to the inputs holds.

    The peak replays the engine's order (highest sequence number first): a node's incoming gradient
    is freed when it has run, those it produces live until their own node runs.
    """
    leading = _leading(graph.nodes, {gradient_node(t) for t in program.inputs})
    size = {node: _size(node) for node in leading}
    alive: set[Any] = set()
    held = peak = 0
    for node in sorted(leading, key=sequence_number, reverse=True):
        if node not in alive:
            held += size[node]  # a root: its cotangent is given
        for child, _ in node.next_functions:
            if child in size and child not in alive:
                alive.add(child)
                held += size[child]
        peak = max(peak, held)
        held -= size[node]
    return Profile(len(leading), sum(size.values()), max(size.values(), default=0), peak)


def _leading(nodes: tuple[Any, ...], inputs: set[Any]) -> set[Any]:
    """The nodes from which an input can be reached."""
    found = inputs & set(nodes)
    before = -1
    while before != len(found):  # breadth-first order backward is nearly topological: few rounds
        before = len(found)
        for node in reversed(nodes):
            if node not in found and any(child in found for child, _ in node.next_functions):
                found.add(node)
    return found


def coarsest(program: EagerGraph) -> float:
    """Unit in the last place of the least precise output or input."""
    dtypes = {t.dtype for t in (*program.outputs, *program.inputs)}
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _size(node: Any) -> int:
    total = 0
    for out in node_outputs(node):
        elements: int = prod(out.shape)
        total += elements * out.dtype.itemsize
    return total
