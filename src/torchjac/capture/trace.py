"""Traces of the backward pass: u -> J'u as a graph of ATen operations.

The backward pass is traced, not the function. So custom `autograd.Function`s, straight-through
estimators, `detach` and `no_grad` mean the same as in torch. And every operation between cotangents
and gradients is linear, so few kinds of operation occur.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from torchjac._torch import modes
from torchjac._torch.autograd import backward, gradient_node, sequence_number
from torchjac._torch.pytree import flatten, leaf_names, unflatten
from torchjac._torch.trace import trace as tracing
from torchjac.call import Call, _varying_positions
from torchjac.capture.checks import check_leaves
from torchjac.capture.eager import PASS_THROUGH, RETURN_AS_AUX
from torchjac.capture.eager_graph import EagerGraph
from torchjac.capture.linear_program import LinearProgram, Scope
from torchjac.capture.nesting import nested
from torchjac.errors import CaptureRefused, TorchjacError
from torchjac.guards.rollback import restoring


def trace_function(call: Call, keep: Collection[Any]) -> LinearProgram:
    """Traces the backward pass of a function, for any input of these shapes.

    Control flow must not depend on values of floating-point arguments. Integer and bool arguments,
    and external tensors that the function reads, are constants.

    Args:
        call: The function and its arguments.
        keep: Operations not to decompose.

    Raises:
        CaptureRefused: Control flow depends on values, or the function cannot be traced.
    """
    function = FunctionOfTensors(call)

    def backward_pass(observer: tracing.Observer, *tensors: Tensor) -> list[Any]:
        inputs, outputs, live = function(observer, tensors)
        seeds = [observer.cotangent(o) for o in live]
        with (
            modes.passes(live),
            tracing.with_sequence_numbers(_nodes(live), observer),
            observer.during_backward(),
        ):
            gradients = backward(live, seeds, inputs) if live else [None] * len(inputs)
        remaining = iter(seeds)
        return [*(next(remaining) if o.requires_grad else None for o in outputs), *gradients]

    module, lines = traced(backward_pass, function.tensors(), True, keep, restoring(call))
    return _linear_program(module, function.row_shapes, function.column_shapes, "global", lines)


def trace_transposed(call: Call, keep: Collection[Any]) -> LinearProgram:
    """Traces v -> Jv, the transpose of the backward pass of a function.

    u -> J'u is linear in u, so its own backward pass is v -> Jv (see NOTE in `passes.forward`). The
    result is a linear program of J': its rows are the inputs of the function, its columns are the
    outputs. J'u is proved linear if u does not occur in v -> Jv.

    Args:
        call: The function and its arguments.
        keep: Operations not to decompose.

    Raises:
        CaptureRefused: Control flow depends on values, the function cannot be traced, or its
            backward pass is not linear or not differentiable.
    """
    function = FunctionOfTensors(call)

    def forward_pass(observer: tracing.Observer, *tensors: Tensor) -> list[Any]:
        inputs, outputs, live = function(observer, tensors)
        seeds = [observer.cotangent(o).requires_grad_() for o in live]
        with (
            modes.passes(live),
            tracing.with_sequence_numbers(_nodes(live), observer),
            observer.during_backward(),
        ):
            gradients = backward(live, seeds, inputs, create_graph=True)
            tangents = [
                observer.cotangent(g) if g is not None and g.requires_grad else None
                for g in gradients
            ]
            pairs = [
                (g, v)
                for g, v in zip(gradients, tangents, strict=True)
                if g is not None and v is not None
            ]
            remaining = iter(backward([g for g, _ in pairs], [v for _, v in pairs], seeds))
        products = [next(remaining) if o.requires_grad else None for o in outputs]
        return [*tangents, *products, *seeds]

    module, lines = traced(forward_pass, function.tensors(), True, keep, restoring(call))
    transposed = _linear_program(
        module, function.column_shapes, function.row_shapes, "global", lines
    )
    products, seeds = _split(transposed.gradients, len(function.row_shapes))
    output = _output_node(module)
    output.args = ((*transposed.cotangents, *products),)
    for seed in seeds:
        assert seed is not None, "every seed is a placeholder"
        if seed.users:
            raise CaptureRefused("the backward pass is not known to be linear in its cotangent")
        module.graph.erase_node(seed)
    module.recompile()
    return replace(transposed, gradients=products)


R = TypeVar("R")


def _split(values: tuple[R, ...], at: int) -> tuple[tuple[R, ...], tuple[R, ...]]:
    return values[:at], values[at:]


class FunctionOfTensors:
    """A call as a function of tensors: the differentiated leaves, then all other floating leaves.

    Attributes:
        row_shapes: Shapes of the outputs; empty before the first run.
        column_shapes: Shapes of the differentiated leaves.
    """

    def __init__(self, call: Call):
        """Flattens the arguments of a call."""
        self._call = call
        self._leaves, self._spec = call.leaves, call.spec
        check_leaves(self._leaves, call.name_input, "input", PASS_THROUGH)
        self._other_leaves, self._other_spec = call.other_leaves, call.other_spec
        self._variable = _varying_positions(self._other_leaves)
        self.row_shapes: list[torch.Size] = []
        self.column_shapes = [t.shape for t in self._leaves]

    def tensors(self) -> list[Tensor]:
        """Copies of the arguments, so that every tensor that aliases one is a view of it."""
        floating = (self._other_leaves[i] for i in self._variable)
        with modes.recording():
            return [
                _copy_with_strides(modes.usable_in_graph(t).data)
                for t in (*self._leaves, *floating)
            ]

    def __call__(
        self, observer: tracing.Observer, tensors: Sequence[Tensor]
    ) -> tuple[list[Tensor], Sequence[Tensor], list[Tensor]]:
        """Runs the function; returns the differentiated tensors, all outputs, and live outputs."""
        call, count = self._call, len(self._leaves)
        inputs = [t.detach().requires_grad_() for t in tensors[:count]]
        other_leaves = list(self._other_leaves)
        for position, value in zip(self._variable, tensors[count:], strict=True):
            needs_gradient = (
                isinstance(other_leaves[position], Tensor) and other_leaves[position].requires_grad
            )
            other_leaves[position] = value.detach().requires_grad_() if needs_gradient else value
        args, kwargs = unflatten(other_leaves, self._other_spec)
        bound = Call(call.function, call.argnums, call.has_aux, _all_arguments(call, args), kwargs)
        with modes.recording(), nested(), observer:
            try:
                output, _ = bound.run(unflatten(inputs, self._spec))
            except TorchjacError as error:  # from a Jacobian inside the function
                raise CaptureRefused(str(error)) from error
        leaves = flatten(output)[0]
        outputs = check_leaves(
            leaves, lambda p: leaf_names("output", output)[p], "output", RETURN_AS_AUX
        )
        self.row_shapes[:] = [o.shape for o in outputs]
        return inputs, outputs, [o for o in outputs if o.requires_grad]


def _copy_with_strides(tensor: Tensor) -> Tensor:
    """A copy with equal strides and offset, or the tensor itself if a copy takes much memory."""
    start, steps = tensor.storage_offset(), tensor.stride()
    sizes = zip(tensor.shape, steps, strict=True)
    reach = start + 1 + sum((size - 1) * step for size, step in sizes)
    if not tensor.numel() or 0 in steps or reach > 4 * tensor.numel() + 1024:
        return tensor
    memory = torch.empty(reach, dtype=tensor.dtype, device=tensor.device)
    return memory.as_strided(tensor.shape, steps, start).copy_(tensor)


def trace_graph(graph: EagerGraph, keep: Collection[Any]) -> LinearProgram:
    """Traces the backward pass of an existing graph by a single run.

    Tensors that the graph saved are constants, so the linear program is valid for this evaluation
    only.

    Raises:
        CaptureRefused: The backward pass cannot be traced.
    """
    nest = graph.nest
    nodes = _nodes(graph.outputs)

    def backward_pass(observer: tracing.Observer, *seeds: Tensor) -> list[Any]:
        with (
            modes.passes(seeds),
            modes.recording(),
            tracing.with_sequence_numbers(nodes, observer),
            observer.during_backward(),
        ):
            gradients = backward(graph.outputs, seeds, graph.inputs) if seeds else []
        live = dict(zip(nest.live_outputs, seeds, strict=True))
        input_gradients = dict(zip(nest.live_inputs, gradients, strict=False))
        return [
            *(live.get(i) for i in range(len(nest.outputs))),
            *(input_gradients.get(i) for i in range(len(nest.inputs))),
        ]

    # No zeros, as a zero could hide values that leave the graph in the backward pass (by NumPy).
    seeds = [
        torch.linspace(0.3, 1.7, o.numel(), dtype=o.dtype, device=o.device).reshape(o.shape)
        for o in graph.outputs
    ]
    module, _ = traced(backward_pass, [s.detach() for s in seeds], False, keep)
    shapes = [o.shape for o in nest.outputs], [x.shape for x in nest.inputs]
    return _linear_program(module, *shapes, "local", _node_lines(nodes))


# Errors of torch where a trace fails; all other errors come from the function itself.
_UNTRACEABLE = (
    RuntimeError,
    TypeError,
    ValueError,
    NotImplementedError,
    AssertionError,
    AttributeError,
)


def traced(
    function: Any,
    tensors: Sequence[Tensor],
    parameters_vary: bool,
    keep: Collection[Any],
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[fx.GraphModule, dict[int, str]]:
    """Traces a function of tensors: its graph, and the line of each sequence number.

    Raises:
        CaptureRefused: The function cannot be traced.
    """
    try:
        with modes.recording(), modes.preserved_random_state(tensors):
            return tracing.trace(
                function, tensors, parameters_vary=parameters_vary, keep=keep, around=around
            )
    except TorchjacError:
        raise
    except tracing.DATA_DEPENDENT as dependent:
        raise CaptureRefused(
            "what the function does depends on the values of its input (an `if` on a tensor, "
            ".item(), a boolean mask as an index, nonzero)",
        ) from dependent
    except tracing.UNSUPPORTED as unsupported:
        raise CaptureRefused(f"{unsupported}") from unsupported
    except _UNTRACEABLE as other:
        first = str(other).strip().split("\n", 1)[0]
        raise CaptureRefused(f"it cannot be traced: {type(other).__name__}: {first}") from other


def _linear_program(
    module: fx.GraphModule,
    rows: Sequence[torch.Size],
    columns: Sequence[torch.Size],
    scope: Scope,
    lines: dict[int, str],
) -> LinearProgram:
    leaves: list[Any] = list(_output_node(module).args[0])  # type: ignore[arg-type]
    return LinearProgram(
        module,
        tuple(leaves[: len(rows)]),
        tuple(leaves[len(rows) :]),
        tuple(rows),
        tuple(columns),
        scope,
        lines,
    )


def _output_node(module: fx.GraphModule) -> fx.Node:
    """The output node of a graph."""
    output: fx.Node = next(node for node in module.graph.nodes if node.op == "output")
    return output


def _all_arguments(call: Call, other_arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """All positional arguments; `Call.run` replaces the differentiated ones."""
    differentiated = set(call.positions())
    return tuple(call.args[i] if i in differentiated else a for i, a in enumerate(other_arguments))


def _nodes(outputs: Sequence[Tensor]) -> list[Any]:
    """Every autograd node that some outputs depend on."""
    nodes = list(dict.fromkeys(gradient_node(o) for o in outputs))
    visited = set(nodes)
    for node in nodes:  # breadth first: the list grows during the loop
        for child, _ in node.next_functions:
            if child is not None and child not in visited:
                visited.add(child)
                nodes.append(child)
    return nodes


def _node_lines(nodes: Sequence[Any]) -> dict[int, str]:
    """The line that anomaly mode recorded, or the name of the node, by sequence number."""
    return {sequence_number(node): _line_of(node.metadata) or node.name() for node in nodes}


def _line_of(metadata: dict[str, Any]) -> str | None:
    """The user's line in the stack that `torch.autograd.detect_anomaly` records, or None."""
    for entry in reversed(metadata.get("traceback_", [])):
        first = entry.strip().split("\n", 1)[0]
        if first.startswith("File ") and "/torch/" not in first:
            file, line = first.split('"')[1], first.split("line ")[1].split(",")[0]
            return f"{file}:{line}"
    return None


def trace_value(call: Call, keep: Collection[Any]) -> fx.GraphModule:
    """Traces a function: the graph from its tensors to its outputs.

    Args:
        call: The function and its arguments.
        keep: Operations not to decompose.

    Raises:
        CaptureRefused: Control flow depends on values, or the function cannot be traced.
    """
    function = FunctionOfTensors(call)

    def value(observer: tracing.Observer, *tensors: Tensor) -> Sequence[Any]:
        return list(function(observer, tensors)[1])

    return traced(value, function.tensors(), True, keep, restoring(call))[0]
