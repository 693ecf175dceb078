"""Optimization of tensor programs: fewer operations, the same result."""

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
from torchjac.compiler.program.peephole import fuse
from torchjac.compiler.program.work import work_of_call
from torchjac.ops import Fact, operators_with


def fold_constants(recording: Recording) -> Recording:
    """The recording without operations that give the same at every run: constants hold these."""
    constants = list(recording.constants)
    folded: dict[int, Value] = {}
    tensors: dict[int, Any] = {}
    calls = []

    def tensor(value: Value) -> Any:
        return constants[value.position] if value.kind == "constant" else tensors[id(value)]

    def operand(value: Value) -> Value:
        if id(value) not in tensors:
            return value
        if id(value) not in folded:
            layout = value.shape, value.stride, value.dtype, value.device
            folded[id(value)] = Value("constant", len(constants), None, *layout)
            constants.append(tensors[id(value)])
        return folded[id(value)]

    for call in recording.calls:
        is_known = all(v.kind == "constant" or id(v) in tensors for v in _operands(call))
        if is_known and _is_fixed(call):
            args = map_values(list(call.args), tensor)
            result = call.operation(
                *args, **{k: map_values(a, tensor) for k, a in call.kwargs.items()}
            )
            parts = (result,) if call.is_single else result
            for value, part in zip(call.results, parts, strict=True):
                if value is not None:
                    tensors[id(value)] = part
            continue
        args = tuple(map_values(list(call.args), operand))
        kwargs = {k: map_values(a, operand) for k, a in call.kwargs.items()}
        calls.append(replace(call, args=args, kwargs=kwargs))
    outputs = tuple(None if v is None else operand(v) for v in recording.outputs)
    shorter = Recording(recording.inputs, (), tuple(calls), outputs)
    used = _constants_of(shorter)
    empty = torch.empty(0)
    needed = tuple(c if i in used else empty for i, c in enumerate(constants))
    return replace(shorter, constants=needed)


def _constants_of(recording: Recording) -> list[int]:
    """Positions of the constants that calls and outputs need."""
    returned = {v.position for v in recording.outputs if v is not None and v.kind == "constant"}
    return sorted({*used_constants(recording), *returned})


def _is_fixed(call: Instruction) -> bool:
    """Whether a call of constants gives the same at every run."""
    values = [*_operands(call), *(v for v in call.results if v is not None)]
    bases = [v.base for v in values]
    return (
        not any(b.varies or b.written or b.kind == "input" for b in bases)
        and not call.written
        and call.drawn_from is None
    )


def _operands(call: Instruction) -> list[Value]:
    """Values that a call takes."""
    return values_in((*call.args, *call.kwargs.values()))


def undifferentiable_results(recording: Recording) -> list[str]:
    """Operations of which a second result is used, and torch may have no derivative of it.

    Statistics of a norm, factors of a solve: autograd takes these for constants, without an error.
    """
    used = {id(v) for call in recording.calls for v in _operands(call)}
    used |= {id(v) for v in recording.outputs if v is not None}
    return [
        str(call.operation)
        for call in recording.calls
        if not call.is_single and call.operation not in _ALL_DIFFERENTIABLE
        for v in call.results[1:]
        if v is not None and id(v) in used and v.dtype.is_floating_point
    ]


def optimized_graph(recording: Recording) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """The operations as a graph to run, and its constants.

    Common subexpressions are computed once, chains of views become one view, and neighboring
    operations are fused. Placeholders are the inputs, which must be contiguous, then the constants.
    """
    graph, constants = _graph(recording, _Views(), _BINDINGS)
    fuse(graph)
    return fx.GraphModule({}, graph), constants


def plain_graph(recording: Recording) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """The operations as a graph for Inductor or autograd, and its constants.

    Common subexpressions are computed once; views and operations stay as they were recorded.
    Placeholders are those of `optimized_graph`.
    """
    graph, constants = _graph(recording, None, {})
    return fx.GraphModule({}, graph), constants


def _graph(
    recording: Recording, views: _Views | None, bindings: dict[Any, Any]
) -> tuple[fx.Graph, tuple[Tensor, ...]]:
    """The operations as a graph, each common subexpression once.

    Args:
        recording: The operations.
        views: The chains of views that become one view; None to leave them.
        bindings: Functions that run in the place of operations.
    """
    used = _constants_of(recording)
    graph = fx.Graph()
    nodes: dict[int, fx.Node] = {}
    for i, value in enumerate(recording.inputs):
        nodes[id(value)] = graph.placeholder(f"arg{i}")
        nodes[id(value)].meta["value"] = value
    constants = {position: graph.placeholder(f"constant{position}") for position in used}

    def node_of(value: Value) -> fx.Node:
        if value.kind != "constant":
            return nodes[id(value)]
        constants[value.position].meta["value"] = value
        return constants[value.position]

    known_nodes: dict[str, fx.Node] = {}
    for call in recording.calls:
        if _is_identity(call):
            nodes[id(call.results[0])] = node_of(call.args[0])
            if views is not None:
                views.alias(call)
            continue
        operation, args, kwargs = call.operation, call.args, call.kwargs
        if views is not None:
            operation, args, kwargs = views.shortened(call)
        args = tuple(map_values(list(args), node_of))
        kwargs = {k: map_values(a, node_of) for k, a in kwargs.items()}
        key = f"{operation} {args} {kwargs}"
        values = [*_operands(call), *(v for v in call.results if v is not None)]
        written = any(v.base.written for v in values)
        if written or key not in known_nodes:
            node = graph.call_function(bindings.get(operation, operation), args, kwargs)
            node.meta["writes"] = bool(call.written)
            node.meta["work"] = work_of_call(call)
            if not written:
                known_nodes[key] = node
        else:
            node = known_nodes[key]
        _add_results(graph, node, call, nodes)
    outputs = [None if v is None else node_of(v) for v in recording.outputs]
    _unshare(graph, recording, outputs, nodes)
    graph.output(tuple(outputs))
    graph.eliminate_dead_code(lambda n: n.op != "call_function" or n.meta.get("writes", False))
    return graph, tuple(recording.constants[position] for position in used)


def _unshare(
    graph: fx.Graph,
    recording: Recording,
    outputs: list[fx.Node | None],
    nodes: dict[int, fx.Node],
) -> None:
    """Copies outputs that share memory: a caller may write to a result.

    Args:
        graph: The graph, without its outputs.
        recording: Its operations.
        outputs: Nodes of the outputs; a copy takes the place of a node.
        nodes: Nodes of values, by identity.
    """
    owned: set[Any] = set()
    for i, result in enumerate(recording.outputs):
        if result is None:
            continue
        memory = nodes.get(id(result.base), outputs[i])
        if result.base.kind != "made" or memory in owned:
            outputs[i] = graph.call_function(aten.clone.default, (outputs[i],))
        owned.add(memory)


def _add_results(
    graph: fx.Graph, node: fx.Node, call: Instruction, nodes: dict[int, fx.Node]
) -> None:
    """Adds the nodes of the results of a call."""
    if call.is_single:
        (result,) = call.results
        assert result is not None
        nodes[id(result)] = node
        node.meta.setdefault("value", result)
        return
    for item, part in enumerate(call.results):
        if part is not None:
            nodes[id(part)] = graph.call_function(operator.getitem, (node, item))


def _is_identity(call: Instruction) -> bool:
    """Whether the result is the first argument."""
    if call.operation in SAME:
        return True
    if call.operation not in _VIEWS or call.written:
        return False
    (result,), argument = call.results, call.args[0]
    assert result is not None
    return bool(argument.shape == result.shape and argument.stride == result.stride)


class _Views:
    """Views by their roots: the tensor that a chain of views begins with, and the offset in it."""

    def __init__(self) -> None:
        self._roots: dict[int, tuple[Value, int]] = {}

    def alias(self, call: Instruction) -> None:
        """Gives the result of an identity the root of its argument."""
        argument, (result,) = call.args[0], call.results
        if id(argument) in self._roots:
            self._roots[id(result)] = self._roots[id(argument)]

    def shortened(self, call: Instruction) -> tuple[Any, Any, Any]:
        """Operation, args and kwargs of a call, of which a view of a view is a view of the root."""
        unchanged = call.operation, call.args, call.kwargs
        if call.operation not in _VIEWS or call.kwargs:
            return unchanged
        argument, (result,) = call.args[0], call.results
        assert result is not None
        if result.base is not argument.base or result.dtype != argument.dtype:
            return unchanged
        root, start = self._roots.get(id(argument), (argument, 0))
        start += _offset(call)
        owns_memory = root.kind == "made" and root.base is root  # begins where its memory does
        if not owns_memory and start:
            return unchanged
        self._roots[id(result)] = root, start
        if root is argument:
            return unchanged
        # A root without memory of its own may begin anywhere: the view keeps its beginning.
        offset = (start,) if owns_memory else ()
        layout = list(result.shape), list(result.stride)
        return aten.as_strided.default, (root, *layout, *offset), {}


def _offset(call: Instruction) -> int:
    """Elements between the beginning of an argument and the beginning of a view of it."""
    argument, rest = call.args[0], call.args[1:]
    if call.operation is aten.select.int:
        axis, index = rest
        return int(argument.stride[axis] * (index % argument.shape[axis]))
    if call.operation is aten.slice.Tensor:
        axis = rest[0] if rest else 0
        start = rest[1] if len(rest) > 1 and rest[1] is not None else 0
        size = argument.shape[axis]
        return int(argument.stride[axis] * min(max(start + size if start < 0 else start, 0), size))
    return 0


_VIEWS = operators_with(Fact.VIEW)
_ALL_DIFFERENTIABLE = operators_with(Fact.ALL_DIFFERENTIABLE)
# Python bindings that take the same arguments in two thirds of the time (mul: 1.7 us for 2.5 us).
_BINDINGS: dict[Any, Any] = known(
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
