"""The eager graph: an autograd graph with its outputs and inputs, as a value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchjac._torch.pytree import TreeSpec

Replay = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True, slots=True)
class Nest:
    """The user's nesting of outputs and inputs, and the positions of live leaves.

    Attributes:
        output_spec: Pytree spec of the outputs.
        input_spec: Pytree spec of the inputs.
        outputs: All output leaves, with and without a graph.
        inputs: All input leaves, with and without a graph.
        live_outputs: Positions in `outputs` of the leaves that have a graph.
        live_inputs: Positions in `inputs` of the leaves that have a graph.
        name_output: Name of an output leaf by its position, for messages.
        name_input: Name of an input leaf by its position, for messages.
    """

    output_spec: TreeSpec
    input_spec: TreeSpec
    outputs: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]
    live_outputs: tuple[int, ...]
    live_inputs: tuple[int, ...]
    name_output: Callable[[int], str]
    name_input: Callable[[int], str]


@dataclass(frozen=True, slots=True)
class EagerGraph:
    """An autograd graph with its outputs and inputs, ready for passes.

    Attributes:
        outputs: Output leaves that have a graph.
        inputs: Input leaves that have a graph.
        nest: The user's nesting of all leaves.
        batch: Number of independent samples on every leading axis, or None.
        retain_graph: Whether the graph must survive.
        create_graph: Whether the Jacobian must itself be differentiable.
        replay: Evaluates the function on other inputs; None for a graph without a function.
    """

    outputs: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]
    nest: Nest
    batch: int | None
    retain_graph: bool
    create_graph: bool
    replay: Replay | None

    @property
    def device(self) -> torch.device:
        """Device of the first output (or of the first input), where most of the work happens."""
        return (self.outputs or self.inputs or self.nest.inputs)[0].device
