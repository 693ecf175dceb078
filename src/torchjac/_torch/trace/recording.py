"""Recordings: a list of operations, made functional, and turned into a graph."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from torchjac._torch.operators import aten, known
from torchjac._torch.private import corner, private
from torchjac._torch.trace import op_traits as traits
from torchjac._torch.trace.ir import Instruction, NotRecorded, Value
from torchjac._torch.trace.recorder import Recorder


@dataclass(frozen=True, slots=True)
class Recording:
    """The operations from inputs to outputs.

    Attributes:
        inputs: Values of the inputs.
        constants: External tensors.
        calls: Operations in order, without those that no output needs.
        outputs: For each output its value, or None.
    """

    inputs: tuple[Value, ...]
    constants: tuple[Tensor, ...]
    calls: tuple[Instruction, ...]
    outputs: tuple[Value | None, ...]

    @property
    def is_random(self) -> bool:
        """Whether an operation draws random numbers."""
        return any(call.drawn_from is not None for call in self.calls)

    @property
    def writes(self) -> bool:
        """Whether an operation writes to a tensor in place."""
        return any(call.written for call in self.calls)


def finish_recording(recorder: Recorder, outputs: Sequence[Tensor | None]) -> Recording:
    """The recording of a recorder, reduced to the operations that outputs need.

    Raises:
        NotRecorded: An operation writes to memory that external tensors share.
    """
    values = [None if o is None else recorder.value(o) for o in outputs]
    calls = _live_calls(recorder.calls, [v for v in values if v is not None])
    _check_memory(recorder, calls)
    return Recording(tuple(recorder.inputs), tuple(recorder.constants), calls, tuple(values))


def _check_memory(recorder: Recorder, calls: Sequence[Instruction]) -> None:
    """Refuses writes to memory that external tensors share other than by a recorded view."""
    written = {id(v): v for c in recorder.calls for v in c.written if v.kind != "made"}
    if not written:
        return
    used = {id(v.base): v.base for c in calls for v in values_in((*c.args, *c.kwargs.values()))}
    for base in used.values():
        if base.kind == "made":
            continue
        if any(w is not base and w.memory == base.memory for w in written.values()):
            raise NotRecorded("it writes to tensors while tensors that it reads share memory")


def _live_calls(calls: Sequence[Instruction], outputs: Sequence[Value]) -> tuple[Instruction, ...]:
    """Calls that outputs need, with writes to memory that the calls read."""
    values = set(map(id, outputs))
    memory = {id(v.base) for v in outputs}
    live = []
    for call in reversed(calls):
        is_used = any(id(v) in values for v in call.results if v is not None)
        if is_used or any(id(base) in memory for base in call.written):
            live.append(call)
            for value in values_in((*call.args, *call.kwargs.values())):
                values.add(id(value))
                memory.add(id(value.base))
    return tuple(reversed(live))


def without_last(recording: Recording) -> Recording:
    """The recording without its last output, and without the calls that only this output needs."""
    outputs = recording.outputs[:-1]
    calls = _live_calls(recording.calls, [v for v in outputs if v is not None])
    return replace(recording, calls=calls, outputs=outputs)


def functionalize(
    recording: Recording, inputs: Sequence[Tensor], keep: Collection[Any]
) -> Recording:
    """The recording without in-place operations.

    Args:
        recording: The recording.
        inputs: Tensors of the shapes and dtypes of the inputs.
        keep: Backward operations not to decompose.

    Raises:
        NotRecorded: An in-place operation cannot be rewritten.
    """
    recorder = Recorder(keep, parameters_vary=False)
    writable, constants = _copy_written(recording, inputs)
    for tensor in writable:
        recorder.input(tensor)
    for tensor, original in zip(constants, recording.constants, strict=True):
        recorder.constant(tensor, original, varies=False)

    def replay(*tensors: Tensor) -> list[Tensor | None]:
        return _run(recording, tensors[: len(writable)], tensors[len(writable) :], recorder)

    try:
        with warnings.catch_warnings(), torch.enable_grad(), recorder:
            warnings.simplefilter("ignore")
            outputs = torch.func.functionalize(replay, remove="mutations")(*writable, *constants)
    finally:
        recorder.restore()
    # functionalize ends with copies back into inputs and constants, which no output reads.
    recorder.calls = [c for c in recorder.calls if c.operation is not aten.copy_.default]
    result = finish_recording(recorder, outputs)
    if result.writes:
        raise NotRecorded("it writes to tensors in a way that cannot be rewritten")
    return result


def _copy_written(
    recording: Recording, inputs: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs and the constants, with a copy of each tensor that an operation writes to."""
    written = {id(base) for call in recording.calls for base in call.written}
    used = used_constants(recording)
    bases = [*recording.inputs, *(used.get(i) for i in range(len(recording.constants)))]
    copies = [
        t.detach().clone() if b is not None and id(b) in written else t.detach()
        for t, b in zip([*inputs, *recording.constants], bases, strict=True)
    ]
    return copies[: len(inputs)], copies[len(inputs) :]


def used_constants(recording: Recording) -> dict[int, Value]:
    """The constants that calls read, by position."""
    arguments = [a for call in recording.calls for a in (*call.args, *call.kwargs.values())]
    return {v.position: v for v in values_in(arguments) if v.kind == "constant"}


def rerun(recording: Recording, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Runs the operations again, with gradients enabled: some operations then save more."""
    with torch.enable_grad():
        return _run(recording, *_copy_written(recording, inputs), None)


def agree(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> bool:
    """Whether the results of two evaluations are equal up to rounding."""
    sizes = [_magnitude(t) for t in first]
    least = 0.1 * max(sizes, default=0.0)  # floor for gradients that are zero up to rounding
    for one, other, size in zip(first, second, sizes, strict=True):
        if one is None or other is None:
            if one is not other:
                return False
            continue
        if one.shape != other.shape:
            return False
        tolerance = _FINE.get(one.dtype.itemsize, _COARSE)
        allowed = tolerance * max(size, least)
        if not torch.allclose(one.detach(), other.detach(), tolerance, allowed, equal_nan=True):
            return False
    return True


def _magnitude(tensor: Tensor | None) -> float:
    if tensor is None or not tensor.numel():
        return 0.0
    numbers = tensor.detach()
    return float(torch.where(numbers.isfinite(), numbers, 0).abs().amax())


# Relative tolerance by bytes of the dtype, as two evaluations may round differently.
_FINE = {8: 1e-6, 4: 1e-3}
_COARSE = 0.1


def _run(
    recording: Recording,
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    recorder: Recorder | None,
) -> list[Tensor | None]:
    tensors: dict[int, Any] = {id(v): t for v, t in zip(recording.inputs, inputs, strict=True)}

    def tensor(value: Value) -> Any:
        return constants[value.position] if value.kind == "constant" else tensors[id(value)]

    last = _last_uses(recording)
    for position, call in enumerate(recording.calls):
        if recorder is not None:
            recorder.number = call.number
        if call.drawn_from is not None:
            generator, state = call.drawn_from
            generator.set_state(state)
        args = map_values(list(call.args), tensor)
        result = call.operation(*args, **{k: map_values(a, tensor) for k, a in call.kwargs.items()})
        parts = (result,) if call.is_single else result or ()
        for value, part in zip(call.results, parts, strict=True):
            if value is not None:
                tensors[id(value)] = part
        for done in last.get(position, ()):
            tensors.pop(done, None)
    return [None if v is None else tensor(v) for v in recording.outputs]


def _last_uses(recording: Recording) -> dict[int, list[int]]:
    """For each call, the ids of values whose last use is the call."""
    last: dict[int, int] = {}
    for position, call in enumerate(recording.calls):
        for value in (*values_in((*call.args, *call.kwargs.values())), *call.results):
            if value is not None:
                last[id(value)] = position
    for output in recording.outputs:
        last.pop(id(output), None)
    expiring: dict[int, list[int]] = {}
    for number, position in last.items():
        expiring.setdefault(position, []).append(number)
    return expiring


def graph_of(recording: Recording) -> fx.GraphModule:
    """The recording as a graph; each node has a `val` in its meta, as in torch's own tracer."""
    graph = fx.Graph()
    nodes: dict[int, fx.Node] = {}
    attributes: dict[str, Tensor] = {}
    for i, value in enumerate(recording.inputs):
        nodes[id(value)] = _with_value(graph.placeholder(f"arg{i}"), value)
    constants: dict[int, fx.Node] = {}

    def node_of(value: Value) -> fx.Node:
        if value.kind != "constant":
            return nodes[id(value)]
        if value.position not in constants:
            name = f"constant{value.position}"
            attributes[name] = recording.constants[value.position]
            constants[value.position] = _with_value(graph.create_node("get_attr", name), value)
        return constants[value.position]

    for call in recording.calls:
        if call.operation in traits.SAME:
            nodes[id(call.results[0])] = node_of(call.args[0])
            continue
        args = tuple(map_values(list(call.args), node_of))
        kwargs = {k: map_values(a, node_of) for k, a in call.kwargs.items()}
        node = graph.call_function(call.operation, args, kwargs)
        if call.number is not None:
            node.meta["seq_nr"] = call.number
        if call.is_single:
            (result,) = call.results
            assert result is not None
            nodes[id(result)] = _with_value(node, result)
            continue
        node.meta["val"] = tuple(None if v is None else _like(v) for v in call.results)
        for item, part in enumerate(call.results):
            if part is not None:
                item_node = graph.call_function(operator.getitem, (node, item))
                item_node.meta.update(node.meta)
                nodes[id(part)] = _with_value(item_node, part)
    graph.output([None if v is None else node_of(v) for v in recording.outputs])
    graph.eliminate_dead_code(_is_pure)
    return _module(attributes, graph)


def _module(attributes: dict[str, Tensor], graph: fx.Graph) -> fx.GraphModule:
    if not (LAZY_GRAPHS.known or LAZY_GRAPHS.holds()):
        return fx.GraphModule(attributes, graph)
    return _lazy_module(attributes, graph)


def _lazy_module(attributes: dict[str, Tensor], graph: fx.Graph) -> fx.GraphModule:
    with _lazy._use_lazy_graph_module(True):  # its code seldom runs
        module: fx.GraphModule = _lazy._make_graph_module(attributes, graph)
    return module


_lazy = private("torch.fx._lazy_graph_module")


@corner("torch's lazy graph module", "the code of every graph is written at once")
def LAZY_GRAPHS() -> bool:
    """The module holds attributes and a graph, and runs."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.mul, (x, graph.create_node("get_attr", "two"))))
    module = _lazy_module({"two": torch.tensor(2.0, dtype=torch.float64)}, graph)
    return bool(module(torch.tensor(3.0, dtype=torch.float64)) == 6.0)


def decomposition_of(call: Instruction) -> Recording | None:
    """The decomposition of a call as a recording, or None if none exists.

    Inputs of the recording are the tensor arguments of the call, in order.
    """
    decompose = _DECOMPOSITIONS.get(call.operation) or traits.decompositions().get(call.operation)
    if decompose is None or call.written or call.drawn_from is not None:
        return None
    recorder = Recorder((), parameters_vary=False)
    tensors: list[Tensor] = []

    def dummy(value: Value) -> Tensor:
        tensor = torch.zeros(value.shape, dtype=value.dtype)
        tensors.append(tensor)
        return tensor

    args = [map_values(a, dummy) for a in call.args]
    kwargs = {k: map_values(a, dummy) for k, a in call.kwargs.items()}
    for tensor in tensors:
        recorder.input(tensor)
    try:
        with torch.no_grad(), recorder:
            result = decompose(*args, **kwargs)
    except Exception:  # the decomposition reads values, or does not cover these arguments
        return None
    if result is NotImplemented:
        return None
    return finish_recording(recorder, [result] if isinstance(result, Tensor) else list(result))


def _addmm(added: Tensor, left: Tensor, right: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    product = aten.mm.default(left, right)
    product = product if alpha == 1 else product * alpha
    return product if beta == 0 else torch.add(product, added if beta == 1 else added * beta)


# Frequent operations, as the first decomposition of torch costs 0.3 s of imports.
_DECOMPOSITIONS: dict[Any, Callable[..., Tensor]] = known({aten.addmm.default: _addmm})


def _is_pure(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output")


def _with_value(node: fx.Node, value: Value) -> fx.Node:
    """The node, with a meta tensor of the value and its device in the node's meta."""
    node.meta["val"], node.meta["device"] = _like(value), value.device
    return node


def _like(value: Value) -> Tensor:
    """A meta tensor with the shape, strides and dtype of a value."""
    return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device="meta")


def values_in(arguments: Any) -> list[Value]:
    """All values in arguments."""
    values: list[Value] = []
    for argument in arguments:
        if isinstance(argument, Value):
            values.append(argument)
        elif isinstance(argument, list):
            values += values_in(argument)
    return values


def map_values(argument: Any, to: Callable[[Value], Any]) -> Any:
    """An argument with a function applied to each value."""
    if isinstance(argument, Value):
        return to(argument)
    return [map_values(a, to) for a in argument] if isinstance(argument, list) else argument
