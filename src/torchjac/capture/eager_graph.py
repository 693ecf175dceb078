"""The value that capture hands to the later stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchjac._torch.pytree import TreeSpec

Replay = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True, slots=True)
class Nest:
    """How the user nested outputs and inputs, and which of them carry derivatives.

    Attributes:
        output_spec: Tree of the outputs.
        input_spec: Tree of the inputs.
        outputs: Every output leaf, also those without a graph.
        inputs: Every input leaf, also those without a graph.
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
    """A computation whose graph exists, ready to be differentiated.

    Attributes:
        outputs: Output leaves that have a graph.
        inputs: Input leaves that have a graph.
        nest: The user's nesting of all leaves.
        batch: Number of independent samples on every leading axis, or None.
        retain_graph: Whether the graph must survive.
        create_graph: Whether the Jacobian must itself be differentiable.
        replay: Evaluates the same function on other inputs; None for a graph that just exists.
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
        """Where most of the work happens: the device of the first output (else input)."""
        return (self.outputs or self.inputs or self.nest.inputs)[0].device
