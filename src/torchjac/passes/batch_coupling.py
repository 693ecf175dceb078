"""Making sure that the samples of a batch are independent, to the last bit.

With a zero cotangent at a sample the gradient at that sample is exactly zero, unless another
sample's output depends on it: no tolerance is involved, and no scale can hide a dependence. The
first time a program is seen all pairs of samples are tried, half of the samples at a time (one bit
of their number after the other: 2 log2 B passes). Later calls try one, another one each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import NoReturn

import torch
from torch import Tensor

from torchjac._torch.autograd import backward
from torchjac.capture.eager_graph import EagerGraph
from torchjac.errors import CoupledBatchError
from torchjac.passes.batched_pass import Passes
from torchjac.passes.batching_check import same
from torchjac.passes.seeds import weights
from torchjac.passes.structure import Structure
from torchjac.passes.user_code import UserCodeDetector

# Rows of single samples that get a pass of their own where code of the user runs in the backward.
_ALONE = 24
_turn = count()

_KNOWN = {
    "BatchNorm": "batch normalization in training mode (call .eval() on the module)",
    "InstanceNorm": "instance normalization over the batch",
}


Samples = slice | Tensor
"""Some samples of a batch: every k-th, or those of a mask."""


class Coupling:
    """Exact tests of one program's batch.

    Attributes:
        user_code: Whether code of the user ran in a pass that was made here (or may have).
    """

    def __init__(self, program: EagerGraph, structure: Structure):
        self._program = program
        self._structure = structure
        self._size = structure.batch or 0
        self.user_code = structure.custom

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
        """A random cotangent u, zero at one sample, and u' J; tries that sample on the way.

        Raises:
            CoupledBatchError: Another sample's output depends on it.
        """
        return self._try(self.silence())

    def product_with_rows(
        self, passes: Passes
    ) -> tuple[tuple[Tensor | None, ...], list[Tensor], tuple[Tensor | None, ...]]:
        """All rows, and what `product` gives, from one batched pass.

        Raises:
            CoupledBatchError: Another sample's output depends on the silent one.
            PlanRefused: The pass cannot be batched.
        """
        silent = self.silence()
        cotangent = weights(self._program.outputs)
        for leaf in cotangent:
            leaf[silent] = 0
        detector = UserCodeDetector(self._program.device)
        rows, gradients = passes.batched_with(cotangent, detector)
        self.user_code |= detector.saw_user_code is not False
        self.refuse_if_received(cotangent, gradients, silent)
        return rows, cotangent, gradients

    def silence(self) -> slice:
        """The sample to give a zero cotangent in this call.

        One alone: a dependence between two silent samples would show nowhere. All others show in
        u' J, because the rows themselves contain what came from other samples.
        """
        sample = next(_turn) % self._size
        return slice(sample, sample + 1)

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

    def compare_alone(self, passes: Passes) -> None:
        """Raises if a sample gets another gradient when it does not share its pass with others.

        No sample need reach another for that: a hook may clip by a norm over the whole batch. Some
        rows of some samples are tried, others the next time.

        Raises:
            CoupledBatchError: It does.
        """
        pairs = self._structure.m * self._size
        turn, stride = next(_turn), max(1, pairs // _ALONE)
        shared: dict[int, tuple[Tensor | None, ...]] = {}
        for step in range(min(pairs, _ALONE)):
            number, sample = divmod((turn + step * stride) % pairs, self._size)
            if number not in shared:
                shared[number] = passes.single(number)
            alone = passes.single(number, only=sample)
            for a, b in zip(shared[number], alone, strict=True):
                if a is not None and b is not None and not same(a[sample], b[sample]):
                    self._refuse_backward()

    def _refuse_backward(self) -> NoReturn:
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
        with UserCodeDetector(self._program.device) as detector:
            gradients = backward(self._program.outputs, cotangent, self._program.inputs)
        self.user_code |= detector.saw_user_code is not False
        self.refuse_if_received(cotangent, gradients, silent)
        if len(cotangent) > 1 and not _finite(gradients):
            self._try_each_output(cotangent, silent)
        return cotangent, gradients

    def _try_each_output(self, cotangent: Sequence[Tensor], silent: Samples) -> None:
        """The infinite slope of one output must not hide what another one sends."""
        for output, part in zip(self._program.outputs, cotangent, strict=True):
            gradients = backward([output], [part], self._program.inputs)
            self.refuse_if_received(cotangent, gradients, silent)

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
        names = {getattr(kind, "__name__", "") for kind in self._structure.operations}
        causes = [text for part, text in _KNOWN.items() if any(part in name for name in names)]
        hint = f" The graph contains {' and '.join(causes)}." if causes else ""
        raise CoupledBatchError(
            f"torchjac: batched=True promises independent samples, but sample {int(sending[0])} "
            f"of {sent} depends on sample {sample} of {received}.{hint} Usual causes are "
            f"normalization, attention, sorting or means over the batch axis. Make samples "
            f"independent, or use batched=False for the full Jacobian across samples."
        )


def _finite(gradients: Sequence[Tensor | None]) -> bool:
    return all(g is None or bool(torch.isfinite(g.detach().sum())) for g in gradients)


def _only(cotangent: Sequence[Tensor], position: int) -> list[Tensor]:
    return [c if i == position else torch.zeros_like(c) for i, c in enumerate(cotangent)]
