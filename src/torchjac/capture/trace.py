"""The derivative that PyTorch would run, written down: u -> J'u as a graph of ATen operations.

Tracing the backward pass, not the function, is what makes custom `autograd.Function`s,
straight-through estimators, `detach` and `no_grad` mean what they mean in torch; and everything
between cotangents and gradients is linear, so few kinds of operation occur.
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
from torchjac.call import Call, _variable
from torchjac.capture.checks import check_leaves
from torchjac.capture.eager import BESIDE, PASS_THROUGH
from torchjac.capture.eager_graph import EagerGraph
from torchjac.capture.linear_program import LinearProgram, Scope
from torchjac.capture.nesting import nested
from torchjac.errors import CaptureRefused, TorchjacError
from torchjac.guards.rollback import restoring


def trace_function(call: Call, keep: Collection[Any]) -> LinearProgram:
    """Traces the derivative of a function at any input of these shapes.

    Floating-point arguments have no value while it is traced; integer and bool arguments, and
    tensors that the function reads from elsewhere, are constants.

    Args:
        call: The function and its arguments.
        keep: Operations that need not be decomposed.

    Raises:
        CaptureRefused: What the function does depends on values, or cannot be traced.
    """
    program = FunctionOfTensors(call)

    def derivative(observer: tracing.Observer, *tensors: Tensor) -> list[Any]:
        inputs, outputs, live = program(observer, tensors)
        seeds = [observer.cotangent(o) for o in live]
        with (
            modes.passes(live),
            tracing.with_sequence_numbers(_nodes(live), observer),
            observer.during_backward(),
        ):
            gradients = backward(live, seeds, inputs) if live else [None] * len(inputs)
        found = iter(seeds)
        return [*(next(found) if o.requires_grad else None for o in outputs), *gradients]

    module, lines = traced(derivative, program.tensors(), True, keep, restoring(call))
    return _derivative(module, program.row_shapes, program.column_shapes, "global", lines)


def trace_transposed(call: Call, keep: Collection[Any]) -> LinearProgram:
    """Traces v -> Jv, the transposed of the derivative of a function.

    u -> J'u is linear in u, so pulling v back through it gives Jv (see NOTE in
    `passes.forward`). What is returned is the derivative of J': its rows are the inputs of
    the function, its columns the outputs. That J'u is linear is proved by u being nowhere in it.

    Args:
        call: The function and its arguments.
        keep: Operations that need not be decomposed.

    Raises:
        CaptureRefused: What the function does depends on values, or cannot be traced, or its
            backward pass is not linear or cannot be differentiated.
    """
    program = FunctionOfTensors(call)

    def derivative(observer: tracing.Observer, *tensors: Tensor) -> list[Any]:
        inputs, outputs, live = program(observer, tensors)
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
            found = iter(backward([g for g, _ in pairs], [v for _, v in pairs], seeds))
        products = [next(found) if o.requires_grad else None for o in outputs]
        return [*tangents, *products, *seeds]

    module, lines = traced(derivative, program.tensors(), True, keep, restoring(call))
    found = _derivative(module, program.column_shapes, program.row_shapes, "global", lines)
    products, seeds = _split(found.gradients, len(program.row_shapes))
    end = _end(module)
    end.args = ((*found.cotangents, *products),)
    for seed in seeds:
        assert seed is not None, "every seed is a placeholder"
        if seed.users:
            raise CaptureRefused("the backward pass is not known to be linear in its cotangent")
        module.graph.erase_node(seed)
    module.recompile()
    return replace(found, gradients=products)


R = TypeVar("R")


def _split(values: tuple[R, ...], at: int) -> tuple[tuple[R, ...], tuple[R, ...]]:
    return values[:at], values[at:]


class FunctionOfTensors:
    """A function as one of tensors: of the differentiated ones, then of other floating ones.

    Attributes:
        row_shapes: Shapes of its outputs, once it has run.
        column_shapes: Shapes of the differentiated tensors.
    """

    def __init__(self, call: Call):
        """Takes the arguments apart."""
        self._call = call
        self._given, self._spec = call.leaves, call.spec
        check_leaves(self._given, call.name_input, "input", PASS_THROUGH)
        self._beside, self._rest = call.other_leaves, call.other_spec
        self._variable = _variable(self._beside)
        self.row_shapes: list[torch.Size] = []
        self.column_shapes = [t.shape for t in self._given]

    def tensors(self) -> list[Tensor]:
        """What it is called with: copies, so that what shares their memory was made of them."""
        beside = (self._beside[i] for i in self._variable)
        with modes.recording():
            return [_copied(modes.usable_in_graph(t).data) for t in (*self._given, *beside)]

    def __call__(
        self, observer: tracing.Observer, tensors: Sequence[Tensor]
    ) -> tuple[list[Tensor], Sequence[Tensor], list[Tensor]]:
        """The differentiated tensors, the outputs, and those outputs that have a graph."""
        call, count = self._call, len(self._given)
        inputs = [t.detach().requires_grad_() for t in tensors[:count]]
        others = list(self._beside)
        for position, value in zip(self._variable, tensors[count:], strict=True):
            needed = isinstance(others[position], Tensor) and others[position].requires_grad
            others[position] = value.detach().requires_grad_() if needed else value
        args, kwargs = unflatten(others, self._rest)
        here = Call(call.function, call.argnums, call.has_aux, _merged(call, args), kwargs)
        with modes.recording(), nested(), observer:
            try:
                output, _ = here.run(unflatten(inputs, self._spec))
            except TorchjacError as error:  # of a Jacobian inside the function
                raise CaptureRefused(str(error)) from error
        leaves = flatten(output)[0]
        outputs = check_leaves(leaves, lambda p: leaf_names("output", output)[p], "output", BESIDE)
        self.row_shapes[:] = [o.shape for o in outputs]
        return inputs, outputs, [o for o in outputs if o.requires_grad]


def _copied(tensor: Tensor) -> Tensor:
    """The same numbers with the same strides and offset; itself where that takes much memory."""
    start, steps = tensor.storage_offset(), tensor.stride()
    sizes = zip(tensor.shape, steps, strict=True)
    reach = start + 1 + sum((size - 1) * step for size, step in sizes)
    if not tensor.numel() or 0 in steps or reach > 4 * tensor.numel() + 1024:
        return tensor
    memory = torch.empty(reach, dtype=tensor.dtype, device=tensor.device)
    return memory.as_strided(tensor.shape, steps, start).copy_(tensor)


def trace_graph(program: EagerGraph, keep: Collection[Any]) -> LinearProgram:
    """Traces the backward pass of a graph that exists, by running it once.

    Tensors that the graph saved are constants, so the result holds for this evaluation only.

    Raises:
        CaptureRefused: The backward pass cannot be traced.
    """
    nest = program.nest
    nodes = _nodes(program.outputs)

    def derivative(observer: tracing.Observer, *seeds: Tensor) -> list[Any]:
        with (
            modes.passes(seeds),
            modes.recording(),
            tracing.with_sequence_numbers(nodes, observer),
            observer.during_backward(),
        ):
            gradients = backward(program.outputs, seeds, program.inputs) if seeds else []
        live = dict(zip(nest.live_outputs, seeds, strict=True))
        found = dict(zip(nest.live_inputs, gradients, strict=False))
        return [
            *(live.get(i) for i in range(len(nest.outputs))),
            *(found.get(i) for i in range(len(nest.inputs))),
        ]

    # Not zeros: what a backward pass takes out of the graph (through NumPy) must not look like one.
    seeds = [
        torch.linspace(0.3, 1.7, o.numel(), dtype=o.dtype, device=o.device).reshape(o.shape)
        for o in program.outputs
    ]
    module, _ = traced(derivative, [s.detach() for s in seeds], False, keep)
    shapes = [o.shape for o in nest.outputs], [x.shape for x in nest.inputs]
    return _derivative(module, *shapes, "local", _lines(nodes))


# What torch raises where it cannot trace; other errors are the function's own.
_UNTRACEABLE = (
    RuntimeError,
    TypeError,
    ValueError,
    NotImplementedError,
    AssertionError,
    AttributeError,
)


def traced(
    derivative: Any,
    tensors: Sequence[Tensor],
    parameters_vary: bool,
    keep: Collection[Any],
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[fx.GraphModule, dict[int, str]]:
    """A function of tensors as a graph, and the lines that its operations come from.

    Raises:
        CaptureRefused: It cannot be traced.
    """
    try:
        with modes.recording(), modes.preserved_random_state(tensors):
            return tracing.trace(
                derivative, tensors, parameters_vary=parameters_vary, keep=keep, around=around
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


def _derivative(
    module: fx.GraphModule,
    rows: Sequence[torch.Size],
    columns: Sequence[torch.Size],
    scope: Scope,
    lines: dict[int, str],
) -> LinearProgram:
    leaves: list[Any] = list(_end(module).args[0])  # type: ignore[arg-type]
    return LinearProgram(
        module,
        tuple(leaves[: len(rows)]),
        tuple(leaves[len(rows) :]),
        tuple(rows),
        tuple(columns),
        scope,
        lines,
    )


def _end(module: fx.GraphModule) -> fx.Node:
    """Where the results of a graph leave it."""
    end: fx.Node = next(node for node in module.graph.nodes if node.op == "output")
    return end


def _merged(call: Call, others: tuple[Any, ...]) -> tuple[Any, ...]:
    """All arguments again: `Call.run` puts the differentiated ones in their places."""
    taken = set(call.positions())
    return tuple(call.args[i] if i in taken else a for i, a in enumerate(others))


def _nodes(outputs: Sequence[Tensor]) -> list[Any]:
    """Every autograd node behind some outputs."""
    nodes = list(dict.fromkeys(gradient_node(o) for o in outputs))
    seen = set(nodes)
    for node in nodes:  # grows while it is walked
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                nodes.append(child)
    return nodes


def _lines(nodes: Sequence[Any]) -> dict[int, str]:
    """The line that anomaly mode noted, or the name of the node, by sequence number."""
    return {sequence_number(node): _line_of(node.metadata) or node.name() for node in nodes}


def _line_of(metadata: dict[str, Any]) -> str | None:
    """The user's line out of the stack that `torch.autograd.detect_anomaly` leaves."""
    for entry in reversed(metadata.get("traceback_", [])):
        first = entry.strip().split("\n", 1)[0]
        if first.startswith("File ") and "/torch/" not in first:
            file, line = first.split('"')[1], first.split("line ")[1].split(",")[0]
            return f"{file}:{line}"
    return None


def trace_value(call: Call, keep: Collection[Any]) -> fx.GraphModule:
    """Traces a function: a graph from its tensors to its outputs.

    Args:
        call: The function and its arguments.
        keep: Operations that need not be decomposed.

    Raises:
        CaptureRefused: What the function does depends on values, or cannot be traced.
    """
    program = FunctionOfTensors(call)

    def value(observer: tracing.Observer, *tensors: Tensor) -> Sequence[Any]:
        return list(program(observer, tensors)[1])

    return traced(value, program.tensors(), True, keep, restoring(call))[0]
