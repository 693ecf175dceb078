"""Inductor on a graph that is there already, without the front door of `torch.compile`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn


class NotCompiled(Exception):
    """Inductor gave up, or there is no compiler; the message says what it said."""


def compile_graph(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """A graph of ATen operations as compiled code, for inputs of these shapes and strides.

    Takes seconds, and imports torch's compiler. One thread compiles: no pool of processes is left.

    Raises:
        NotCompiled: It cannot be compiled.
    """
    try:
        import torch._inductor.config
        from torch._inductor.compile_fx import compile_fx

        no_warnings = warnings.catch_warnings()
        with no_warnings, torch.no_grad(), torch._inductor.config.patch(compile_threads=1):
            warnings.simplefilter("ignore")  # of torch about itself
            run: Any = compile_fx(module, list(inputs))
            run(*inputs)  # some of it is compiled when it first runs
    except Exception as error:
        first = str(error).strip().split("\n", 1)[0]
        raise NotCompiled(f"{type(error).__name__}: {first}") from error
    typed: Callable[..., Any] = run
    return typed


def write_package(
    module: nn.Module, inputs: Sequence[Tensor], path: Path, batch: int | None
) -> None:
    """Writes a module as an AOTInductor package: compiled code that C++ and Python load.

    Args:
        module: Takes the inputs.
        inputs: What it is compiled for.
        path: The file.
        batch: The leading size of inputs that may be another one, if it may.

    Raises:
        NotCompiled: It cannot be compiled.
    """
    try:
        import torch._inductor.config

        samples = torch.export.Dim("samples")
        dynamic_shapes = [{0: samples} if x.ndim and len(x) == batch else None for x in inputs]
        sizes = None if batch is None else (tuple(dynamic_shapes),)
        no_warnings = warnings.catch_warnings()
        with no_warnings, torch.no_grad(), torch._inductor.config.patch(compile_threads=1):
            warnings.simplefilter("ignore")  # of torch about itself
            program = torch.export.export(module, tuple(inputs), dynamic_shapes=sizes)
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:
        first = str(error).strip().split("\n", 1)[0]
        raise NotCompiled(f"{type(error).__name__}: {first}") from error
