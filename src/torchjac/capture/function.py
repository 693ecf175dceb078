"""Capture of a function and its arguments, for `torchjac.jacobian`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchjac._torch import modes
from torchjac._torch.pytree import TreeSpec, flatten, leaf_names, tree_map, unflatten
from torchjac.capture.checks import check_batch, check_leaves
from torchjac.capture.graph import build_nest, pick
from torchjac.capture.nesting import nested
from torchjac.capture.program import Program
from torchjac.errors import ArgumentError

Argnums = int | tuple[int, ...]

PASS_THROUGH = "pass it as an argument outside argnums, or as a keyword argument"
BESIDE = "return it beside the result with has_aux=True"


def check_argnums(argnums: Any) -> None:
    """Refuses argnums that are wrong whatever the arguments are.

    Raises:
        ArgumentError: It is not an int or a nonempty tuple of different ints.
    """
    given = argnums if isinstance(argnums, tuple) else (argnums,)
    if not given:
        raise ArgumentError("torchjac: argnums must be non-empty, got ().")
    for number in given:
        if not isinstance(number, int) or isinstance(number, bool):
            raise ArgumentError(
                f"torchjac: argnums must be int or Tuple[int, ...], got {type(number).__name__} "
                f"in {argnums!r}."
            )
    if len(set(given)) != len(given):
        raise ArgumentError(f"torchjac: argnums elements must be unique, got {given}.")


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a user's function: what to differentiate, and what is passed through.

    Attributes:
        function: The user's function.
        argnums: Positions of the arguments to differentiate, as the user gave them.
        has_aux: Whether the function returns `(output, aux)`.
        args: Positional arguments.
        kwargs: Keyword arguments, never differentiated.
    """

    function: Callable[..., Any]
    argnums: Argnums
    has_aux: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def positions(self) -> tuple[int, ...]:
        """Nonnegative positions of the differentiated arguments.

        Raises:
            ArgumentError: A position is out of range, or named twice.
        """
        given = self.argnums if isinstance(self.argnums, tuple) else (self.argnums,)
        count = len(self.args)
        for number in given:
            if not -count <= number < count:
                raise ArgumentError(
                    f"torchjac: Got argnum={number}, but only {count} positional inputs. Keyword "
                    f"arguments are passed through and not differentiated."
                )
        found = tuple([number % count for number in given])
        if len(found) > 1 and len(set(found)) != len(found):
            raise ArgumentError(f"torchjac: argnums elements must be unique, got {given}.")
        return found

    def differentiated(self) -> Any:
        """The differentiated arguments as one tree: a single argument bare, several as a tuple."""
        positions = self.positions()
        if isinstance(self.argnums, tuple):
            return tuple(self.args[p] for p in positions)
        return self.args[positions[0]]

    def run(self, inputs: Any) -> tuple[Any, Any]:
        """Evaluates the function with other differentiated arguments: `(output, returned)`."""
        positions = self.positions()
        values = inputs if isinstance(self.argnums, tuple) else (inputs,)
        args = list(self.args)
        for position, value in zip(positions, values, strict=True):
            args[position] = value
        returned = self.function(*args, **self.kwargs)
        if not self.has_aux:
            return returned, returned
        if not (isinstance(returned, tuple) and len(returned) == 2):
            got = f"a {type(returned).__name__}"
            if isinstance(returned, tuple):
                got += f" of length {len(returned)}"
            raise ArgumentError(
                f"torchjac: output of function f should be a tuple: (output, aux) if has_aux is "
                f"True, got {got}."
            )
        return returned[0], returned

    def traced(self) -> bool:
        """Whether the arguments are not real values (FakeTensor, meta, make_fx)."""
        return modes.tracing(a for a in self.args if isinstance(a, Tensor))

    def name_input(self, position: int) -> str:
        """Name of a differentiated leaf by its position among all of them."""
        names: list[str] = []
        for number in self.positions():
            parameter = self._parameter(number)
            names += [n + parameter for n in leaf_names(f"args[{number}]", self.args[number])]
        return names[position]

    def _parameter(self, number: int) -> str:
        """Name of a positional parameter, for messages; empty where it has none."""
        function = self.function
        try:
            signature = inspect.signature(
                function.forward if isinstance(function, torch.nn.Module) else function
            )
        except (TypeError, ValueError):
            return ""
        named = [
            p.name
            for p in signature.parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        return f" (parameter {named[number]!r})" if number < len(named) else ""


def capture_function(
    call: Call, *, batched: bool, create_graph: bool, replayable: bool
) -> tuple[Program, Any]:
    """Evaluates a function once and keeps its graph.

    The graph is the one PyTorch records while the function runs as usual, so control flow,
    in-place writes, hooks, checkpointing and custom functions mean what they mean in a training
    step, and random operations run once.

    Args:
        call: The function and its arguments.
        batched: Whether leading axes are a batch of independent samples.
        create_graph: Whether the Jacobian must be differentiable.
        replayable: Whether an engine may run the function once more, on other inputs.

    Returns:
        The program, and what the function returned (with aux, if it has one).

    Raises:
        ArgumentError: An argument or a result is not a tensor, or leading axes do not fit.
        DtypeError: A tensor is not real floating-point.
    """
    given, input_spec = flatten(call.differentiated())
    check_leaves(given, call.name_input, "input", PASS_THROUGH)
    if _has_inference_tensors(call):
        call = _without_inference_tensors(call)
        given = flatten(call.differentiated())[0]
    with modes.recording(), nested():
        inputs = tuple(_differentiable(leaf, create_graph) for leaf in given)
        output, returned = call.run(unflatten(inputs, input_spec))
    leaves, output_spec = flatten(output)

    def name_output(position: int) -> str:
        return leaf_names("output", output)[position]

    outputs = check_leaves(leaves, name_output, "output", BESIDE)
    batch = check_batch(outputs, inputs, name_output, call.name_input) if batched else None
    nest = build_nest(outputs, inputs, output_spec, input_spec, name_output, call.name_input)
    program = Program(
        outputs=pick(outputs, nest.live_outputs),
        inputs=inputs,
        nest=nest,
        batch=batch,
        retain_graph=True,
        create_graph=create_graph,
        replay=_replay(call, input_spec, output_spec, nest.live_outputs) if replayable else None,
    )
    return program, returned


def detached(tree: Any) -> Any:
    """The tree with every tensor cut off its graph, so that results do not keep it alive."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def _differentiable(leaf: Tensor, create_graph: bool) -> Tensor:
    if create_graph and leaf.requires_grad:
        return leaf.view_as(leaf)  # stays on the caller's graph, yet is ours alone
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
