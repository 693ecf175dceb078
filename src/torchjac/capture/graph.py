"""Capture of tensors that already have a graph, for `torchjac.jac`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchjac._torch.pytree import LEAF, flatten, leaf_names
from torchjac.capture.checks import check_batch, check_leaves
from torchjac.capture.program import Nest, Program


def capture_graph(
    outputs: Any, inputs: Any, *, batched: bool, retain_graph: bool, create_graph: bool
) -> Program:
    """Takes outputs that exist, with the graph behind them, as a program.

    Args:
        outputs: A tensor or a pytree of tensors.
        inputs: A tensor or a pytree of tensors, leaves of the graph or not.
        batched: Whether leading axes are a batch of independent samples.
        retain_graph: Whether the graph must survive.
        create_graph: Whether the Jacobian must be differentiable.

    Raises:
        ArgumentError: Something is not a tensor, or leading axes do not fit.
        DtypeError: A tensor is not real floating-point.
    """

    def name_output(position: int) -> str:
        return leaf_names("outputs", outputs)[position]

    def name_input(position: int) -> str:
        return leaf_names("inputs", inputs)[position]

    output_leaves, output_spec = flatten(outputs)
    input_leaves, input_spec = flatten(inputs)
    outs = check_leaves(output_leaves, name_output, "output", "leave it out of outputs")
    ins = check_leaves(input_leaves, name_input, "input", "leave it out of inputs")
    batch = check_batch(outs, ins, name_output, name_input) if batched else None
    nest = build_nest(outs, ins, output_spec, input_spec, name_output, name_input)
    return Program(
        outputs=outs if len(nest.live_outputs) == len(outs) else pick(outs, nest.live_outputs),
        inputs=ins if len(nest.live_inputs) == len(ins) else pick(ins, nest.live_inputs),
        nest=nest,
        batch=batch,
        retain_graph=retain_graph or create_graph,
        create_graph=create_graph,
        replay=None,
    )


def build_nest(
    outputs: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    output_spec: Any,
    input_spec: Any,
    name_output: Any,
    name_input: Any,
) -> Nest:
    """The nesting, with the leaves that have a graph marked."""
    single = output_spec is LEAF and input_spec is LEAF
    if single and outputs[0].requires_grad and inputs[0].requires_grad:
        live: tuple[tuple[int, ...], tuple[int, ...]] = ((0,), (0,))
    else:
        live = (with_graph(outputs), with_graph(inputs))
    return Nest(output_spec, input_spec, outputs, inputs, *live, name_output, name_input)


def with_graph(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Positions of the tensors that require a gradient."""
    return tuple(i for i, t in enumerate(tensors) if t.requires_grad)


def pick(tensors: tuple[Tensor, ...], positions: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The tensors at these positions."""
    return tuple(tensors[i] for i in positions)
