"""Neighboring operations of a straight line as one."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from torchjac._torch.operators import aten, known
from torchjac._torch.trace.ir import Value
from torchjac.compiler.program.buffers import Reused
from torchjac.host.costs import COPIED_BYTES, MAPPED_BYTES
from torchjac.ops import Fact, having

# What can write where its result would be copied to; it takes what it writes to last.
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
_FRESH = having(Fact.FRESH)
_ZEROS = having(Fact.ZEROS)
# Not facts of operators: pairs of an operator and its Python binding, as this pass meets them.
_MULTIPLY = known({aten.mul.Tensor, torch.mul})


def fused(graph: fx.Graph) -> None:
    """Writes results where they would be copied to, and uses memory of large results again.

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
                node.target = Reused(zeros=node.target in _ZEROS)
                node.args, node.kwargs = (node.args[0],), {"dtype": value.dtype}


def _write_through(graph: fx.Graph, node: fx.Node) -> None:
    """`out.copy_(op(x))` as `op(x, out=out)`."""
    out, made = node.args[:2]
    if not _is_only_for(made, node, _WRITERS) or len(node.args) > 2:
        return
    assert isinstance(made, fx.Node)
    with graph.inserting_before(node):
        new = graph.call_function(_WRITERS[made.target], made.args, {**made.kwargs, "out": out})
    _replace(graph, node, made, new)


def _add_product(graph: fx.Graph, node: fx.Node) -> None:
    """`out.add_(x * y)` as `out.addcmul_(x, y)`."""
    out, made = node.args[:2]
    if not _is_only_for(made, node, _MULTIPLY) or node.kwargs:
        return
    assert isinstance(made, fx.Node)
    if not all(isinstance(a, fx.Node) for a in made.args):
        return
    with graph.inserting_before(node):
        new = graph.call_function(aten.addcmul_.default, (out, *made.args))
    _replace(graph, node, made, new)


def _replace(graph: fx.Graph, node: fx.Node, made: fx.Node, new: fx.Node) -> None:
    new.meta.update(node.meta)
    new.meta["work"] = made.meta["work"]
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    graph.erase_node(made)


def _is_only_for(made: Any, node: fx.Node, kinds: Any) -> bool:
    """Whether a node computes what another one takes, in its shape and dtype, for nobody else."""
    if not isinstance(made, fx.Node) or made.target not in kinds or len(made.users) != 1:
        return False
    out = node.args[0]
    mine, its = made.meta.get("value"), out.meta.get("value") if isinstance(out, fx.Node) else None
    if mine is None or its is None or (mine.shape, mine.dtype) != (its.shape, its.dtype):
        return False
    if _order(mine) != _order(its) and _size(made) < COPIED_BYTES:  # two orders at once take longer
        return False
    # What it reads must not change before it is written; and not be what is written to.
    for source in made.all_input_nodes:
        value = source.meta.get("value")
        if value is None or value.base.written or value.base is its.base:
            return False
        if value.dtype != mine.dtype:
            return False
    return True


def _order(value: Value) -> list[int]:
    """Axes from the one that steps farthest to the one that steps least."""
    axes = [axis for axis, size in enumerate(value.shape) if size > 1]
    return sorted(axes, key=lambda axis: -value.stride[axis])


def _size(node: fx.Node) -> int:
    value: Value = node.meta["value"]
    return value.shape.numel() * value.dtype.itemsize


def _is_returned(node: fx.Node) -> bool:
    """Whether a result shares its memory, so that somebody else decides how long it lives."""
    base = node.meta["value"].base
    end = next(n for n in reversed(node.graph.nodes) if n.op == "output")
    values = [n.meta.get("value") for n in end.all_input_nodes]
    return any(v is not None and v.base is base for v in values)
