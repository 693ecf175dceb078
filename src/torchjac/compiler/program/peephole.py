"""Peephole optimization: neighboring operations of a tensor program as one."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from torchjac._torch.operators import aten, known
from torchjac._torch.trace.ir import Value
from torchjac.compiler.program.buffers import ReusedBuffer
from torchjac.host.costs import COPIED_BYTES, MAPPED_BYTES
from torchjac.ops import Fact, operators_with

# Operations that can write to the destination of a copy; it is their argument `out`.
_WRITERS: dict[Any, Any] = known(
    {
        aten.mul.Tensor: torch.mul,
        torch.mul: torch.mul,
        aten.add.Tensor: torch.add,
        torch.add: torch.add,
        aten.sub.Tensor: torch.sub,
        torch.sub: torch.sub,
        aten.neg.default: torch.neg,
        torch.neg: torch.neg,
        aten.mm.default: torch.mm,
        torch.mm: torch.mm,
    }
)
_FRESH = operators_with(Fact.FRESH)
_ZEROS = operators_with(Fact.ZEROS)
# Not facts of operators: pairs of an operator and its Python binding, as this pass meets them.
_MULTIPLY = known({aten.mul.Tensor, torch.mul})


def fuse(graph: fx.Graph) -> None:
    """Writes results to the destination of their copy, and reuses buffers of large results.

    Nodes carry the `value` that they compute.
    """
    for node in list(graph.nodes):
        if node.target is aten.copy_.default:
            _write_through(graph, node)
        elif node.target is aten.add_.Tensor:
            _add_product(graph, node)
    for node in graph.nodes:
        if node.target in _FRESH and _size(node) >= MAPPED_BYTES:
            value: Value = node.meta["value"]
            if value.device.type == "cpu" and _is_returned(node):
                node.target = ReusedBuffer(zeros=node.target in _ZEROS)
                node.args, node.kwargs = (node.args[0],), {"dtype": value.dtype}


def _write_through(graph: fx.Graph, copy: fx.Node) -> None:
    """Rewrites `out.copy_(op(x))` as `op(x, out=out)`."""
    out, source = copy.args[:2]
    if not _is_only_for(source, copy, _WRITERS) or len(copy.args) > 2:
        return
    assert isinstance(source, fx.Node)
    with graph.inserting_before(copy):
        kwargs = {**source.kwargs, "out": out}
        new = graph.call_function(_WRITERS[source.target], source.args, kwargs)
    _replace(graph, copy, source, new)


def _add_product(graph: fx.Graph, addition: fx.Node) -> None:
    """Rewrites `out.add_(x * y)` as `out.addcmul_(x, y)`."""
    out, product = addition.args[:2]
    if not _is_only_for(product, addition, _MULTIPLY) or addition.kwargs:
        return
    assert isinstance(product, fx.Node)
    if not all(isinstance(a, fx.Node) for a in product.args):
        return
    with graph.inserting_before(addition):
        new = graph.call_function(aten.addcmul_.default, (out, *product.args))
    _replace(graph, addition, product, new)


def _replace(graph: fx.Graph, node: fx.Node, source: fx.Node, new: fx.Node) -> None:
    """Puts one node in the place of a node and of its source."""
    new.meta.update(node.meta)
    new.meta["work"] = source.meta["work"]
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    graph.erase_node(source)


def _is_only_for(source: Any, node: fx.Node, kinds: Any) -> bool:
    """Whether only one node takes a source, and in the shape and dtype that it writes to."""
    if not isinstance(source, fx.Node) or source.target not in kinds or len(source.users) != 1:
        return False
    out = node.args[0]
    value = source.meta.get("value")
    destination = out.meta.get("value") if isinstance(out, fx.Node) else None
    if value is None or destination is None:
        return False
    if (value.shape, value.dtype) != (destination.shape, destination.dtype):
        return False
    # Two orders of axes at once take longer.
    if _order(value) != _order(destination) and _size(source) < COPIED_BYTES:
        return False
    # Operands must not change before the write, and must not be the destination.
    for argument in source.all_input_nodes:
        operand = argument.meta.get("value")
        if operand is None or operand.base.written or operand.base is destination.base:
            return False
        if operand.dtype != value.dtype:
            return False
    return True


def _order(value: Value) -> list[int]:
    """Axes by their steps, the largest step first."""
    axes = [axis for axis, size in enumerate(value.shape) if size > 1]
    return sorted(axes, key=lambda axis: -value.stride[axis])


def _size(node: fx.Node) -> int:
    """Bytes of the value of a node."""
    value: Value = node.meta["value"]
    return value.shape.numel() * value.dtype.itemsize


def _is_returned(node: fx.Node) -> bool:
    """Whether a result of the graph shares its memory, so that the caller decides its lifetime."""
    base = node.meta["value"].base
    end = next(n for n in reversed(node.graph.nodes) if n.op == "output")
    values = [n.meta.get("value") for n in end.all_input_nodes]
    return any(v is not None and v.base is base for v in values)
