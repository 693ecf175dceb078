"""The fast path: check the guard predicate, then call the native kernel.

The predicate belongs to the guard that the dispatcher uses (`guards.guard`). A call that the
predicate rejects goes to the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchjac._torch.vmap import transform
from torchjac.call import Call
from torchjac.capture.nesting import depth
from torchjac.compiler.codegen.c.guard_reads import unchanged
from torchjac.compiler.codegen.executable import Executable
from torchjac.compiler.compiled import Compiled
from torchjac.guards.guard import Guard
from torchjac.host.clock import now
from torchjac.jit.checking import is_checking
from torchjac.passes.race import forced
from torchjac.record import Record, set_last_record

FastPath = Callable[[tuple[Any, ...]], Any]


def has_fast_path(compiled: Compiled) -> bool:
    """Whether the program has a native kernel of torchjac, which a fast path can call."""
    return isinstance(compiled.program.kernel, Executable)


def build_fast_path(
    call: Call,
    guard: Guard | None,
    compiled: Compiled,
    record: Callable[[float], Record],
) -> FastPath | None:
    """A function that checks the guard predicate, then calls the native kernel.

    It takes positional arguments, and returns the Jacobian; None if the dispatcher has to answer.

    Args:
        call: A call that the guard holds for.
        guard: The guard of the entry; None if another entry was used since.
        compiled: The compiled Jacobian of the entry, in its settled native tier.
        record: Makes the record of a run from its wall time in seconds.

    Returns:
        The fast path; None if there is none for calls of this form.
    """
    if guard is None or call.kwargs or call.has_aux:
        return None
    kernel = compiled.program.kernel
    assert isinstance(kernel, Executable)
    plain = all(
        type(x) is Tensor and x.is_floating_point() and x.is_contiguous() and not x.is_neg()
        for x in call.args
    )
    predicate = (
        guard.predicate(call, (transform, depth, forced, is_checking), unchanged) if plain else None
    )
    if predicate is None:
        return None
    holds, finish, compiling = predicate, compiled.finish, torch.compiler.is_compiling
    evaluate, order = kernel.launcher(), _order(call)

    def jacobian(args: tuple[Any, ...]) -> Any:
        started = now()
        try:
            if compiling() or not holds(args):
                return None
        except RuntimeError:  # a setting cannot be read: the precisions of backends differ
            return None
        parts, fine = evaluate([args[k] for k in order] if order else args)
        if not fine:
            return None
        value, took = finish(parts), now() - started
        set_last_record(partial(record, took))
        return value

    return jacobian


def _order(call: Call) -> list[int]:
    """Positions of the arguments in the order of the kernel's inputs, differentiated ones first.

    Empty if the arguments stand in this order.
    """
    positions = list(call.positions())
    order = positions + [k for k in range(len(call.args)) if k not in positions]
    return [] if order == sorted(order) else order
