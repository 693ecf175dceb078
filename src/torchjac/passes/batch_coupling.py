"""Exact tests that the samples of a batch are independent.

A *silent* sample has a zero cotangent. The gradient at a silent sample is exactly zero, unless the
output of another sample depends on that sample. The test needs no tolerance, so no scale hides a
dependence. The first run of a program tests all pairs of samples. Two passes for each bit of the
sample numbers suffice (2 log2 B): the first silences the samples whose bit is 0, the second the
samples whose bit is 1. Each later run silences the next sample in turn.
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
from torchjac.passes.batching_check import equal_up_to_rounding
from torchjac.passes.seeds import random_vectors
from torchjac.passes.structure import Structure
from torchjac.passes.user_code import UserCodeDetector

# Passes of one row and one sample each, for backward passes that run user code.
_SINGLE_SAMPLE_PASSES = 24
_calls = count()

_COUPLING_NODES = {
    "BatchNorm": "batch normalization in training mode (call .eval() on the module)",
    "InstanceNorm": "instance normalization over the batch",
}


Samples = slice | Tensor
"""Some samples of a batch: a slice, or a boolean mask."""


class CouplingTest:
    """Exact tests of the batch of a program.

    Attributes:
        user_code: Whether user code ran, or may have run, in a pass of this test.
    """

    def __init__(self, program: EagerGraph, structure: Structure):
        self._program = program
        self._structure = structure
        self._size = structure.batch or 0
        self.user_code = structure.custom

    def prove(self) -> None:
        """Tests all pairs of samples.

        Raises:
            CoupledBatchError: The output of a sample depends on the input of another sample.
        """
        numbers = torch.arange(self._size)
        for bit in range((self._size - 1).bit_length()):
            for side in (0, 1):
                self._test((numbers >> bit) & 1 == side)

    def product(self) -> tuple[list[Tensor], tuple[Tensor | None, ...]]:
        """A random cotangent u, zero at the silent sample, and u' J; tests the silent sample.

        Raises:
            CoupledBatchError: The output of another sample depends on the silent sample.
        """
        return self._test(self.next_silent_sample())

    def product_with_rows(
        self, passes: Passes
    ) -> tuple[tuple[Tensor | None, ...], list[Tensor], tuple[Tensor | None, ...]]:
        """All rows, and the result of `product`, from one batched pass.

        Raises:
            CoupledBatchError: The output of another sample depends on the silent sample.
            PlanRefused: The pass cannot be batched.
        """
        silent = self.next_silent_sample()
        cotangent = random_vectors(self._program.outputs)
        for leaf in cotangent:
            leaf[silent] = 0
        detector = UserCodeDetector(self._program.device)
        rows, gradients = passes.batched_with_product(cotangent, detector)
        self.user_code |= detector.saw_user_code is not False
        self.check_silent(cotangent, gradients, silent)
        return rows, cotangent, gradients

    def next_silent_sample(self) -> slice:
        """The sample whose cotangent is zero in this call, as a slice.

        Exactly one sample is silent: a dependence between two silent samples would not show.
        Dependences between the remaining samples show in u' J, because the rows contain them.
        """
        sample = next(_calls) % self._size
        return slice(sample, sample + 1)

    def check_silent(
        self, cotangent: Sequence[Tensor], gradients: Sequence[Tensor | None], silent: Samples
    ) -> None:
        """Raises if a silent sample received a gradient."""
        for position, gradient in enumerate(gradients):
            if gradient is None:
                continue
            received_gradient = gradient.detach()[silent]
            if bool(received_gradient.any()) and bool(
                ((received_gradient != 0) & ~received_gradient.isnan()).any()
            ):
                self._refuse(cotangent, silent, position)

    def compare_single_samples(self, passes: Passes) -> None:
        """Compares rows of single samples in a pass of their own with rows of the whole batch.

        The rows may differ without a dependence between samples: a hook may clip by a norm over
        the whole batch. Each call compares the next rows and samples.

        Raises:
            CoupledBatchError: The gradient of a sample changes with the cotangents of the batch.
        """
        pairs = self._structure.m * self._size
        call, stride = next(_calls), max(1, pairs // _SINGLE_SAMPLE_PASSES)
        batch_rows: dict[int, tuple[Tensor | None, ...]] = {}
        for step in range(min(pairs, _SINGLE_SAMPLE_PASSES)):
            row, sample = divmod((call + step * stride) % pairs, self._size)
            if row not in batch_rows:
                batch_rows[row] = passes.single(row)
            alone = passes.single(row, sample=sample)
            for a, b in zip(batch_rows[row], alone, strict=True):
                if (
                    a is not None
                    and b is not None
                    and not equal_up_to_rounding(a[sample], b[sample])
                ):
                    self._refuse_backward()

    def _refuse_backward(self) -> NoReturn:
        raise CoupledBatchError(
            "torchjac: batched=True promises independent samples, but samples meet in the backward "
            "pass: a gradient hook or a custom autograd.Function gives one sample another gradient "
            "when other samples have other cotangents (clipping by a norm over the batch, a "
            "condition on the whole gradient). Remove it, or use batched=False."
        )

    def _test(self, silent: Samples) -> tuple[list[Tensor], tuple[Tensor | None, ...]]:
        cotangent = random_vectors(self._program.outputs)
        for leaf in cotangent:
            leaf[silent] = 0
        with UserCodeDetector(self._program.device) as detector:
            gradients = backward(self._program.outputs, cotangent, self._program.inputs)
        self.user_code |= detector.saw_user_code is not False
        self.check_silent(cotangent, gradients, silent)
        if len(cotangent) > 1 and not _finite(gradients):
            self._test_each_output(cotangent, silent)
        return cotangent, gradients

    def _test_each_output(self, cotangent: Sequence[Tensor], silent: Samples) -> None:
        """Tests each output alone: an infinite slope of one output must not hide another output."""
        for output, part in zip(self._program.outputs, cotangent, strict=True):
            gradients = backward([output], [part], self._program.inputs)
            self.check_silent(cotangent, gradients, silent)

    def _receives(
        self, cotangent: Sequence[Tensor], senders: Tensor, sample: int, position: int
    ) -> bool:
        """Whether one sample of an input receives a gradient from the outputs of the senders."""
        parts = []
        for leaf in cotangent:
            part = torch.zeros_like(leaf)
            is_sender = senders.to(leaf.device)
            part[is_sender] = leaf.detach()[is_sender]
            parts.append(part)
        gradient = backward(self._program.outputs, parts, self._program.inputs)[position]
        if gradient is None:
            return False
        received_gradient = gradient.detach()[sample]
        return bool(((received_gradient != 0) & ~received_gradient.isnan()).any())

    def _refuse(self, cotangent: Sequence[Tensor], silent: Samples, position: int) -> NoReturn:
        program = self._program
        is_silent = torch.zeros(self._size, dtype=torch.bool)
        is_silent[silent] = True
        sending = (~is_silent).nonzero().flatten()
        sample = next(
            int(s)
            for s in [*is_silent.nonzero().flatten(), -1]
            if s < 0 or self._receives(cotangent, sending, int(s), position)
        )
        while len(sending) > 1:  # bisect for one sender
            half = sending[: len(sending) // 2]
            alone = self._receives(cotangent, half, sample, position)
            sending = half if alone else sending[len(sending) // 2 :]
        output = next(
            i
            for i in [*range(len(program.outputs)), -1]
            if i < 0 or self._receives(_of_output(cotangent, i), sending, sample, position)
        )
        nest = program.nest
        received = nest.name_input(nest.live_inputs[position])
        sent = nest.name_output(nest.live_outputs[output])
        names = {getattr(kind, "__name__", "") for kind in self._structure.operations}
        causes = [
            text for part, text in _COUPLING_NODES.items() if any(part in name for name in names)
        ]
        hint = f" The graph contains {' and '.join(causes)}." if causes else ""
        raise CoupledBatchError(
            f"torchjac: batched=True promises independent samples, but sample {int(sending[0])} "
            f"of {sent} depends on sample {sample} of {received}.{hint} Usual causes are "
            f"normalization, attention, sorting or means over the batch axis. Make samples "
            f"independent, or use batched=False for the full Jacobian across samples."
        )


def _finite(gradients: Sequence[Tensor | None]) -> bool:
    return all(g is None or bool(torch.isfinite(g.detach().sum())) for g in gradients)


def _of_output(cotangent: Sequence[Tensor], position: int) -> list[Tensor]:
    return [c if i == position else torch.zeros_like(c) for i, c in enumerate(cotangent)]
