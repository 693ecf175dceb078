"""Hooks that show C, programs and kernels to the replay: the one module with torchjac's insides.

Three things are recorded. Costs of compiling are set so low that a few calls pay for it:

- C goes to the compiler as a file whose name ends in `.c`, by `subprocess.Popen`; the text is
  recorded there. It is compiled without optimization, which takes a tenth of the time.
- Programs are instances of `TensorProgram`; read are `module` (a graph of `torch.fx`), `recording`
  and `constants`.
- Kernels are instances of `Executable`, built from a source with `source.tables`: arrays that C
  reads.

A change that moves or renames one of these corrects the names here. Each revision is replayed with
its own hooks, so texts stay comparable. The compiler of PyTorch is hidden: it would take minutes,
and its code is not ours.
"""

from __future__ import annotations

import functools
import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from torchjac.compiler.codegen.executable import Executable
from torchjac.compiler.program.tensor_program import TensorProgram
from torchjac.host import costs
from torchjac.host.clock import clock
from torchjac.jit import tiers
from torchjac.passes.race import _races

from .normal import normal_c, normal_words

__all__ = ["Noted", "clock", "watched"]


@dataclass
class Noted:
    """Texts of one replay.

    Attributes:
        c: Sources in C, each with the flags of its compiler; and the tables that kernels read.
        program: Programs, each once.
        wrong: Errors of the hooks, kept here because torchjac would catch them.
    """

    c: list[str] = field(default_factory=list)
    program: list[str] = field(default_factory=list)
    wrong: list[Exception] = field(default_factory=list)

    def add(self, kind: str, say: Callable[[], str]) -> None:
        """Records a text; a program only once."""
        try:
            text = say()
        except Exception as error:
            self.wrong.append(error)
            return
        texts = getattr(self, kind)
        if kind != "program" or text not in texts:
            texts.append(text)


@contextmanager
def watched() -> Iterator[Noted]:
    """Records sources, programs and tables in this context.

    Raises:
        Exception: A hook failed: the hooks are not those of this revision.
    """
    noted = Noted()
    _races.clear()  # measurements of earlier cases decide nothing

    def kernel(instance: Any, program: Any, *rest: Any) -> None:
        noted.add("c", lambda: _tables(program.source.tables))

    def emitted(instance: Any, *rest: Any) -> None:
        noted.add("program", lambda: _program(instance))

    with (
        _replaced(vars(tiers), "_COMPILE_SECONDS", 1e-3),
        _replaced(vars(tiers), "_COMPILE_SECONDS_PER_NODE", 0.0),
        _replaced(vars(tiers), "_MIN_NATIVE_BANK", 1e-3),
        _replaced(vars(costs), "_BUILD", 1e-3),
        _replaced(vars(costs), "_LOWERED_NUMBER", 0.0),
        _replaced(sys.modules, "torch._inductor.compile_fx", None),
        _replaced(vars(subprocess), "Popen", _compiler(noted)),
        _noticed(Executable, kernel),
        _noticed(TensorProgram, emitted),
    ):
        yield noted
    if noted.wrong:
        raise noted.wrong[0]


@contextmanager
def _replaced(where: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    missing = object()
    before = where.get(name, missing)
    where[name] = value
    try:
        yield
    finally:
        if before is missing:
            del where[name]
        else:
            where[name] = before


@contextmanager
def _noticed(kind: Any, notice: Callable[..., None]) -> Iterator[None]:
    """Calls a function for each new instance of a class, with the constructor's arguments."""
    original = kind.__init__

    @functools.wraps(original)
    def initialize(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        notice(self, *args, *kwargs.values())

    kind.__init__ = initialize
    try:
        yield
    finally:
        kind.__init__ = original


def _compiler(noted: Noted) -> type[subprocess.Popen[bytes]]:
    """A `Popen` that records the sources of a C compiler."""

    class Watched(subprocess.Popen):  # type: ignore[type-arg]
        """A process."""

        def __init__(self, command: Any, *args: Any, **kwargs: Any):
            words = [command] if isinstance(command, str) else [str(w) for w in command]
            sources = [Path(w) for w in words if w.endswith(".c")]
            if sources:
                noted.add("c", lambda: _source(words, sources))
                command = ["-O0" if w in ("-O1", "-O2", "-O3") else w for w in words]
            super().__init__(command, *args, **kwargs)

        def communicate(self, input: Any = None, timeout: Any = None) -> Any:
            """Waits without a limit: a busy machine decides nothing."""
            return super().communicate(input)

    return Watched


def _source(words: Sequence[str], sources: Sequence[Path]) -> str:
    """The flags of a compiler, and its sources."""
    flags = " ".join(w for w in words if "/" not in w)
    return "\n".join([flags, *(normal_c(s.read_text(encoding="utf-8")) for s in sources)])


def _tables(tables: Sequence[Any]) -> str:
    """The constant arrays of a kernel."""
    return "\n".join(["tables", *(f"{t.dtype} {t.shape} {_bytes(t)}" for t in tables)])


def _program(emitted: Any) -> str:
    """A program as text: how it runs, its graph, what was recorded, and its constants."""
    about = {  # keys as in earlier revisions: texts are compared
        "mode": emitted.mode,
        "fixed": emitted.fixed,
        "waists": emitted.waists,
        "note": emitted.refusal,
        "differentiable": emitted.differentiable,
        "samples": emitted.samples,
    }
    return "\n".join(
        [
            normal_words(str(about)),
            *_graph(emitted.module.graph),
            *_recording(emitted.recording),
            *(f"constant {said(c)}" for c in emitted.constants),
        ]
    )


def _graph(graph: fx.Graph) -> list[str]:
    """Operations of a graph; nodes are numbered."""
    numbers: dict[fx.Node, str] = {}

    def shown(x: Any) -> Any:
        return _Word(numbers[x]) if isinstance(x, fx.Node) else _plain(x)

    lines = []
    for node in graph.nodes:
        target = _target(node.target) if node.op == "call_function" else ""
        args = fx.node.map_aggregate((node.args, dict(node.kwargs)), shown)
        numbers[node] = f"%{len(numbers)}"
        value = node.meta.get("val")
        lines.append(f"{numbers[node]} = {node.op} {target} {args} {_shape(value)}".rstrip())
    return ["graph", *lines]


def _recording(recording: Any) -> list[str]:
    """Recorded operations, with the shapes of their results."""
    numbers: dict[int, str] = {}

    def shown(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return [shown(y) for y in x]
        if not hasattr(x, "base"):
            return _plain(x)
        if x.kind == "constant":
            return _Word(f"constant{x.position}")
        return _Word(numbers.setdefault(id(x), f"%{len(numbers)}"))

    lines = [f"input {shown(v)} {_shape(v)}" for v in recording.inputs]
    for call in recording.calls:
        args = shown(call.args), {k: shown(v) for k, v in call.kwargs.items()}
        results = ", ".join(f"{shown(v)} {_shape(v)}" for v in call.results if v is not None)
        lines.append(f"{results} = {_target(call.operation)} {args}")
    constants = [f"constant{i} {said(c)}" for i, c in enumerate(recording.constants)]
    return ["recording", *lines, f"outputs {shown(recording.outputs)}", *constants]


class _Word(str):
    """A name that is shown without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _plain(x: Any) -> Any:
    """An argument, shown so that two runs agree."""
    return said(x) if isinstance(x, Tensor) else x


def _target(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else target.__name__


def _shape(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_shape, value))})"
    if value is None or not hasattr(value, "shape"):
        return ""
    stride = value.stride() if callable(value.stride) else value.stride
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{dtype}{list(value.shape)}/{list(stride)}"


def said(tensor: Tensor) -> str:
    """A constant: its shape, its dtype, and a hash of its numbers."""
    dense = torch.empty(tensor.numel(), dtype=tensor.dtype)  # of stride 1, also where it is one
    dense.copy_(tensor.detach().reshape(-1))
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype}{list(tensor.shape)} {_bytes(dense.view(torch.uint8).numpy())}"


def _bytes(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
