"""Inside `torch.vmap`, a torch.func transform or `torch.compile`: torch.func does the work.

There tensors are wrapped, and only torch.func's own transforms nest in what surrounds them.
"""

from __future__ import annotations

from typing import Any

import torch

from torchjac.call import Call
from torchjac.errors import ArgumentError
from torchjac.record import Record, remember


def delegate(call: Call, batched: bool, layout: torch.layout, entry: str) -> tuple[Any, Any]:
    """Evaluates with `torch.func.jacrev`: `(returned, J)`.

    Raises:
        ArgumentError: `batched=True` or a sparse layout, which cannot be had there.
    """
    if batched:
        raise ArgumentError(
            "torchjac: batched=True does not work inside a torch.func transform, torch.vmap or "
            "torch.compile, where independence of the samples cannot be checked. Use "
            "torch.vmap(torchjac.jacobian(f)) with an f of one sample."
        )
    if layout is not torch.strided:
        raise ArgumentError(
            "torchjac: a sparse layout does not work inside a torch.func transform, torch.vmap or "
            "torch.compile. Use layout=torch.strided."
        )

    def both(*args: Any) -> tuple[Any, Any]:
        returned = call.function(*args, **call.kwargs)
        return (returned[0] if call.has_aux else returned), returned

    jacobian, returned = torch.func.jacrev(both, call.argnums, has_aux=True)(*call.args)
    if not torch.compiler.is_compiling():
        remember(lambda: _record(entry, layout))
    return returned, jacobian


def _record(entry: str, layout: torch.layout) -> Record:
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
        layout=layout,
        seconds=0.0,
    )
