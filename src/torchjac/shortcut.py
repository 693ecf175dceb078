"""What a call comes to once a kernel gives its result: checks that nothing changed, and the kernel.

The same guards decide as on the way around it (`capture.guards`); what is left out is what leads to
them. Wherever anything is not as it mostly is, the call goes the long way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from torchjac._torch.vmap import inside_transform
from torchjac.accumulated import Accumulated, note
from torchjac.capture import Call, differentiating
from torchjac.capture.guards import Fingerprint
from torchjac.engines.kernel import Kernel
from torchjac.plan import is_forced


class Shortcut:
    """A plan whose kernel is called directly.

    Args:
        call: A call that the plan is for; its arguments are tensors.
        fingerprint: What such calls read.
        plan: The plan.
        entry: What the user calls it.
        layout: Of the result.
    """

    def __init__(
        self,
        call: Call,
        fingerprint: Fingerprint,
        plan: Accumulated,
        entry: str,
        layout: torch.layout,
    ):
        """Takes what stays the same out of every call."""
        kernel = plan.emitted.kernel
        assert isinstance(kernel, Kernel)
        self._given = (call.function, call.argnums, call.has_aux)
        self._mismatch = fingerprint.mismatch
        self._order = _order(call)
        self._on, self._finish = kernel.on, plan.finish
        self._note: Callable[[float], None] = lambda s: note(plan, entry, layout, s)

    @staticmethod
    def of(
        call: Call,
        latest: tuple[Fingerprint, Any] | None,
        plan: Accumulated,
        entry: str,
        layout: torch.layout,
    ) -> Shortcut | None:
        """The shortcut for calls like this one, if there is one."""
        if latest is None or latest[1] is not plan or call.kwargs or call.has_aux:
            return None
        plain = all(
            type(x) is Tensor and x.is_floating_point() and x.is_contiguous() for x in call.args
        )
        if not plain or not isinstance(plan.emitted.kernel, Kernel) or not plan.settled():
            return None
        return Shortcut(call, latest[0], plan, entry, layout)

    def __call__(self, args: tuple[Any, ...]) -> Any:
        """The Jacobian at these arguments; None where that is for others to say."""
        started = perf_counter()
        if inside_transform() or differentiating() or is_forced() or torch.compiler.is_compiling():
            return None
        call: Any = _Call()
        call.function, call.argnums, call.has_aux = self._given
        call.args, call.kwargs = args, _NOTHING
        if self._mismatch(call) is not None:
            return None
        inputs: Sequence[Tensor] = [args[k] for k in self._order]
        for x in inputs:  # their strides are those of a tensor that is contiguous
            if x.is_neg():
                return None
        parts, fine = self._on(inputs)
        if not fine:
            return None
        value = self._finish(parts)
        self._note(perf_counter() - started)
        return value


class _Call:
    """What guards read of a call: a frozen one takes a microsecond to make."""

    __slots__ = ("argnums", "args", "function", "has_aux", "kwargs")


_NOTHING: dict[str, Any] = {}


def _order(call: Call) -> list[int]:
    """Which argument each input of the kernel is: the differentiated ones, then the others."""
    taken = list(call.positions())
    return taken + [k for k in range(len(call.args)) if k not in taken]
