"""Inductor on an existing graph, without Dynamo."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn


class NotCompiled(Exception):
    """Inductor failed, or no compiler exists; the message is the first line of the error."""


def compile_graph(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Compiles a graph of ATen operations for inputs of these shapes and strides.

    Compilation takes seconds, and imports torch's compiler. A single thread compiles, so that no
    pool of processes remains.

    Raises:
        NotCompiled: The graph cannot be compiled.
    """
    try:
        import torch._inductor.config
        from torch._inductor.compile_fx import compile_fx

        no_warnings = warnings.catch_warnings()
        with no_warnings, torch.no_grad(), torch._inductor.config.patch(compile_threads=1):
            warnings.simplefilter("ignore")  # torch warns about its own code
            run: Any = compile_fx(module, list(inputs))
            run(*inputs)  # part of the compilation happens in the first run
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
        module: The module.
        inputs: Example inputs of the module.
        path: File of the package.
        batch: Leading size that is dynamic in the package; None if all sizes are fixed.

    Raises:
        NotCompiled: The module cannot be compiled.
    """
    try:
        import torch._inductor.config

        samples = torch.export.Dim("samples")
        dynamic_shapes = [{0: samples} if x.ndim and len(x) == batch else None for x in inputs]
        sizes = None if batch is None else (tuple(dynamic_shapes),)
        no_warnings = warnings.catch_warnings()
        with no_warnings, torch.no_grad(), torch._inductor.config.patch(compile_threads=1):
            warnings.simplefilter("ignore")  # torch warns about its own code
            program = torch.export.export(module, tuple(inputs), dynamic_shapes=sizes)
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:
        first = str(error).strip().split("\n", 1)[0]
        raise NotCompiled(f"{type(error).__name__}: {first}") from error
