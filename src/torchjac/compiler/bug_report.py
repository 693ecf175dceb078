"""Reports for the issue tracker, of compiled code that disagrees with autograd."""

from __future__ import annotations

import platform

import torch

from torchjac._torch.pytree import flatten
from torchjac.call import Call
from torchjac.capture.linear_program import LinearProgram
from torchjac.compiler.program.tensor_program import TensorProgram


def report(call: Call, derivative: LinearProgram, program: TensorProgram, error: Exception) -> str:
    """The linear program and the tensor program as code, shapes and versions; no values.

    Args:
        call: The function and its arguments.
        derivative: The traced backward pass of the function.
        program: The tensor program.
        error: The difference between its result and that of autograd.
    """
    leaves = flatten((call.args, call.kwargs))[0]
    shown = [
        f"{x.dtype} {tuple(x.shape)} strides {x.stride()}"
        if isinstance(x, torch.Tensor)
        else type(x).__name__
        for x in leaves
    ]
    name = getattr(call.function, "__qualname__", type(call.function).__name__)
    parts = [
        f"torchjac: a plan for {name} is wrong",
        str(error),
        "",
        f"torch {torch.__version__}, python {platform.python_version()}, {platform.platform()}",
        f"argnums {call.argnums}, arguments: {'; '.join(shown)}",
        f"rows {derivative.row_shapes}, columns {derivative.column_shapes}",
        "",
        "The derivative:",
        derivative.module.code,
        f"The plan ({program.mode}):",
        program.module.code,
    ]
    return "\n".join(map(str, parts))
