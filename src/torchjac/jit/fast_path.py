"""What a call comes to once a kernel gives its result: a glance that nothing changed, and it.

The same guards decide as on the way around it (`guards.guard`); what is left out is what leads to
them. Wherever anything is not as it mostly is, the call goes the long way.
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
from torchjac.compiler.codegen.executable import Kernel
from torchjac.compiler.compiled import Accumulated
from torchjac.guards.guard import Fingerprint
from torchjac.host.clock import now
from torchjac.jit.dispatcher import is_checking
from torchjac.jit.entry import record
from torchjac.passes.race import forced
from torchjac.record import remember

Shortcut = Callable[[tuple[Any, ...]], Any]


def is_for_a_kernel(plan: Accumulated) -> bool:
    """Whether a plan stays as it is, and a kernel of ours gives its result."""
    return isinstance(plan.emitted.kernel, Kernel) and plan.settled()


def shortcut(
    call: Call,
    latest: tuple[Fingerprint, Any] | None,
    plan: Accumulated,
    entry: str,
    layout: torch.layout,
) -> Shortcut | None:
    """A function that gives the Jacobian at arguments like those of a call; None if there is none.

    It gives None where that is for others to say.

    Args:
        call: A call that the plan is for.
        latest: The plan that was used last, and what its calls read.
        plan: The plan; it is for a kernel.
        entry: What the user calls it.
        layout: Of the result.
    """
    if latest is None or latest[1] is not plan or call.kwargs or call.has_aux:
        return None
    kernel = plan.emitted.kernel
    assert isinstance(kernel, Kernel)
    plain = all(
        type(x) is Tensor and x.is_floating_point() and x.is_contiguous() and not x.is_neg()
        for x in call.args
    )
    glance = (
        latest[0].glance(call, (transform, depth, forced, is_checking), unchanged)
        if plain
        else None
    )
    if glance is None:
        return None
    alike, finish, compiling = glance, plan.finish, torch.compiler.is_compiling
    evaluate, order = kernel.launcher(), _order(call)

    def jacobian(args: tuple[Any, ...]) -> Any:
        started = now()
        try:
            if compiling() or not alike(args):
                return None
        except RuntimeError:  # a setting that cannot be read: where precisions of backends differ
            return None
        parts, fine = evaluate([args[k] for k in order] if order else args)
        if not fine:
            return None
        value, took = finish(parts), now() - started
        remember(partial(record, plan, entry, layout, took))
        return value

    return jacobian


def _order(call: Call) -> list[int]:
    """Which argument each input of the kernel is: the differentiated ones, then the others.

    Empty where they stand in this order.
    """
    taken = list(call.positions())
    order = taken + [k for k in range(len(call.args)) if k not in taken]
    return [] if order == sorted(order) else order
