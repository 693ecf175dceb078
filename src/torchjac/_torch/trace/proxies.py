"""torch's own tracer: slower than the recorder, but with support of control flow operators."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from torchjac._torch.modes import FakeTensor
from torchjac._torch.operators import aten
from torchjac._torch.private import corner, private
from torchjac._torch.trace.fakes import FakeObserver
from torchjac._torch.trace.ir import NotRecorded
from torchjac._torch.trace.op_traits import OpOverload
from torchjac._torch.trace.op_traits import decompositions as torch_decompositions

_FakeTensorMode = private("torch._subclasses.fake_tensor.FakeTensorMode")
_MakefxTracer = private("torch.fx.experimental.proxy_tensor._MakefxTracer")
_preserve_node_seq_nr = private("torch.fx.traceback._preserve_node_seq_nr")
_preserve_node_meta = private("torch.fx.traceback.preserve_node_meta")
_pytree = private("torch.utils._pytree")


def uncompiled() -> AbstractContextManager[Any]:
    """A context in which functions of torch.compile run eagerly."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def trace_with_proxies(
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    fake: bool,
    keep: Collection[Any],
) -> tuple[fx.GraphModule, FakeObserver]:
    """Runs a function of tensors under torch's own tracer.

    Args:
        function: The function, as for `trace.trace`.
        tensors: Arguments; each becomes a placeholder.
        fake: Whether to run on fake tensors, which have shapes but no values. Control flow that
            depends on values then raises, and is not frozen.
        keep: Operations not to decompose.

    Returns:
        The functional graph, and the observer.

    Raises:
        NotRecorded: The graph does not represent the function, or torchjac cannot read it.
    """
    if not TRACER.holds():
        raise NotRecorded(f"{TRACER}")
    observer = FakeObserver()
    with warnings.catch_warnings(), _preserve_node_meta(), ExitStack() as stack:
        warnings.simplefilter("ignore")  # torch warns about its own code
        if fake:
            # Without symbolic shapes, a dependence on values raises at once.
            mode = _FakeTensorMode(allow_non_fake_inputs=True)
            tensors = [mode.from_tensor(t) for t in tensors]
            stack.enter_context(mode)
        module = _tracer(keep).trace(lambda *arguments: function(observer, *arguments), *tensors)
    if observer.refusals:
        raise observer.refusals[0]
    reason = unreadable_reason(module)
    if reason is not None:
        raise NotRecorded(reason)
    return _functionalize(module), observer


def _tracer(keep: Collection[Any]) -> Any:
    """The tracer of `make_fx`, without its import of Inductor for a single setting.

    The mode "real" uses the tensors as they are: fake tensors stay fake.
    """
    table = decompositions(frozenset(keep))
    return _MakefxTracer(
        decomposition_table=table,
        tracing_mode="real",
        _allow_non_fake_inputs=True,
        pre_dispatch=False,
        record_module_stack=False,
        _allow_fake_constant=False,
        _error_on_data_dependent_ops=True,
    )


def unreadable_reason(module: fx.GraphModule) -> str | None:
    """The reason why a graph does not represent its function, or is unsupported; else None."""
    for node in module.graph.nodes:
        operation = node.target
        decides = torch.Tag.data_dependent_output
        if isinstance(operation, OpOverload) and decides in operation.tags:
            name = operation._schema.name.removeprefix("aten::")
            return f"Python values depend on tensors, by way of {name}"
        value = node.meta.get("val")
        if node.op == "get_attr":
            value = getattr(module, str(node.target))
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if not isinstance(tensor, Tensor):
                continue
            if tensor.layout is not torch.strided:
                return f"{operation} makes a sparse tensor"
            if any(isinstance(n, torch.SymInt) for n in tensor.shape):
                return f"shapes depend on values, by way of {operation}"
    return None


def _functionalize(module: fx.GraphModule) -> fx.GraphModule:
    """The graph without in-place operations.

    Constants are inputs during the rewrite, so that writes to constants are rewritten too.
    """
    if not any(_mutates(node) for node in module.graph.nodes):
        return module
    inputs = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    constants = {n: c for n in _constants(module) if isinstance(c := getattr(module, n), Tensor)}
    memory = [c.untyped_storage()._cdata for c in constants.values()]
    if any(
        memory.count(constants[n].untyped_storage()._cdata) > 1 for n in _written_constants(module)
    ):
        raise RuntimeError("it writes to tensors while tensors that it reads share memory")

    def run(*values: Tensor) -> Any:
        lifted = dict(zip(constants, values[len(inputs) :], strict=True))
        return _Lifted(module, lifted).run(*values[: len(inputs)])

    with warnings.catch_warnings(), _preserve_node_meta(), _preserve_node_seq_nr():
        warnings.simplefilter("ignore")
        mode = next((v.fake_mode for v in inputs if isinstance(v, FakeTensor)), None)
        if mode is None:
            mode = _FakeTensorMode(allow_non_fake_inputs=True)
        mode.allow_non_fake_inputs = True
        with mode:
            arguments = [*inputs, *(mode.from_tensor(c.detach()) for c in constants.values())]
            rewritten = torch.func.functionalize(run, remove="mutations")
            functional: fx.GraphModule = _tracer(()).trace(rewritten, *arguments)
    return _with_constants(functional, constants)


class _Lifted(fx.Interpreter):
    """An interpreter of a graph with its constants replaced."""

    def __init__(self, module: fx.GraphModule, lifted: dict[str, Tensor]):
        super().__init__(module)
        self._lifted = lifted

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The replacement of a constant, or the constant itself."""
        value = self._lifted.get(target)
        return super().get_attr(target, args, kwargs) if value is None else value


def _with_constants(module: fx.GraphModule, constants: Mapping[str, Tensor]) -> fx.GraphModule:
    """Replaces the last inputs of a graph by constants, and drops write-backs to inputs."""
    graph = module.graph
    for node in reversed(graph.nodes):
        if node.target is aten.copy_.default and not node.users:
            graph.erase_node(node)
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    first = len(placeholders) - len(constants)
    for (name, constant), placeholder in zip(constants.items(), placeholders[first:], strict=True):
        setattr(module, f"lifted{name}", constant)
        with graph.inserting_before(placeholder):
            node = graph.create_node("get_attr", f"lifted{name}")
        node.meta = dict(placeholder.meta)
        placeholder.replace_all_uses_with(node)
        graph.erase_node(placeholder)
    module.recompile()
    return module


def _constants(module: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in module.graph.nodes if n.op == "get_attr"]


def _written_constants(module: fx.GraphModule) -> list[str]:
    """Names of the constants that in-place operations write to, also through views."""
    names: dict[str, None] = {}
    for node in module.graph.nodes:
        if not _mutates(node):
            continue
        written = [
            argument
            for argument, about in zip(node.args, node.target._schema.arguments, strict=False)
            if about.alias_info is not None and about.alias_info.is_write
        ]
        written += [
            node.kwargs[about.name]
            for about in node.target._schema.arguments
            if about.name in node.kwargs and about.alias_info is not None
        ]
        for root in _pytree.tree_leaves(written):
            while isinstance(root, fx.Node) and _is_view(root):
                root = root.args[0]
            if isinstance(root, fx.Node) and root.op == "get_attr":
                names[str(root.target)] = None
    return list(names)


def _is_view(node: fx.Node) -> bool:
    """Whether a node's result shares the memory of its first argument."""
    if not isinstance(node.target, OpOverload) or not node.args:
        return node.op == "call_function"  # an element of a tuple of views, perhaps
    return any(r.alias_info is not None for r in node.target._schema.returns)


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


@lru_cache(maxsize=4)
def decompositions(keep: frozenset[Any]) -> Mapping[Any, Callable[..., Any]]:
    """Decompositions of backward operations, except those to keep.

    All other operations stay whole: each decomposition costs milliseconds of tracing.
    """
    return {
        op: decompose
        for op, decompose in torch_decompositions().items()
        if isinstance(op, OpOverload)
        and op not in keep
        and "backward" in op._schema.name
        and op._overloadname == "default"
    }


@corner("torch's own tracer", "functions with control flow operators are not planned")
def TRACER() -> bool:
    """The tracer records operations on fake tensors, each with a value that has a shape."""
    mode = _FakeTensorMode(allow_non_fake_inputs=True)
    with mode, _preserve_node_meta():
        argument = mode.from_tensor(torch.ones(3))
        module = _tracer(()).trace(lambda x: x.sin() * 2, argument)
    called = [node for node in module.graph.nodes if node.op == "call_function"]
    return (
        isinstance(argument, FakeTensor)
        and [str(node.target) for node in called] == ["aten.sin.default", "aten.mul.Tensor"]
        and all(tuple(node.meta["val"].shape) == (3,) for node in called)
        and all(isinstance(node.target, OpOverload) for node in called)
    )
