"""Recordings as JSON, and back: nothing that is read from a file can run code of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from torchjac._torch.operators import aten
from torchjac._torch.trace.ir import Instruction, Value
from torchjac._torch.trace.op_traits import OpOverload, traits_of
from torchjac._torch.trace.recording import Recording, values_in


class NotStorable(ValueError):
    """A recording cannot be written down, or what was written down cannot be read."""


# What else operations take as text: the way to round, or to reduce.
_WORDS = frozenset(
    {*("floor", "trunc", "none", "tanh", "ij", "xy", "sum", "mean", "amax", "amin", "prod", "L")}
)
# Kinds of arguments, by the name that they are stored under.
_KINDS: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "format": torch.memory_format,
}


def stored(recording: Recording) -> dict[str, Any]:
    """A recording as what JSON can say; its constants are not in it.

    Raises:
        NotStorable: It runs operations that are not torch's own, or draws random numbers.
    """
    table: dict[int, int] = {}
    values: list[Value] = []

    def number(value: Value) -> int:
        if id(value) not in table:
            table[id(value)] = len(values)
            values.append(value)
        return table[id(value)]

    calls = []
    for call in recording.calls:
        if call.drawn_from is not None:
            raise NotStorable("it draws random numbers")
        calls.append(
            {
                "operation": _named(call.operation),
                "args": [_said(a, number) for a in call.args],
                "kwargs": {k: _said(a, number) for k, a in call.kwargs.items()},
                "results": [None if v is None else number(v) for v in call.results],
                "single": call.is_single,
                "written": [number(v) for v in call.written],
            }
        )
    inputs = [number(v) for v in recording.inputs]
    outputs = [None if v is None else number(v) for v in recording.outputs]
    bases, done = [], 0
    while done < len(values):  # bases are values too
        bases.append(number(values[done].base))
        done += 1
    return {
        "inputs": inputs,
        "outputs": outputs,
        "calls": calls,
        "values": [_value_said(v, base) for v, base in zip(values, bases, strict=True)],
    }


def restored(about: dict[str, Any], constants: Sequence[Tensor]) -> Recording:
    """The recording that `stored` wrote down.

    Args:
        about: What it gave.
        constants: Its constants.

    Raises:
        NotStorable: It does not make sense.
    """
    try:
        values = [_value_read(v) for v in about["values"]]
        for value, entry in zip(values, about["values"], strict=True):
            value.base = values[entry["base"]]
        calls = tuple(
            Instruction(
                _operation(c["operation"]),
                tuple(_read(a, values) for a in c["args"]),
                {k: _read(a, values) for k, a in c["kwargs"].items()},
                tuple(None if i is None else values[i] for i in c["results"]),
                bool(c["single"]),
                tuple(values[i] for i in c["written"]),
                None,
                None,
            )
            for c in about["calls"]
        )
        made = Recording(
            tuple(values[i] for i in about["inputs"]),
            tuple(constants),
            calls,
            tuple(None if i is None else values[i] for i in about["outputs"]),
        )
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as wrong:
        raise NotStorable(f"it does not hold operations ({wrong})") from wrong
    for call in calls:
        _check(call)
    for value in values_in([*(a for c in calls for a in (*c.args, *c.kwargs.values()))]):
        if value.kind == "constant" and not _fits(value, constants):
            raise NotStorable("its constants are of another shape")
    return made


# Operations that trust their arguments with memory.
_UNCHECKED = frozenset({"_reshape_alias", "_unsafe_index", "_unsafe_index_put", "_make_dual"})


def _check(call: Instruction) -> None:
    """Refuses operations that could write to what is not their own, or beyond its memory."""
    traits = traits_of(call.operation)
    name = call.operation._schema.name.split("::")[1]
    if traits.is_refused or traits.is_random or traits.decides or name in _UNCHECKED:
        raise NotStorable(f"it runs {call.operation}")
    written = []
    for position, key in traits.written:
        given = call.args[position] if position < len(call.args) else call.kwargs.get(key)
        written += values_in([given])
    if traits.silent or any(v.base.kind != "made" for v in written):
        raise NotStorable(f"{call.operation} writes to what is not its own")
    if {id(v.base) for v in written} != {id(v.base) for v in call.written}:
        raise NotStorable(f"{call.operation} writes to something else")


def _fits(value: Value, constants: Sequence[Tensor]) -> bool:
    if not 0 <= value.position < len(constants):
        return False
    given = constants[value.position]
    return given.shape == value.shape and given.dtype == value.dtype


def signature(graph: fx.Graph, constant: Callable[[str], Tensor]) -> str:
    """A number that two graphs share if they do the same.

    Args:
        graph: A graph of operations.
        constant: Gives a constant by its name. What training changes counts by its shape only.
    """
    found = hashlib.sha256(torch.__version__.encode())
    for node in graph.nodes:
        value = node.meta.get("val")
        shown = [
            (tuple(v.shape), v.stride(), v.dtype) if isinstance(v, Tensor) else None
            for v in (value if isinstance(value, tuple) else (value,))
        ]
        found.update(f"{node.name} {node.op} {node.target} {node.args} {node.kwargs}".encode())
        found.update(str(shown).encode())
        if node.op == "get_attr" and not constant(str(node.target)).requires_grad:
            found.update(bytes_of(constant(str(node.target))).tobytes())
    return found.hexdigest()


def bytes_of(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor, element by element."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    flat.copy_(tensor.detach().reshape(-1))
    found: np.ndarray = flat.view(torch.uint8).numpy()
    return found


def _named(operation: OpOverload) -> str:
    namespace, name = operation._schema.name.split("::")
    if namespace != "aten":
        raise NotStorable(f"it runs {operation}, which is not torch's own")
    return f"{name}.{operation._overloadname}"


def _operation(name: str) -> OpOverload:
    packet, overload = name.split(".")
    found: Any = getattr(getattr(aten, packet), overload)
    if not isinstance(found, OpOverload):
        raise NotStorable(f"there is no operation {name}")
    return found


def _said(argument: Any, number: Callable[[Value], int]) -> Any:
    if isinstance(argument, Value):
        return {"value": number(argument)}
    if isinstance(argument, list | tuple):
        return [_said(a, number) for a in argument]
    if argument is None or isinstance(argument, bool | int | float):
        return argument
    if isinstance(argument, str) and argument in _WORDS:
        return argument
    if isinstance(argument, complex):
        return {"complex": [argument.real, argument.imag]}
    if isinstance(argument, torch.device):
        return {"device": str(argument)}
    for kind, type_ in _KINDS.items():
        if isinstance(argument, type_):
            return {kind: str(argument).removeprefix("torch.")}
    raise NotStorable(f"an operation takes {argument!r}")


def _read(argument: Any, values: Sequence[Value]) -> Any:
    if isinstance(argument, list):
        return [_read(a, values) for a in argument]
    if isinstance(argument, str) and argument not in _WORDS:
        raise NotStorable(f"an operation takes {argument!r}")
    if not isinstance(argument, dict):
        return argument
    ((kind, given),) = argument.items()
    if kind == "value":
        return values[given]
    if kind == "complex":
        return complex(*given)
    if kind == "device":
        return torch.device(given)
    return _constant(kind, given)


def _constant(kind: str, name: str) -> Any:
    """A dtype, layout or memory format of torch by its name."""
    found = getattr(torch, name, None)
    if not isinstance(found, _KINDS[kind]):
        raise NotStorable(f"there is no {kind} {name!r}")
    return found


def _value_said(value: Value, base: int) -> dict[str, Any]:
    return {
        "kind": value.kind,
        "position": value.position,
        "item": value.item,
        "shape": list(value.shape),
        "stride": list(value.stride),
        "dtype": str(value.dtype).removeprefix("torch."),
        "device": str(value.device),
        "varies": value.varies,
        "written": value.written,
        "base": base,
    }


def _value_read(about: dict[str, Any]) -> Value:
    return Value(
        about["kind"],
        about["position"],
        about["item"],
        torch.Size(about["shape"]),
        tuple(about["stride"]),
        _constant("dtype", about["dtype"]),
        torch.device(about["device"]),
        0,
        bool(about["varies"]),
        bool(about["written"]),
    )
