"""The autograd engine and the nodes of its graph."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.function import BackwardCFunction

Node = torch.autograd.graph.Node

# `torch.autograd.grad` spends most of a small call in Python (argument checks, shape checks, the
# override protocol). Its last line is this call; every check it makes has been made by the time an
# engine of torchjac gets here. Measured on the 2->4 example: 18 us a row instead of 23 us, and
# 26 us instead of 50 us for the batched pass.
_run_backward = Variable._execution_engine.run_backward


def backward(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    inputs: Sequence[Tensor],
    retain_graph: bool = True,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """Pulls one cotangent per output back to the inputs: `torch.autograd.grad` without checks.

    Returns one gradient per input, `None` where no output depends on it.
    """
    result: tuple[Tensor | None, ...] = _run_backward(
        tuple(outputs), tuple(cotangents), retain_graph, create_graph, tuple(inputs), True, False
    )
    return result


def node_outputs(node: Any) -> Sequence[Any]:
    """Shape and dtype of the tensors that a node's forward operation produced."""
    metadata: Sequence[Any] = node._input_metadata
    return metadata


def sequence_number(node: Any) -> int:
    """Position in which the engine runs a node: higher numbers run first."""
    number: int = node._sequence_nr()
    return number


def gradient_node(tensor: Tensor) -> Any:
    """The node where a tensor's gradient arrives (a leaf's accumulator, else its `grad_fn`)."""
    if tensor.grad_fn is not None:
        return tensor.grad_fn
    with torch.inference_mode(False), torch.enable_grad():  # it takes a view of the leaf
        return torch.autograd.graph.get_gradient_edge(tensor).node


@lru_cache(maxsize=4096)
def is_custom(kind: type) -> bool:
    """Whether nodes of this type run a user's own backward: a Python or a C++ autograd function."""
    return issubclass(kind, BackwardCFunction) or kind.__name__ in _CPP_CUSTOM


# What the bindings call a node of an extension; those of torch have a name of their own.
_CPP_CUSTOM = frozenset({"CppFunction", "CppNode"})


# torch (2.13) takes the statistics that these keep for constants where what their double backward
# gives is differentiated again: what they give is right, its derivative is not.
_NORMS = ("NativeLayerNorm", "NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm")


def is_right_twice(kind: type, graph: bool) -> bool:
    """Whether torch's backward of the backward of an operation is right.

    Args:
        kind: Of the node of the operation.
        graph: Whether that is to be differentiated again.
    """
    wrong = "BackwardBackward" if not graph else "Backward"
    return not kind.__name__.startswith(tuple(f"{norm}{wrong}" for norm in _NORMS))


def is_compiled(kind: type) -> bool:
    """Whether nodes of this type are the backward of a function that torch.compile compiled."""
    return kind.__name__ == "CompiledFunctionBackward"
