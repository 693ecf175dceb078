"""Delegates to torch.func inside `torch.vmap`, a torch.func transform or `torch.compile`.

Tensors are wrapped there, and only torch.func's own transforms nest in the surrounding ones.
"""

from __future__ import annotations

from typing import Any

import torch

from torchjac.call import Call
from torchjac.errors import ArgumentError
from torchjac.record import Record, set_last_record
from torchjac.request import Dense, Request


def delegate(call: Call, request: Request) -> tuple[Any, Any]:
    """The return value of the function and its Jacobian, by `torch.func.jacrev`.

    Raises:
        ArgumentError: `batched=True` or a sparse layout, which torch.func does not have.
    """
    if request.batched:
        raise ArgumentError(
            "torchjac: batched=True does not work inside a torch.func transform, torch.vmap or "
            "torch.compile, where independence of the samples cannot be checked. Use "
            "torch.vmap(torchjac.jacobian(f)) with an f of one sample."
        )
    if not isinstance(request.output, Dense):
        raise ArgumentError(
            "torchjac: a sparse layout does not work inside a torch.func transform, torch.vmap or "
            "torch.compile. Use layout=torch.strided."
        )

    def output_and_returned(*args: Any) -> tuple[Any, Any]:
        returned = call.function(*args, **call.kwargs)
        return (returned[0] if call.has_aux else returned), returned

    jacobian, returned = torch.func.jacrev(output_and_returned, call.argnums, has_aux=True)(
        *call.args
    )
    if not torch.compiler.is_compiling():
        set_last_record(lambda: _record(request.entry))
    return returned, jacobian


def _record(entry: str) -> Record:
    return Record(
        entry=entry,
        engine="torch.func",
        mode="torch.func",
        passes=0,
        chunk=0,
        budget=0,
        rows=0,
        columns=0,
        batch=None,
        layout=torch.strided,
        seconds=0.0,
    )
