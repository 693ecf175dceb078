"""Capture of a function and its arguments, for `torchjac.jacobian`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from torchjac._torch import modes
from torchjac._torch.pytree import LEAF, TreeSpec, flatten, leaf_names, tree_map, unflatten
from torchjac.call import Call
from torchjac.capture.checks import check_batch, check_leaves
from torchjac.capture.eager_graph import EagerGraph, Nest
from torchjac.capture.nesting import nested

PASS_THROUGH = "pass it as an argument outside argnums, or as a keyword argument"
RETURN_AS_AUX = "return it beside the result with has_aux=True"


def capture_function(
    call: Call, *, batched: bool, create_graph: bool, replayable: bool
) -> tuple[EagerGraph, Any]:
    """Evaluates a function once, and returns its autograd graph.

    PyTorch records the graph while the function runs as usual. So control flow, in-place writes,
    hooks, checkpointing and custom functions mean the same as in a training step, and random
    operations run once.

    Args:
        call: The function and its arguments.
        batched: Whether leading axes are a batch of independent samples.
        create_graph: Whether the Jacobian must be differentiable.
        replayable: Whether passes may run the function again, on other inputs.

    Returns:
        The graph, and the result of the function (with aux, if it has one).

    Raises:
        ArgumentError: An argument or a result is not a tensor, or leading axes do not agree.
        DtypeError: A tensor is not real floating-point.
    """
    input_leaves, input_spec = call.leaves, call.spec
    check_leaves(input_leaves, call.name_input, "input", PASS_THROUGH)
    if _has_inference_tensors(call):
        call = _without_inference_tensors(call)
        input_leaves = call.leaves
    with modes.recording(), nested():
        inputs = tuple(_differentiable(leaf, create_graph) for leaf in input_leaves)
        output, returned = call.run(unflatten(inputs, input_spec))
    leaves, output_spec = flatten(output)

    def name_output(position: int) -> str:
        return leaf_names("output", output)[position]

    outputs = check_leaves(leaves, name_output, "output", RETURN_AS_AUX)
    batch = check_batch(outputs, inputs, name_output, call.name_input) if batched else None
    nest = build_nest(outputs, inputs, output_spec, input_spec, name_output, call.name_input)
    graph = EagerGraph(
        outputs=pick(outputs, nest.live_outputs),
        inputs=inputs,
        nest=nest,
        batch=batch,
        retain_graph=True,
        create_graph=create_graph,
        replay=_replay(call, input_spec, output_spec, nest.live_outputs) if replayable else None,
    )
    return graph, returned


def detached(tree: Any) -> Any:
    """The tree with every tensor detached, so that results do not keep a graph alive."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def _differentiable(leaf: Tensor, create_graph: bool) -> Tensor:
    if create_graph and leaf.requires_grad:
        return leaf.view_as(leaf)  # on the caller's graph, but used by this call only
    return leaf.detach().requires_grad_()


def _has_inference_tensors(call: Call) -> bool:
    for argument in (*call.args, *call.kwargs.values()):
        if isinstance(argument, Tensor):
            if argument.is_inference():
                return True
        elif isinstance(argument, (dict, list, tuple)) and any(
            leaf.is_inference() for leaf in flatten(argument)[0] if isinstance(leaf, Tensor)
        ):
            return True
    return False


def _without_inference_tensors(call: Call) -> Call:
    def usable(leaf: Any) -> Any:
        return modes.usable_in_graph(leaf) if isinstance(leaf, Tensor) else leaf

    with modes.recording():
        args, kwargs = tree_map(usable, (call.args, call.kwargs))
    return Call(call.function, call.argnums, call.has_aux, args, kwargs)


def _replay(
    call: Call, input_spec: TreeSpec, output_spec: TreeSpec, live: tuple[int, ...]
) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    def replay(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        with modes.recording(), nested():
            output, _ = call.run(unflatten(inputs, input_spec))
        leaves, spec = flatten(output)
        if spec != output_spec:
            raise ValueError("the function returns another structure for copies of its input")
        return pick(tuple(leaves), live)

    return replay


def capture_graph(
    outputs: Any, inputs: Any, *, batched: bool, retain_graph: bool, create_graph: bool
) -> EagerGraph:
    """Captures the existing autograd graph of outputs.

    Args:
        outputs: A tensor or a pytree of tensors.
        inputs: A tensor or a pytree of tensors, leaves of the graph or not.
        batched: Whether leading axes are a batch of independent samples.
        retain_graph: Whether the graph must survive.
        create_graph: Whether the Jacobian must be differentiable.

    Raises:
        ArgumentError: An output or input is not a tensor, or leading axes do not agree.
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
    return EagerGraph(
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
    """The nesting of outputs and inputs, with the positions of the leaves that have a graph."""
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
