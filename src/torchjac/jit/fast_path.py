"""The fast path: check the guard predicate, then call the native kernel.

The same guard decides as in the dispatcher (`guards.guard`). A call that the predicate does not
pass goes through the dispatcher.
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
from torchjac.record import Record, remember

FastPath = Callable[[tuple[Any, ...]], Any]


def has_fast_path(compiled: Compiled) -> bool:
    """Whether native code of our own gives the result, so that a fast path may lead to it."""
    return isinstance(compiled.emitted.kernel, Executable)


def fast_path(
    call: Call,
    guard: Guard | None,
    compiled: Compiled,
    record: Callable[[float], Record],
) -> FastPath | None:
    """The fast path: check the guard predicate, then call the native kernel.

    It returns the Jacobian at arguments like those of a call, or None where the dispatcher is to
    answer.

    Args:
        call: A call that the compiled Jacobian is for.
        guard: The guard of its entry; None where another entry was used since.
        compiled: The compiled Jacobian, whose native code answers for good.
        record: The record of a run, of its seconds.

    Returns:
        The fast path; None where calls like this one have none.
    """
    if guard is None or call.kwargs or call.has_aux:
        return None
    kernel = compiled.emitted.kernel
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
        except RuntimeError:  # a setting that cannot be read: where precisions of backends differ
            return None
        parts, fine = evaluate([args[k] for k in order] if order else args)
        if not fine:
            return None
        value, took = finish(parts), now() - started
        remember(partial(record, took))
        return value

    return jacobian


def _order(call: Call) -> list[int]:
    """Which argument each input of the kernel is: the differentiated ones, then the others.

    Empty where they stand in this order.
    """
    taken = list(call.positions())
    order = taken + [k for k in range(len(call.args)) if k not in taken]
    return [] if order == sorted(order) else order
