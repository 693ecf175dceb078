"""What one backward pass through a program costs, read off its graph."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from torchjac._torch.autograd import gradient_node, node_outputs, sequence_number
from torchjac.capture import Program


@dataclass(frozen=True, slots=True)
class Profile:
    """Size of one backward pass.

    Attributes:
        nodes: Operations on the graph between outputs and inputs.
        traffic: Bytes of all gradients that one cotangent produces on its way.
        largest: Bytes of the largest of them.
        peak: Bytes of those alive at once, at most, while the pass runs.
    """

    nodes: int
    traffic: int
    largest: int
    peak: int


def collect(program: Program) -> list[Any]:
    """The nodes of the graph behind the outputs, each once (about 0.2 us a node)."""
    roots = [gradient_node(t) if t.grad_fn is None else t.grad_fn for t in program.outputs]
    seen = set(roots)
    stack = list(seen)
    while stack:
        for child, _ in stack.pop().next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return list(seen)


def fingerprint(nodes: list[Any]) -> tuple[int, frozenset[type]]:
    """Tells graphs of different programs apart, well enough to remember a choice of plan."""
    return len(nodes), frozenset(map(type, nodes))


def profile(nodes: list[Any]) -> Profile:
    """Adds up what a pass over these nodes moves and holds.

    The peak replays the engine's order (highest sequence number first): a node's incoming gradient
    is freed when it has run, those it produces live until their own node runs.
    """
    size = {node: sum(_bytes(out) for out in node_outputs(node)) for node in nodes}
    alive: set[Any] = set()
    held = peak = 0
    for node in sorted(nodes, key=sequence_number, reverse=True):
        if node not in alive:
            held += size[node]  # a root: its cotangent is given
        for child, _ in node.next_functions:
            if child is not None and child in size and child not in alive:
                alive.add(child)
                held += size[child]
        peak = max(peak, held)
        held -= size[node]
    return Profile(len(nodes), sum(size.values()), max(size.values(), default=0), peak)


def _bytes(metadata: Any) -> int:
    itemsize: int = metadata.dtype.itemsize
    elements: int = prod(metadata.shape)
    return elements * itemsize
