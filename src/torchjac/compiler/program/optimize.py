"""Straight lines of operations to be run again and again: less to do, the same result."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from torchjac._torch.operators import aten, known
from torchjac._torch.trace.ir import Instruction, Value
from torchjac._torch.trace.op_traits import SAME
from torchjac._torch.trace.recording import Recording, map_values, used_constants, values_in
from torchjac.compiler.program.cost import work_of_call
from torchjac.compiler.program.peephole import fused
from torchjac.ops import Fact, having


def folded(recording: Recording) -> Recording:
    """The same with what does not vary computed once, here, as constants."""
    constants = list(recording.constants)
    made: dict[int, Value] = {}
    tensors: dict[int, Any] = {}
    calls = []

    def tensor(value: Value) -> Any:
        return constants[value.position] if value.kind == "constant" else tensors[id(value)]

    def again(value: Value) -> Value:
        if id(value) not in tensors:
            return value
        if id(value) not in made:
            about = value.shape, value.stride, value.dtype, value.device
            made[id(value)] = Value("constant", len(constants), None, *about)
            constants.append(tensors[id(value)])
        return made[id(value)]

    for call in recording.calls:
        there = all(v.kind == "constant" or id(v) in tensors for v in _arguments(call))
        if there and _is_fixed(call):
            given = map_values(list(call.args), tensor)
            named = {k: map_values(a, tensor) for k, a in call.kwargs.items()}
            found = call.operation(*given, **named)
            parts = (found,) if call.is_single else found
            for value, part in zip(call.results, parts, strict=True):
                if value is not None:
                    tensors[id(value)] = part
            continue
        args = tuple(map_values(list(call.args), again))
        kwargs = {k: map_values(a, again) for k, a in call.kwargs.items()}
        calls.append(replace(call, args=args, kwargs=kwargs))
    outputs = tuple(None if v is None else again(v) for v in recording.outputs)
    made_of = Recording(recording.inputs, (), tuple(calls), outputs)
    kept = _constants_of(made_of)
    empty = torch.empty(0)
    left = tuple(c if i in kept else empty for i, c in enumerate(constants))
    return replace(made_of, constants=left)


def _constants_of(recording: Recording) -> list[int]:
    """Positions of the constants that calls and outputs need."""
    returned = {v.position for v in recording.outputs if v is not None and v.kind == "constant"}
    return sorted({*used_constants(recording), *returned})


def _is_fixed(call: Instruction) -> bool:
    """Whether a call gives the same whenever it runs."""
    values = [*_arguments(call), *(v for v in call.results if v is not None)]
    bases = [v.base for v in values]
    return (
        not any(b.varies or b.written or b.kind == "input" for b in bases)
        and not call.written
        and call.drawn_from is None
    )


def _arguments(call: Instruction) -> list[Value]:
    return values_in((*call.args, *call.kwargs.values()))


def beside_results(recording: Recording) -> list[str]:
    """Operations of which a second result is used that torch may give no derivative of.

    Statistics of a norm, factors of a solve: autograd takes them for constants without saying so.
    """
    used = {id(v) for call in recording.calls for v in _arguments(call)}
    used |= {id(v) for v in recording.outputs if v is not None}
    return [
        str(call.operation)
        for call in recording.calls
        if not call.is_single and call.operation not in _ALL_DIFFERENTIABLE
        for v in call.results[1:]
        if v is not None and id(v) in used and v.dtype.is_floating_point
    ]


def executable(recording: Recording) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """The operations as a graph that takes the inputs and the constants that it needs, in order.

    Inputs must be contiguous. What is computed twice is computed once, chains of views are one.
    """
    graph, constants = _graph(recording, _Views(), _FAST)
    fused(graph)
    return fx.GraphModule({}, graph), constants


def compilable(recording: Recording) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """As `executable`, for a compiler, which would rather see the operations as they are."""
    graph, constants = _graph(recording, None, {})
    return fx.GraphModule({}, graph), constants


def _graph(
    recording: Recording, views: _Views | None, bindings: dict[Any, Any]
) -> tuple[fx.Graph, tuple[Tensor, ...]]:
    used = _constants_of(recording)
    graph = fx.Graph()
    nodes: dict[int, fx.Node] = {}
    for i, value in enumerate(recording.inputs):
        nodes[id(value)] = graph.placeholder(f"arg{i}")
        nodes[id(value)].meta["value"] = value
    places = {position: graph.placeholder(f"constant{position}") for position in used}

    def node_of(value: Value) -> fx.Node:
        if value.kind != "constant":
            return nodes[id(value)]
        places[value.position].meta["value"] = value
        return places[value.position]

    seen: dict[str, fx.Node] = {}
    for call in recording.calls:
        if _changes_nothing(call):
            nodes[id(call.results[0])] = node_of(call.args[0])
            if views is not None:
                views.same(call)
            continue
        operation, args, kwargs = call.operation, call.args, call.kwargs
        if views is not None:
            operation, args, kwargs = views.target(call)
        args = tuple(map_values(list(args), node_of))
        kwargs = {k: map_values(a, node_of) for k, a in kwargs.items()}
        key = f"{operation} {args} {kwargs}"
        values = [*_arguments(call), *(v for v in call.results if v is not None)]
        written = any(v.base.written for v in values)
        if written or key not in seen:
            node = graph.call_function(bindings.get(operation, operation), args, kwargs)
            node.meta["writes"] = bool(call.written)
            node.meta["work"] = work_of_call(call)
            if not written:
                seen[key] = node
        else:
            node = seen[key]
        _results(graph, node, call, nodes)
    outputs = [None if v is None else node_of(v) for v in recording.outputs]
    taken: set[Any] = set()
    for i, result in enumerate(recording.outputs):  # whoever gets a result may write to it
        if result is None:
            continue
        memory = nodes.get(id(result.base), outputs[i])
        if result.base.kind != "made" or memory in taken:
            outputs[i] = graph.call_function(aten.clone.default, (outputs[i],))
        taken.add(memory)
    graph.output(tuple(outputs))
    graph.eliminate_dead_code(lambda n: n.op != "call_function" or n.meta.get("writes", False))
    constants = tuple(recording.constants[position] for position in used)
    return graph, constants


def _results(graph: fx.Graph, node: fx.Node, call: Instruction, nodes: dict[int, fx.Node]) -> None:
    if call.is_single:
        (result,) = call.results
        assert result is not None
        nodes[id(result)] = node
        node.meta.setdefault("value", result)
        return
    for item, part in enumerate(call.results):
        if part is not None:
            nodes[id(part)] = graph.call_function(operator.getitem, (node, item))


def _changes_nothing(call: Instruction) -> bool:
    """Whether the result is the first argument."""
    if call.operation in SAME:
        return True
    if call.operation not in _VIEWS or call.written:
        return False
    (result,), given = call.results, call.args[0]
    assert result is not None
    return bool(given.shape == result.shape and given.stride == result.stride)


class _Views:
    """Which values are views of others, and where they begin."""

    def __init__(self) -> None:
        self._roots: dict[int, tuple[Value, int]] = {}

    def same(self, call: Instruction) -> None:
        """Notes that the result of a call is its argument."""
        given, (result,) = call.args[0], call.results
        if id(given) in self._roots:
            self._roots[id(result)] = self._roots[id(given)]

    def target(self, call: Instruction) -> tuple[Any, Any, Any]:
        """What to run in the place of a call: a view of a view is a view of the first."""
        unchanged = call.operation, call.args, call.kwargs
        if call.operation not in _VIEWS or call.kwargs:
            return unchanged
        given, (result,) = call.args[0], call.results
        assert result is not None
        if result.base is not given.base or result.dtype != given.dtype:
            return unchanged
        root, start = self._roots.get(id(given), (given, 0))
        start += _offset(call)
        made = root.kind == "made" and root.base is root  # begins where its memory does
        if not made and start:
            return unchanged
        self._roots[id(result)] = root, start
        if root is given:
            return unchanged
        place = (start,) if made else ()  # others may begin anywhere: there they stay
        about = list(result.shape), list(result.stride)
        return aten.as_strided.default, (root, *about, *place), {}


def _offset(call: Instruction) -> int:
    """How many elements after those of its argument a view begins."""
    given, rest = call.args[0], call.args[1:]
    if call.operation is aten.select.int:
        axis, index = rest
        return int(given.stride[axis] * (index % given.shape[axis]))
    if call.operation is aten.slice.Tensor:
        axis = rest[0] if rest else 0
        start = rest[1] if len(rest) > 1 and rest[1] is not None else 0
        size = given.shape[axis]
        return int(given.stride[axis] * min(max(start + size if start < 0 else start, 0), size))
    return 0


_VIEWS = having(Fact.VIEW)
_ALL_DIFFERENTIABLE = having(Fact.ALL_DIFFERENTIABLE)
# Python bindings that take the same arguments in two thirds of the time (mul: 1.7 us for 2.5 us).
_FAST: dict[Any, Any] = known(
    {
        aten.add.Tensor: torch.add,
        aten.as_strided.default: torch.as_strided,
        aten.bmm.default: torch.bmm,
        aten.cat.default: torch.cat,
        aten.cos.default: torch.cos,
        aten.div.Tensor: torch.div,
        aten.exp.default: torch.exp,
        aten.index_add.default: torch.index_add,
        aten.index_select.default: torch.index_select,
        aten.mm.default: torch.mm,
        aten.mul.Scalar: torch.mul,
        aten.mul.Tensor: torch.mul,
        aten.neg.default: torch.neg,
        aten.permute.default: torch.permute,
        aten.pow.Tensor_Scalar: torch.pow,
        aten.rsub.Scalar: torch.rsub,
        aten.scatter.src: torch.scatter,
        aten.select.int: torch.select,
        aten.sin.default: torch.sin,
        aten.stack.default: torch.stack,
        aten.sub.Tensor: torch.sub,
        aten.sum.dim_IntList: torch.sum,
        aten.tanh.default: torch.tanh,
        aten.unsqueeze.default: torch.unsqueeze,
        aten.view.default: torch.Tensor.view,
        aten.expand.default: torch.Tensor.expand,
        aten.where.self: torch.where,
    }
)
