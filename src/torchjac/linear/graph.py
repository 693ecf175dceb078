"""Nodes of a linear program that depend on the cotangent."""

from __future__ import annotations

from torch import fx

from torchjac.capture.linear_program import LinearProgram
from torchjac.linear.known_values import SHAPE_ONLY, UNINITIALIZED


def linear_nodes(program: LinearProgram) -> set[fx.Node]:
    """Nodes whose value depends on a cotangent, not only on the shape of one."""
    linear = {c for c in program.cotangents if c is not None}
    for node in program.module.graph.nodes:
        if node.op != "call_function" or node.target in SHAPE_ONLY or node.target in UNINITIALIZED:
            continue
        if any(argument in linear for argument in node.all_input_nodes):
            linear.add(node)
    return linear


def needed_nodes(program: LinearProgram, linear: set[fx.Node]) -> set[fx.Node]:
    """Linear nodes that some gradient depends on."""
    stack = [g for g in program.gradients if g is not None]
    needed = set(stack)
    while stack:
        for argument in stack.pop().all_input_nodes:
            if argument not in needed and argument in linear:
                needed.add(argument)
                stack.append(argument)
    return needed
