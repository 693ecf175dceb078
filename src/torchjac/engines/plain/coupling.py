"""Making sure that the samples of a batch are independent, to the last bit.

With a zero cotangent at a sample the gradient at that sample is exactly zero, unless another
sample's output depends on it: no tolerance is involved, and no scale can hide a dependence. The
first time a program is seen all pairs of samples are tried, half of the samples at a time (one bit
of their number after the other: 2 log2 B passes). Later calls try some, another part each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import NoReturn

import torch
from torch import Tensor

from torchjac._torch.autograd import backward
from torchjac.capture import Program
from torchjac.engines.plain.seeds import weights
from torchjac.errors import CoupledBatchError
from torchjac.structure import Structure

# In later calls one sample in so many gets a zero cotangent. Fewer samples than that are split in
# two halves, each of which gets its turn in the same call.
_STRIDE = 16
_turn = count()

_KNOWN = {
    "BatchNorm": "batch normalization in training mode (call .eval() on the module)",
    "InstanceNorm": "instance normalization over the batch",
}


Samples = slice | Tensor
"""Some samples of a batch: every k-th, or those of a mask."""


class Coupling:
    """Exact tests of one program's batch."""

    def __init__(self, program: Program, structure: Structure):
        self._program = program
        self._structure = structure
        self._size = structure.batch or 0

    def prove(self) -> None:
        """Tries all pairs of samples.

        Raises:
            CoupledBatchError: One sample's output depends on another's input.
        """
        numbers = torch.arange(self._size)
        for bit in range((self._size - 1).bit_length()):
            for side in (0, 1):
                self._try((numbers >> bit) & 1 == side)

    def product(self) -> tuple[list[Tensor], tuple[Tensor | None, ...]]:
        """A random cotangent u, zero at some samples, and u' J; tries those samples on the way.

        Raises:
            CoupledBatchError: A sample's output depends on one of them.
        """
        if self._size < _STRIDE:
            self._try(slice(1, None, 2))
            return self._try(slice(0, None, 2))
        return self._try(self.silence())

    def silence(self) -> slice:
        """Samples to give a zero cotangent in this call."""
        stride = _STRIDE if self._size >= _STRIDE else 2
        return slice(next(_turn) % stride, None, stride)

    def refuse_if_received(
        self, cotangent: Sequence[Tensor], gradients: Sequence[Tensor | None], silent: Samples
    ) -> None:
        """Raises if a sample without a cotangent received a gradient all the same."""
        for position, gradient in enumerate(gradients):
            if gradient is None:
                continue
            got = gradient.detach()[silent]
            if bool(got.any()) and bool(((got != 0) & ~got.isnan()).any()):
                self._refuse(cotangent, silent, position)

    def refuse_backward(self) -> NoReturn:
        """Raises because a user's own backward does not treat samples one by one."""
        raise CoupledBatchError(
            "torchjac: batched=True promises independent samples, but samples meet in the backward "
            "pass: a gradient hook or a custom autograd.Function gives one sample another gradient "
            "when other samples have other cotangents (clipping by a norm over the batch, a "
            "condition on the whole gradient). Remove it, or use batched=False."
        )

    def _try(self, silent: Samples) -> tuple[list[Tensor], tuple[Tensor | None, ...]]:
        cotangent = weights(self._program.outputs)
        for leaf in cotangent:
            leaf[silent] = 0
        gradients = backward(self._program.outputs, cotangent, self._program.inputs)
        self.refuse_if_received(cotangent, gradients, silent)
        return cotangent, gradients

    def _receives(
        self, cotangent: Sequence[Tensor], senders: Tensor, sample: int, position: int
    ) -> bool:
        """Whether one sample of an input gets gradient from the senders' outputs."""
        parts = []
        for leaf in cotangent:
            part = torch.zeros_like(leaf)
            mine = senders.to(leaf.device)
            part[mine] = leaf.detach()[mine]
            parts.append(part)
        gradient = backward(self._program.outputs, parts, self._program.inputs)[position]
        if gradient is None:
            return False
        got = gradient.detach()[sample]
        return bool(((got != 0) & ~got.isnan()).any())

    def _refuse(self, cotangent: Sequence[Tensor], silent: Samples, position: int) -> NoReturn:
        program = self._program
        hushed = torch.zeros(self._size, dtype=torch.bool)
        hushed[silent] = True
        sending = (~hushed).nonzero().flatten()
        sample = next(
            int(s)
            for s in [*hushed.nonzero().flatten(), -1]
            if s < 0 or self._receives(cotangent, sending, int(s), position)
        )
        while len(sending) > 1:  # bisect for one sender
            half = sending[: len(sending) // 2]
            alone = self._receives(cotangent, half, sample, position)
            sending = half if alone else sending[len(sending) // 2 :]
        output = next(
            i
            for i in [*range(len(program.outputs)), -1]
            if i < 0 or self._receives(_only(cotangent, i), sending, sample, position)
        )
        nest = program.nest
        received = nest.name_input(nest.live_inputs[position])
        sent = nest.name_output(nest.live_outputs[output])
        names = {kind.__name__ for kind in self._operations()}
        causes = [text for part, text in _KNOWN.items() if any(part in name for name in names)]
        hint = f" The graph contains {' and '.join(causes)}." if causes else ""
        raise CoupledBatchError(
            f"torchjac: batched=True promises independent samples, but sample {int(sending[0])} "
            f"of {sent} depends on sample {sample} of {received}.{hint} Usual causes are "
            f"normalization, attention, sorting or means over the batch axis. Make samples "
            f"independent, or use batched=False for the full Jacobian across samples."
        )

    def _operations(self) -> frozenset[type]:
        graph = self._structure.graph
        return frozenset() if graph is None else graph.operations


def _only(cotangent: Sequence[Tensor], position: int) -> list[Tensor]:
    return [c if i == position else torch.zeros_like(c) for i, c in enumerate(cotangent)]
