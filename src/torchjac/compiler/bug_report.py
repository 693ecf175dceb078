"""What the issue tracker needs to know of a plan that computed something else than autograd."""

from __future__ import annotations

import platform

import torch

from torchjac._torch.pytree import flatten
from torchjac.call import Call
from torchjac.capture.linear_program import LinearProgram
from torchjac.compiler.program.tensor_program import TensorProgram


def report(call: Call, derivative: LinearProgram, emitted: TensorProgram, error: Exception) -> str:
    """The program and the plan as code, shapes and versions; no values of the user's.

    Args:
        call: The function and its arguments.
        derivative: Its traced backward pass.
        emitted: The plan.
        error: What was wrong with its result.
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
        f"The plan ({emitted.mode}):",
        emitted.module.code,
    ]
    return "\n".join(map(str, parts))
