"""The autograd engine and the nodes of its graph."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from torchjac._torch.private import corner, private, private_type

_CustomNode = private_type("torch.autograd.function.BackwardCFunction")

# `torch.autograd.grad` spends most of a small call in Python (argument checks, shape checks, the
# override protocol). Its last line is this call, and torchjac has made every check before. Measured
# on the 2->4 example: 18 us a row instead of 23 us, and 26 us instead of 50 us for the batched
# pass.
_run_backward = private("torch.autograd.Variable._execution_engine.run_backward")


def backward(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    inputs: Sequence[Tensor],
    retain_graph: bool = True,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """Pulls one cotangent per output back to the inputs: `torch.autograd.grad` without checks.

    Returns one gradient per input, `None` where no output depends on the input.
    """
    if not (ENGINE.known or ENGINE.holds()):
        return torch.autograd.grad(
            outputs, inputs, cotangents, retain_graph, create_graph, allow_unused=True
        )
    result: tuple[Tensor | None, ...] = _run_backward(
        tuple(outputs), tuple(cotangents), retain_graph, create_graph, tuple(inputs), True, False
    )
    return result


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on any device."""
    # torch has a class of this error for devices only: on a CPU, only the message tells.
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "not enough memory" in text or "out of memory" in text
    )


def node_outputs(node: Any) -> Sequence[Any]:
    """Shape and dtype of the tensors that a node's forward operation produced."""
    metadata: Sequence[Any] = node._input_metadata
    return metadata


def sequence_number(node: Any) -> int:
    """Priority of a node in the engine: higher numbers run first."""
    number: int = node._sequence_nr()
    return number


def gradient_node(tensor: Tensor) -> Any:
    """The node that receives a tensor's gradient (a leaf's accumulator, else its `grad_fn`)."""
    if tensor.grad_fn is not None:
        return tensor.grad_fn
    with torch.inference_mode(False), torch.enable_grad():  # torch takes a view of the leaf
        return torch.autograd.graph.get_gradient_edge(tensor).node


@lru_cache(maxsize=4096)
def is_custom(kind: type) -> bool:
    """Whether nodes of this type run a user's own backward: a Python or a C++ autograd function."""
    return issubclass(kind, _CustomNode) or kind.__name__ in _CPP_CUSTOM


# Names of the nodes of C++ extensions in Python; each node of torch has a name of its own.
_CPP_CUSTOM = frozenset({"CppFunction", "CppNode"})


# Nodes whose saved statistics torch (2.13) treats as constants in the derivative of their double
# backward: the double backward is right, its derivative is wrong.
_NORMS = ("NativeLayerNorm", "NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm")


def is_right_twice(kind: type, graph: bool) -> bool:
    """Whether torch's double backward of an operation is right.

    Args:
        kind: Type of the operation's node.
        graph: Whether the double backward is differentiated again.
    """
    wrong = "BackwardBackward" if not graph else "Backward"
    return not kind.__name__.startswith(tuple(f"{norm}{wrong}" for norm in _NORMS))


def is_compiled(kind: type) -> bool:
    """Whether nodes of this type are the backward of a function that torch.compile compiled."""
    return kind.__name__ == "CompiledFunctionBackward"


def _point() -> tuple[Tensor, Tensor]:
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    return x, torch.cat([2 * x, x * x])


@corner("the entry of torch's autograd engine", "torch.autograd.grad runs each pass")
def ENGINE() -> bool:
    """One pass returns the gradient, None for an unused input, and writes to no `.grad`."""
    x, y = _point()
    seed = torch.ones(4, dtype=torch.float64)
    unused = torch.ones(3, requires_grad=True)
    gradient, none = _run_backward((y,), (seed,), True, False, (x, unused), True, False)
    right = gradient.tolist() == [4.0, 6.0] and none is None
    return right and x.grad is None and not gradient.requires_grad


@corner("a node of torch's autograd graph", "rows are evaluated one by one")
def NODES() -> bool:
    """Nodes have shapes and an order, and custom nodes differ from those of torch."""

    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g

    x, y = _point()
    node = gradient_node(y)
    (about,) = node_outputs(node)
    child = node.next_functions[1][0]
    other: Any = type(node)
    kind: Any = type(Custom.apply(x).grad_fn)  # type: ignore[no-untyped-call]
    norm = torch.nn.functional.layer_norm(x, [2])
    return (
        (tuple(about.shape), about.dtype.itemsize) == ((4,), 8)
        and sequence_number(node) > sequence_number(child)
        and gradient_node(x) is child.next_functions[0][0]
        and is_custom(kind)
        and not is_custom(other)
        and type(norm.grad_fn).__name__.startswith("NativeLayerNormBackward")
        and callable(node.name)
        and isinstance(node.metadata, dict)
    )
