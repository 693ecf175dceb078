"""Tensor programs as JSON and arrays, and back: this module is their format on disk.

Nothing that is read from a file can run code of its own: operations are looked up among those of
torch by their names, and an operation that could write to memory of another tensor is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from torchjac._torch.operators import aten
from torchjac._torch.trace.ir import Instruction, Value
from torchjac._torch.trace.op_traits import OpOverload, traits_of
from torchjac._torch.trace.recording import Recording, values_in
from torchjac.compiler.program.optimize import optimized_graph
from torchjac.compiler.program.tensor_program import TensorProgram


class NotSerializable(ValueError):
    """A program has no form on disk, or the text of a file is no program."""


# Strings that operations take: modes of rounding and of reduction.
_WORDS = frozenset(
    {*("floor", "trunc", "none", "tanh", "ij", "xy", "sum", "mean", "amax", "amin", "prod", "L")}
)
# Types of arguments, by their names on disk.
_KINDS: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "format": torch.memory_format,
}
# Operations that trust their arguments with memory.
_UNCHECKED = frozenset({"_reshape_alias", "_unsafe_index", "_unsafe_index_put", "_make_dual"})
# Errors of reading JSON that is no program.
_MALFORMED = (KeyError, TypeError, IndexError, AttributeError, ValueError)


def serialize(
    program: TensorProgram, known: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A program as JSON, and its constants as arrays.

    Args:
        program: The program.
        known: Tensors that the reader has, by name: of these the name is written, not the numbers.

    Raises:
        NotSerializable: It runs operations that are not of torch, draws random numbers, or reads
            a tensor that changes.
    """
    names = {id(tensor): name for name, tensor in known.items()}
    arrays: dict[str, np.ndarray] = {}
    constants: list[dict[str, Any]] = []
    for position, tensor in enumerate(program.recording.constants):
        if id(tensor) in names:
            constants.append({"name": names[id(tensor)]})
            continue
        if tensor.requires_grad or tensor.device.type != "cpu":
            raise NotSerializable("it reads a tensor that is not one of its constants")
        sizes = _distinct_sizes(tensor.shape, tensor.stride())
        arrays[_array_name(position)] = bytes_of(tensor[tuple(slice(size) for size in sizes)])
        constants.append(_encode_layout(tensor))
    about = {
        "mode": program.mode,
        "fixed": program.fixed,
        "waists": program.waists,
        "samples": program.samples,
        "constants": constants,
        "recording": encode(program.recording),
    }
    return about, arrays


def deserialize(
    about: Mapping[str, Any], arrays: Mapping[str, np.ndarray], known: Mapping[str, Tensor]
) -> TensorProgram:
    """The program that `serialize` wrote.

    Args:
        about: Its JSON.
        arrays: Its constants.
        known: Tensors of this process, by name.

    Raises:
        NotSerializable: It is no program.
        Exception: Its JSON is malformed (`_MALFORMED`), or an operation fails (RuntimeError).
    """
    constants = [
        known[c["name"]] if "name" in c else _decode_tensor(c, arrays[_array_name(position)])
        for position, c in enumerate(about["constants"])
    ]
    recording = decode(about["recording"], constants)
    module, used = optimized_graph(recording)
    fixed, entries = about["fixed"]
    return TensorProgram(
        recording,
        module,
        used,
        module.forward,
        "forward" if about["mode"] == "forward" else "reverse",
        (int(fixed), int(entries)),
        tuple(map(str, about["waists"])),
        samples=_decode_samples(about.get("samples")),
    )


def _array_name(position: int) -> str:
    return f"constant{position}"


def _decode_samples(pair: Any) -> tuple[int, int] | None:
    """Samples of the operations and of the kernel; None if there is no kernel of more samples."""
    if pair is None:
        return None
    few, many = map(int, pair)
    if not 0 < few < many:
        raise ValueError(f"{few} samples of {many}")
    return few, many


def encode(recording: Recording) -> dict[str, Any]:
    """A recording without its constants, as JSON.

    Raises:
        NotSerializable: It runs operations that are not of torch, or draws random numbers.
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
            raise NotSerializable("it draws random numbers")
        calls.append(
            {
                "operation": _encode_operation(call.operation),
                "args": [_encode_argument(a, number) for a in call.args],
                "kwargs": {k: _encode_argument(a, number) for k, a in call.kwargs.items()},
                "results": [None if v is None else number(v) for v in call.results],
                "single": call.is_single,
                "written": [number(v) for v in call.written],
            }
        )
    inputs = [number(v) for v in recording.inputs]
    outputs = [None if v is None else number(v) for v in recording.outputs]
    bases: list[int] = []
    while len(bases) < len(values):  # `number` adds the base of a value to the values
        bases.append(number(values[len(bases)].base))
    return {
        "inputs": inputs,
        "outputs": outputs,
        "calls": calls,
        "values": [_encode_value(v, base) for v, base in zip(values, bases, strict=True)],
    }


def decode(about: Mapping[str, Any], constants: Sequence[Tensor]) -> Recording:
    """The recording that `encode` wrote.

    Args:
        about: Its JSON.
        constants: Its constants.

    Raises:
        NotSerializable: It is no recording.
    """
    try:
        values = [_decode_value(v) for v in about["values"]]
        for value, entry in zip(values, about["values"], strict=True):
            value.base = values[entry["base"]]
        calls = tuple(
            Instruction(
                _decode_operation(c["operation"]),
                tuple(_decode_argument(a, values) for a in c["args"]),
                {k: _decode_argument(a, values) for k, a in c["kwargs"].items()},
                tuple(None if i is None else values[i] for i in c["results"]),
                bool(c["single"]),
                tuple(values[i] for i in c["written"]),
                None,
                None,
            )
            for c in about["calls"]
        )
        recording = Recording(
            tuple(values[i] for i in about["inputs"]),
            tuple(constants),
            calls,
            tuple(None if i is None else values[i] for i in about["outputs"]),
        )
    except _MALFORMED as wrong:
        raise NotSerializable(f"it does not hold operations ({wrong})") from wrong
    for call in calls:
        _check_call(call)
    for value in values_in([*(a for c in calls for a in (*c.args, *c.kwargs.values()))]):
        if value.kind == "constant" and not _fits(value, constants):
            raise NotSerializable("its constants are of another shape")
    return recording


def _check_call(call: Instruction) -> None:
    """Refuses an operation that could write to memory of another tensor, or beyond its memory."""
    traits = traits_of(call.operation)
    name = call.operation._schema.name.split("::")[1]
    if traits.is_refused or traits.is_random or traits.decides or name in _UNCHECKED:
        raise NotSerializable(f"it runs {call.operation}")
    written = []
    for position, key in traits.written:
        argument = call.args[position] if position < len(call.args) else call.kwargs.get(key)
        written += values_in([argument])
    if traits.silent or any(v.base.kind != "made" for v in written):
        raise NotSerializable(f"{call.operation} writes to what is not its own")
    if {id(v.base) for v in written} != {id(v.base) for v in call.written}:
        raise NotSerializable(f"{call.operation} writes to something else")


def _fits(value: Value, constants: Sequence[Tensor]) -> bool:
    """Whether a constant has the shape and the dtype of its value."""
    if not 0 <= value.position < len(constants):
        return False
    constant = constants[value.position]
    return constant.shape == value.shape and constant.dtype == value.dtype


def signature(graph: fx.Graph, constant: Callable[[str], Tensor]) -> str:
    """A hash that two graphs share if they compute the same.

    Args:
        graph: A graph of operations.
        constant: Gives a constant by its name. A constant that training changes counts by its
            shape only.
    """
    digest = hashlib.sha256(torch.__version__.encode())
    for node in graph.nodes:
        value = node.meta.get("val")
        shown = [
            (tuple(v.shape), v.stride(), v.dtype) if isinstance(v, Tensor) else None
            for v in (value if isinstance(value, tuple) else (value,))
        ]
        digest.update(f"{node.name} {node.op} {node.target} {node.args} {node.kwargs}".encode())
        digest.update(str(shown).encode())
        if node.op == "get_attr" and not constant(str(node.target)).requires_grad:
            digest.update(bytes_of(constant(str(node.target))).tobytes())
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor's elements, in order."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    flat.copy_(tensor.detach().reshape(-1))
    array: np.ndarray = flat.view(torch.uint8).numpy()
    return array


def _encode_operation(operation: OpOverload) -> str:
    namespace, name = operation._schema.name.split("::")
    if namespace != "aten":
        raise NotSerializable(f"it runs {operation}, which is not torch's own")
    return f"{name}.{operation._overloadname}"


def _decode_operation(name: str) -> OpOverload:
    packet, overload = name.split(".")
    operation: Any = getattr(getattr(aten, packet), overload)
    if not isinstance(operation, OpOverload):
        raise NotSerializable(f"there is no operation {name}")
    return operation


def _encode_argument(argument: Any, number: Callable[[Value], int]) -> Any:
    if isinstance(argument, Value):
        return {"value": number(argument)}
    if isinstance(argument, list | tuple):
        return [_encode_argument(a, number) for a in argument]
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
            return {kind: _encode_name(argument)}
    raise NotSerializable(f"an operation takes {argument!r}")


def _decode_argument(argument: Any, values: Sequence[Value]) -> Any:
    if isinstance(argument, list):
        return [_decode_argument(a, values) for a in argument]
    if isinstance(argument, str) and argument not in _WORDS:
        raise NotSerializable(f"an operation takes {argument!r}")
    if not isinstance(argument, dict):
        return argument
    ((kind, content),) = argument.items()
    if kind == "value":
        return values[content]
    if kind == "complex":
        return complex(*content)
    if kind == "device":
        return torch.device(content)
    return _decode_name(kind, content)


def _encode_name(constant: Any) -> str:
    """The name of a dtype, layout or memory format of torch."""
    return str(constant).removeprefix("torch.")


def _decode_name(kind: str, name: str) -> Any:
    """A dtype, layout or memory format of torch by its name."""
    constant = getattr(torch, name, None)
    if not isinstance(constant, _KINDS[kind]):
        raise NotSerializable(f"there is no {kind} {name!r}")
    return constant


def _encode_value(value: Value, base: int) -> dict[str, Any]:
    return {
        "kind": value.kind,
        "position": value.position,
        "item": value.item,
        "shape": list(value.shape),
        "stride": list(value.stride),
        "dtype": _encode_name(value.dtype),
        "device": str(value.device),
        "varies": value.varies,
        "written": value.written,
        "base": base,
    }


def _decode_value(about: Mapping[str, Any]) -> Value:
    return Value(
        about["kind"],
        about["position"],
        about["item"],
        torch.Size(about["shape"]),
        tuple(about["stride"]),
        _decode_name("dtype", about["dtype"]),
        torch.device(about["device"]),
        0,
        bool(about["varies"]),
        bool(about["written"]),
    )


def _encode_layout(tensor: Tensor) -> dict[str, Any]:
    return {
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "dtype": _encode_name(tensor.dtype),
    }


def _decode_tensor(about: Mapping[str, Any], data: np.ndarray) -> Tensor:
    """The tensor of some bytes, with the strides that it had."""
    shape, stride = about["shape"], about["stride"]
    dtype: torch.dtype = getattr(torch, about["dtype"])
    sizes = _distinct_sizes(shape, stride)
    if 0 in sizes:
        return torch.empty_strided(shape, stride, dtype=dtype)
    reach = 1 + sum((size - 1) * step for size, step in zip(sizes, stride, strict=True))
    memory = torch.zeros(reach, dtype=dtype)
    elements = torch.from_numpy(data.copy()).view(dtype).reshape(sizes)
    memory.as_strided(sizes, stride).copy_(elements)
    return memory.as_strided(shape, stride)


def _distinct_sizes(shape: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Sizes, with 1 in the place of axes along which all elements are one."""
    return [size if step else min(size, 1) for size, step in zip(shape, stride, strict=True)]
