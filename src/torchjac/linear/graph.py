"""Nodes of a linear program that depend on the cotangent."""

from __future__ import annotations

from torch import fx

from torchjac.capture.linear_program import LinearProgram
from torchjac.linear.known_values import SHAPE_ONLY, UNINITIALIZED


def linear_nodes(derivative: LinearProgram) -> set[fx.Node]:
    """Nodes whose value depends on a cotangent (not only on its shape)."""
    found = {c for c in derivative.cotangents if c is not None}
    for node in derivative.module.graph.nodes:
        if node.op != "call_function" or node.target in SHAPE_ONLY or node.target in UNINITIALIZED:
            continue
        if any(argument in found for argument in node.all_input_nodes):
            found.add(node)
    return found


def needed_nodes(derivative: LinearProgram, linear: set[fx.Node]) -> set[fx.Node]:
    """Linear nodes that a gradient is made of."""
    stack = [g for g in derivative.gradients if g is not None]
    found = set(stack)
    while stack:
        for argument in stack.pop().all_input_nodes:
            if argument not in found and argument in linear:
                found.add(argument)
                stack.append(argument)
    return found
