"""Telling which samples of a batch depend on which, when the check says that some do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchjac._torch.autograd import backward
from torchjac.capture import Program
from torchjac.engines.plain.check import Check
from torchjac.errors import CoupledBatchError
from torchjac.structure import Structure, collect

# How many of the samples that disagree are looked at exactly.
_LOOKED_AT = 4

_KNOWN = {
    "BatchNorm": "batch normalization in training mode (call .eval() on the module)",
    "InstanceNorm": "instance normalization over the batch",
}


def refuse_if_coupled(program: Program, structure: Structure, check: Check) -> None:
    """Raises if a sample that disagrees really receives gradient from another sample's output.

    The test is exact, where the check is not: with a zero cotangent at sample b the gradient at
    sample b is zero to the last bit, unless another sample's output depends on it.

    Raises:
        CoupledBatchError: It does; the message names the samples, the leaves and known causes.
    """
    if structure.batch is None or structure.batch < 2:
        return
    for sample in (check.mismatch() or [])[:_LOOKED_AT]:
        others = [b for b in range(structure.batch) if b != sample]
        found = _received(program, check.cotangent, others, sample)
        if found is not None:
            raise CoupledBatchError(_message(program, check, others, sample, found))


def _received(
    program: Program, cotangent: Sequence[Tensor], senders: Sequence[int], sample: int
) -> int | None:
    """Position of an input whose sample gets gradient from the senders' outputs, if any does."""
    parts = []
    for leaf in cotangent:
        part = torch.zeros_like(leaf)
        part[senders] = leaf.detach()[senders]
        parts.append(part)
    for position, grad in enumerate(backward(program.outputs, parts, program.inputs)):
        if grad is not None and bool(((grad[sample] != 0) & ~grad[sample].isnan()).any()):
            return position
    return None


def _message(program: Program, check: Check, senders: list[int], sample: int, position: int) -> str:
    while len(senders) > 1:  # bisect for one sender
        half = senders[: len(senders) // 2]
        alone = _received(program, check.cotangent, half, sample) is not None
        senders = half if alone else senders[len(senders) // 2 :]
    sender = senders[0]
    output = next(
        i
        for i in [*range(len(program.outputs)), -1]
        if i < 0 or _received(program, _only(check.cotangent, i), [sender], sample) is not None
    )
    nest = program.nest
    names = (
        nest.name_output(nest.live_outputs[output]),
        nest.name_input(nest.live_inputs[position]),
    )
    nodes = {type(node).__name__ for node in collect(program)}
    causes = [text for part, text in _KNOWN.items() if any(part in name for name in nodes)]
    hint = f" The graph contains {' and '.join(causes)}." if causes else ""
    return (
        f"torchjac: batched=True promises independent samples, but sample {sender} of "
        f"{names[0]} depends on sample {sample} of {names[1]}.{hint} Usual causes are "
        f"normalization, attention, sorting or means over the batch axis. Make samples "
        f"independent, or use batched=False for the full Jacobian across samples."
    )


def _only(cotangent: Sequence[Tensor], position: int) -> list[Tensor]:
    return [c if i == position else torch.zeros_like(c) for i, c in enumerate(cotangent)]
