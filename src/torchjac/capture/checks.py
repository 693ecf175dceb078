"""Checks of outputs and inputs before any differentiation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchjac._torch.vmap import inside_transform
from torchjac.capture.eager_graph import EagerGraph
from torchjac.errors import ArgumentError, DtypeError

Name = Callable[[int], str]


def check_leaves(leaves: Sequence[Any], name: Name, role: str, remedy: str) -> tuple[Tensor, ...]:
    """Returns the leaves if all are real floating-point tensors, and at least one exists.

    Args:
        leaves: The leaves of the outputs or inputs.
        name: Returns the name of a leaf by its position.
        role: `output` or `input`.
        remedy: Advice for a leaf that is not to be differentiated, for the message.

    Raises:
        ArgumentError: No leaf exists, or a leaf is not a dense tensor.
        DtypeError: A leaf is integer, bool or complex.
    """
    if not leaves:
        raise ArgumentError(f"torchjac: expected at least one tensor among the {role}s, got none.")
    for position, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            raise ArgumentError(_not_a_tensor(name(position), leaf, role, remedy))
        if role == "input" and leaf.layout is not torch.strided:
            raise ArgumentError(
                f"torchjac: every input must be dense; {name(position)} has layout {leaf.layout}. "
                f"Differentiate with respect to its values, or convert it with .to_dense()."
            )
        if not leaf.is_floating_point():
            raise DtypeError(_wrong_dtype(name(position), leaf, role, remedy))
    return tuple(leaves)


def check_batch(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], name_output: Name, name_input: Name
) -> int:
    """Returns the number of samples: the common size of all leading axes.

    Raises:
        ArgumentError: A leaf has no leading axis, or leading axes differ.
    """
    size: int | None = None
    for leaves, name in ((inputs, name_input), (outputs, name_output)):
        for position, leaf in enumerate(leaves):
            if leaf.ndim == 0 or (size is not None and leaf.shape[0] != size):
                first = (name_input if inputs else name_output)(0)
                expected = f"{size} as in {first}" if size is not None else "a leading axis"
                raise ArgumentError(
                    f"torchjac: with batched=True the leading axis of every input and output is "
                    f"the batch; {name(position)} has shape {tuple(leaf.shape)}, expected "
                    f"{expected}. Pass what is not batched as an argument outside argnums, or use "
                    f"batched=False."
                )
            size = leaf.shape[0]
    assert size is not None, "check_leaves has seen at least one leaf"
    return size


def _not_a_tensor(name: str, leaf: Any, role: str, remedy: str) -> str:
    if callable(leaf):
        remedy = "for the Jacobian of a function use torchjac.jacobian(f)"
    return (
        f"torchjac: every {role} must be a tensor or a pytree of tensors; {name} is of type "
        f"{type(leaf).__name__}. If it is not to be differentiated, {remedy}."
    )


def _wrong_dtype(name: str, leaf: Tensor, role: str, remedy: str) -> str:
    if leaf.is_complex():
        problem = "complex: torchjac computes real Jacobians and does not guess a convention"
        remedy = "Use torch.view_as_real / torch.view_as_complex around the complex part"
    else:
        problem = f"of dtype {leaf.dtype}, which has no derivative"
        remedy = f"Convert it to a floating-point dtype, or {remedy}"
    return (
        f"torchjac: Expected all {role}s to be real floating-point tensors; "
        f"{name} is {problem}. {remedy}."
    )


def unused_in_graph(graph: EagerGraph, positions: tuple[int, ...]) -> str:
    """The message for inputs of a graph that no output depends on."""
    names = [graph.nest.name_input(p) for p in positions]
    ungraphed = [p for p in positions if not graph.nest.inputs[p].requires_grad]
    if inside_transform():
        cause = (
            "inside torch.vmap or a torch.func transform, tensors do not carry the graph of the "
            "tensors they stand for; use torchjac.jacobian(f) there"
        )
    elif not graph.outputs:
        cause = (
            "the outputs have no graph at all (they were computed under no_grad, from detached "
            "tensors, or before requires_grad was set)"
        )
    elif ungraphed:
        cause = (
            f"{graph.nest.name_input(ungraphed[0])} does not require a gradient; call "
            f".requires_grad_() on it before the outputs are computed"
        )
    else:
        cause = (
            "its name may have been rebound to a new tensor (x = x * 2), or the outputs use a "
            "detached copy"
        )
    return (
        f"torchjac.jac: no output depends on {', '.join(names)}. Usual cause: {cause}. Pass "
        f"allow_unused=True to get zeros."
    )


def unused_in_function(graph: EagerGraph, positions: tuple[int, ...]) -> str:
    """The message for inputs of a function that no output depends on."""
    names = ", ".join(graph.nest.name_input(p) for p in positions)
    return (
        f"torchjac: no output depends on {names}: its Jacobian is zero. Usual causes: the function "
        f"uses the tensor through a closure (jacobian(lambda x: y, x) with a y computed before) "
        f"instead of its argument, or detaches it. For outputs that are already computed use "
        f"torchjac.jac(outputs, inputs)."
    )
