"""Tracing a computation into a graph of ATen operations, and what such a graph says."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import decomposition_table
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.fx.experimental.proxy_tensor import _MakefxTracer
from torch.fx.traceback import (
    _preserve_node_seq_nr,
    preserve_node_meta,
    reset_grad_fn_seq_nr,
    set_grad_fn_seq_nr,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from torchjac._torch.modes import real_values

OpOverload = torch._ops.OpOverload
HigherOrderOperator = torch._ops.HigherOrderOperator

# What tracing with fake tensors raises where the values of tensors decide what happens next.
DATA_DEPENDENT: tuple[type[Exception], ...] = (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
UNSUPPORTED: tuple[type[Exception], ...] = (UnsupportedOperatorException,)


def trace(
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    *,
    fake: bool,
    keep: Collection[Any],
) -> tuple[fx.GraphModule, dict[int, str]]:
    """Runs a function of tensors and writes down the operations, gradients included.

    The graph is functional: in-place operations are rewritten.

    Args:
        function: Takes an `Observer`, to be active while a user's code runs, and the tensors;
            returns tensors (or None) in a sequence.
        tensors: Arguments; each becomes a placeholder.
        fake: Whether to run on fake tensors, which have shapes but no values, so that control
            flow that depends on values raises (one of `DATA_DEPENDENT`) instead of being frozen.
        keep: Operations not to decompose.

    Returns:
        The graph, and where in the user's code the operations with these sequence numbers were
        called.
    """
    observer = Observer()
    with warnings.catch_warnings(), preserve_node_meta(), ExitStack() as stack:
        warnings.simplefilter("ignore")  # torch's notes on its own tracing
        if fake:
            # Without symbolic shapes: what depends on values raises at once.
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            tensors = [mode.from_tensor(t) for t in tensors]
            stack.enter_context(mode)
        module = _tracer(keep).trace(lambda *given: function(observer, *given), *tensors)
    return _functional(module), _lines(observer)


def _tracer(keep: Collection[Any]) -> _MakefxTracer:
    """What `make_fx` makes, but for an import of Inductor to read one of its settings.

    "real" means that it takes the tensors as they come: fake ones stay fake.
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


def _lines(observer: Observer) -> dict[int, str]:
    found: dict[int, str] = {}
    for start, stop, file, line in observer.calls:
        for number in range(start, stop):
            found.setdefault(number, f"{file}:{line}")
    return found


def unreadable(module: fx.GraphModule) -> str | None:
    """Why a graph does not stand for its function, or cannot be read; None if it does and can."""
    for node in module.graph.nodes:
        operation = node.target
        decides = torch.Tag.data_dependent_output
        if isinstance(operation, OpOverload) and decides in operation.tags:
            name = operation._schema.name.removeprefix("aten::")
            return f"Python values depend on tensors, by way of {name}"
        value = node.meta.get("val")
        if node.op == "get_attr":
            value = getattr(module, str(node.target))
        for made in value if isinstance(value, (list, tuple)) else (value,):
            if not isinstance(made, Tensor):
                continue
            if made.layout is not torch.strided:
                return f"{operation} makes a sparse tensor"
            if any(isinstance(n, torch.SymInt) for n in made.shape):
                return f"shapes depend on values, by way of {operation}"
    return None


def _functional(module: fx.GraphModule) -> fx.GraphModule:
    """The same computation without in-place operations; the module itself if it has none.

    Constants are inputs while it is rewritten, so that writes to them are rewritten too.
    """
    if not any(_mutates(node) for node in module.graph.nodes):
        return module
    inputs = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    constants = {n: c for n in _constants(module) if isinstance(c := getattr(module, n), Tensor)}
    if len({c.untyped_storage()._cdata for c in constants.values()}) < len(constants):
        raise RuntimeError("it writes to tensors while tensors that it reads share memory")

    def run(*values: Tensor) -> Any:
        lifted = dict(zip(constants, values[len(inputs) :], strict=True))
        return _Lifted(module, lifted).run(*values[: len(inputs)])

    with warnings.catch_warnings(), preserve_node_meta(), _preserve_node_seq_nr():
        warnings.simplefilter("ignore")
        mode = next((v.fake_mode for v in inputs if isinstance(v, FakeTensor)), None)
        if mode is None:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
        mode.allow_non_fake_inputs = True
        with mode:
            given = [*inputs, *(mode.from_tensor(c.detach()) for c in constants.values())]
            rewritten = torch.func.functionalize(run, remove="mutations")
            made: fx.GraphModule = _tracer(()).trace(rewritten, *given)
    return _with_constants(made, constants)


class _Lifted(fx.Interpreter):
    """Runs a graph with other values for its constants."""

    def __init__(self, module: fx.GraphModule, lifted: dict[str, Tensor]):
        super().__init__(module)
        self._lifted = lifted

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The other value, if there is one."""
        found = self._lifted.get(target)
        return super().get_attr(target, args, kwargs) if found is None else found


def _with_constants(module: fx.GraphModule, constants: Mapping[str, Tensor]) -> fx.GraphModule:
    """Puts constants in the places of the last inputs; nothing is written back to inputs."""
    graph = module.graph
    for node in reversed(graph.nodes):
        if node.target is torch.ops.aten.copy_.default and not node.users:
            graph.erase_node(node)
    holders = [n for n in graph.nodes if n.op == "placeholder"]
    first = len(holders) - len(constants)
    for (name, constant), holder in zip(constants.items(), holders[first:], strict=True):
        setattr(module, f"lifted{name}", constant)
        with graph.inserting_before(holder):
            node = graph.create_node("get_attr", f"lifted{name}")
        node.meta = dict(holder.meta)
        holder.replace_all_uses_with(node)
        graph.erase_node(holder)
    module.recompile()
    return module


def _constants(module: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in module.graph.nodes if n.op == "get_attr"]


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


@lru_cache(maxsize=4)
def decompositions(keep: frozenset[Any]) -> Mapping[Any, Callable[..., Any]]:
    """Decompositions of backward operations, but for those to keep.

    Only of backward operations: they are where derivatives live, and every operation that is
    decomposed costs milliseconds of tracing.
    """
    return {
        op: decompose
        for op, decompose in decomposition_table.items()
        if isinstance(op, OpOverload)
        and op not in keep
        and "backward" in op._schema.name
        and op._overloadname == "default"
    }


@contextmanager
def numbered(nodes: Iterable[Any]) -> Iterator[None]:
    """Traced operations carry the sequence number of the autograd node that ran them."""
    handles = []
    for node in nodes:
        number = node._sequence_nr()

        def enter(_: Any, number: int = number) -> None:
            set_grad_fn_seq_nr(number)

        def leave(*_: Any) -> None:
            reset_grad_fn_seq_nr()

        handles.append(node.register_prehook(enter))
        handles.append(node.register_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sequence_of(node: fx.Node) -> int | None:
    """Number that a traced operation shares with its forward operation, or None."""
    return node.meta.get("seq_nr")


def next_sequence() -> int:
    """Number that the next recorded operation of this thread will get."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number


class Observer(TorchFunctionMode):
    """Stands between a user's function and torch while the function is traced.

    It remembers from which line operations were called. Tensors that the function reads from
    elsewhere get a name of our own: in-place operations on them then happen in the graph alone, and
    leave neither values nor history on the user's tensor. Reading the value of such a tensor (an
    edge count, a switch) is no branch on the input, and gives the value.

    Attributes:
        calls: First sequence number, the one after the last, file and line, in order.
        aliases: What stands for a tensor, by the tensor's id; with the tensor itself.
    """

    def __init__(self) -> None:
        """Begins with no call."""
        super().__init__()
        self.calls: list[tuple[int, int, str, int]] = []
        self.aliases: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the call and notes the line it came from."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _READING and args and self._has_value(args[0]):
            with real_values():
                return func(*args, **kwargs)
        if name in _INDEXING and len(args) > 1:
            args = (args[0], self._positions(args[1]), *args[2:])
        args, kwargs = pytree.tree_map_only(Tensor, self._alias, (args, kwargs))
        before = next_sequence()
        result = func(*args, **kwargs)
        after = next_sequence()
        if after > before:
            frame = _user_frame(sys._getframe(1))
            if frame is not None:
                self.calls.append((before, after, frame.f_code.co_filename, frame.f_lineno))
        return result

    def _alias(self, leaf: Tensor) -> Tensor:
        if not _is_real(leaf) or not leaf.is_leaf:
            return leaf
        if id(leaf) not in self.aliases:
            with torch._C.DisableTorchFunction(), torch._C._DisableFuncTorch():
                alias = leaf.data  # traced, so it has no value to write to, and its own version
                if leaf.requires_grad:
                    alias.requires_grad_()
            self.aliases[id(leaf)] = alias, leaf  # the tensor too, or its id could be given away
        return self.aliases[id(leaf)][0]

    def _has_value(self, leaf: Any) -> bool:
        """Whether a tensor is a constant that the function has not written to."""
        if not isinstance(leaf, Tensor) or not _is_real(leaf) or not leaf.is_leaf:
            return False
        if leaf.requires_grad or isinstance(leaf, torch.nn.Parameter):
            return False  # training changes it
        with torch._C.DisableTorchFunction():
            return not self.aliases or all(a._version == 0 for a, _ in self.aliases.values())

    def _positions(self, index: Any) -> Any:
        """An index with known masks written as positions: those have a shape that is known too."""
        parts = index if isinstance(index, tuple) else (index,)
        if not any(map(self._is_mask, parts)):
            return index
        found: list[Any] = []
        with real_values():
            for part in parts:
                found += part.nonzero().unbind(1) if self._is_mask(part) else (part,)
        return tuple(found)

    def _is_mask(self, part: Any) -> bool:
        mask = isinstance(part, Tensor) and part.dtype == torch.bool and part.ndim > 0
        return mask and self._has_value(part)


def _is_real(tensor: Tensor) -> bool:
    """Whether it has values of its own, which the function may read or write."""
    return not (
        isinstance(tensor, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


_INDEXING = frozenset({"__getitem__", "__setitem__"})
_READING = frozenset({"item", "tolist", "__bool__", "__int__", "__float__", "__index__"})


def _user_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost frame that is neither torch's nor ours."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "").split(".", 1)[0]
        generated = frame.f_code.co_filename.startswith("<")
        if module not in _NOT_THE_USER and not generated:
            return frame
        frame = frame.f_back
    return None


_NOT_THE_USER = frozenset({"torch", "torchjac", "functorch"})


def is_random(op: Any) -> bool:
    """Whether an operation draws random numbers."""
    return isinstance(op, OpOverload) and torch.Tag.nondeterministic_seeded in op.tags


def is_loaded() -> bool:
    """Whether torch has imported what tracing needs (one to two seconds, once)."""
    return "torch._dynamo" in sys.modules


__all__ = [
    "DATA_DEPENDENT",
    "UNSUPPORTED",
    "HigherOrderOperator",
    "Observer",
    "OpOverload",
    "decompositions",
    "is_loaded",
    "is_random",
    "next_sequence",
    "numbered",
    "sequence_of",
    "trace",
    "unreadable",
]
