"""The autograd graph of a program: operations, their number, and the memory traffic of a pass."""

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
        nodes: Nodes of the graph, each once.
        operations: Types of the nodes.
        traffic: Bytes of the gradients at the first and the last node of each type.
        custom: Whether a node runs a user's own backward (a Python or C++ autograd function).
            A user's backward may be nonlinear in the cotangent, and may fail when batched.
    """

    nodes: tuple[Any, ...]
    operations: frozenset[type]
    traffic: int
    custom: bool

    @property
    def differentiable(self) -> bool:
        """Whether torch can differentiate the backward pass (False for nodes of torch.compile)."""
        return not any(map(is_compiled, self.operations))

    @property
    def kind(self) -> Hashable:
        """A cache key: graphs of equal kind share plans, timings and proofs."""
        return len(self.nodes), self.operations, self.traffic.bit_length()


@dataclass(frozen=True, slots=True)
class Profile:
    """Size of one backward pass.

    Attributes:
        nodes: Nodes between outputs and inputs.
        traffic: Bytes of all gradients that one cotangent produces.
        largest: Bytes of the largest gradient.
        peak: Most bytes of gradients that are alive at once while the pass runs.
    """

    nodes: int
    traffic: int
    largest: int
    peak: int


def traverse(program: EagerGraph) -> Graph:
    """Traverses the graph from the outputs to the inputs, breadth first (0.25 us a node)."""
    roots = [gradient_node(t) for t in program.outputs]
    inputs = {t.grad_fn for t in program.inputs if t.grad_fn is not None}
    seen = set(roots)
    nodes = list(seen)
    for node in nodes:  # the list grows during the loop
        if node in inputs:
            continue  # a pass stops at inputs
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
    # Reading a size takes 0.4 us. The sizes of the first and the last node of each type
    # distinguish graphs of equal topology; `profile` reads all sizes.
    traffic = 0
    for kind, node in first.items():
        size = _gradient_bytes(node)
        traffic += size + (size if last[kind] is node else _gradient_bytes(last[kind]))
    return Graph(tuple(nodes), frozenset(first), traffic, any(map(is_custom, first)))


def profile(program: EagerGraph, graph: Graph) -> Profile:
    """Adds up the gradients of a pass over the nodes that lead to the inputs.

    The peak replays the order of the engine (highest sequence number first). An incoming gradient
    lives from the node that produces it to the end of the node that reads it.
    """
    leading = _nodes_to_inputs(graph.nodes, {gradient_node(t) for t in program.inputs})
    size = {node: _gradient_bytes(node) for node in leading}
    pending: set[Any] = set()
    bytes_alive = peak = 0
    for node in sorted(leading, key=sequence_number, reverse=True):
        if node not in pending:
            bytes_alive += size[node]  # a root: the caller passes the cotangent
        for child, _ in node.next_functions:
            if child in size and child not in pending:
                pending.add(child)
                bytes_alive += size[child]
        peak = max(peak, bytes_alive)
        bytes_alive -= size[node]
    return Profile(len(leading), sum(size.values()), max(size.values(), default=0), peak)


def _nodes_to_inputs(nodes: tuple[Any, ...], inputs: set[Any]) -> set[Any]:
    """The nodes on a path to an input."""
    reached = inputs & set(nodes)
    previous_size = -1
    while previous_size != len(reached):  # breadth-first order is nearly topological: few rounds
        previous_size = len(reached)
        for node in reversed(nodes):
            if node not in reached and any(child in reached for child, _ in node.next_functions):
                reached.add(node)
    return reached


def largest_eps(program: EagerGraph) -> float:
    """The machine epsilon of the least precise output or input."""
    dtypes = {t.dtype for t in (*program.outputs, *program.inputs)}
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _gradient_bytes(node: Any) -> int:
    total = 0
    for out in node_outputs(node):
        elements: int = prod(out.shape)
        total += elements * out.dtype.itemsize
    return total
