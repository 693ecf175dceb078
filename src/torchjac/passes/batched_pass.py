"""One chunk of passes over a graph: one batched pass, or one pass a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from torchjac._torch.autograd import backward, out_of_memory
from torchjac._torch.vmap import (
    batched_backward,
    legacy_batched_backward,
    looping_batched_backward,
    missing_rule,
    strict_batched_backward,
)
from torchjac.errors import PlanRefused
from torchjac.passes.plan import Plan
from torchjac.passes.seeds import Seeds

BatchedBackward = Callable[..., tuple[Tensor | None, ...]]
_BACKWARD_BY_BATCHING: dict[str, BatchedBackward] = {
    "functorch": batched_backward,
    "looping": looping_batched_backward,
    "legacy": legacy_batched_backward,
}

# Sets of node types that all have a batching rule. The test flips a switch of torch that all
# threads share, so each set is tested once.
_batchable: set[frozenset[object]] = set()


class MissingRule(PlanRefused):
    """An operation of the backward pass has no batching rule."""

    def __init__(self, operation: str):
        super().__init__(f"torch has no batching rule for {operation}")
        self.operation = operation


class Passes:
    """Pulls seeds of `outputs` back to `inputs`: unit vectors, or sums of unit vectors.

    In reverse mode these are the outputs and inputs of a program. In forward mode the graph is the
    transposed one, `outputs` are the gradients, and `inputs` are the cotangents.
    """

    def __init__(
        self,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        seeds: Seeds,
        plan: Plan,
        create_graph: bool,
        operations: frozenset[object],
    ):
        self._outputs = outputs
        self._inputs = inputs
        self._seeds = seeds
        self._operations = operations
        self._backward = _BACKWARD_BY_BATCHING[plan.batching]
        if plan.batching == "functorch" and self._operations not in _batchable:
            self._backward = strict_batched_backward
        self._create_graph = create_graph

    def batched(self, start: int, stop: int) -> tuple[Tensor | None, ...]:
        """Pulls a stack of seeds back in one pass.

        Raises:
            MissingRule: torch has no batching rule for an operation of the graph.
            PlanRefused: The pass cannot be batched for another reason.
        """
        positions, stacks = self._seeds.stack(start, stop)
        gradients = self._pull([self._outputs[p] for p in positions], stacks)
        if self._backward is strict_batched_backward:
            _batchable.add(self._operations)
            self._backward = batched_backward
        if len(positions) == 1 or _finite(gradients):
            return gradients
        # The row of one output sends zeros through the nodes of every output in the stack, and
        # zero times an infinite derivative is NaN. The row loop visits the nodes of one output.
        ranges = self._seeds.ranges_by_leaf(start, stop, positions)
        if not ranges:
            return gradients
        parts = [self.batched(r.start, r.stop) for r in ranges]
        return tuple(
            _concatenate(blocks, ranges, like)
            for blocks, like in zip(zip(*parts, strict=True), self._inputs, strict=True)
        )

    def batched_with_product(
        self, cotangent: Sequence[Tensor], around: AbstractContextManager[object]
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """Pulls all seeds and one more cotangent back in one pass.

        Returns:
            The stack of rows, and the gradient of the cotangent.
        """
        _, stacks = self._seeds.stack(0, self._seeds.count)
        stacks = [torch.cat([s, c.unsqueeze(0)]) for s, c in zip(stacks, cotangent, strict=True)]
        try:
            gradients = batched_backward(
                self._outputs, stacks, self._inputs, self._create_graph, around
            )
        except Exception as error:
            if out_of_memory(error):
                raise
            raise PlanRefused(_first_line(error)) from error
        return (
            tuple([None if g is None else g[:-1] for g in gradients]),
            tuple([None if g is None else g[-1].detach() for g in gradients]),
        )

    def _pull(
        self, outputs: Sequence[Tensor], stacks: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        try:
            return self._backward(outputs, stacks, self._inputs, self._create_graph)
        except Exception as error:
            if out_of_memory(error):
                raise
            operation = missing_rule(error)
            if operation is not None:
                raise MissingRule(operation) from error
            # The row loop runs any backward that fails on a stack (NumPy, an `if` on a gradient,
            # .item()). If stacks are not the cause, the loop raises the error again.
            raise PlanRefused(_first_line(error)) from error

    def single(
        self, number: int, retain_graph: bool = True, sample: int | None = None
    ) -> tuple[Tensor | None, ...]:
        """Pulls one seed back in a plain pass; for one sample of a batch if `sample` is set."""
        positions, vectors = self._seeds.single(number)
        if sample is not None:
            for vector in vectors:
                vector[:sample] = 0
                vector[sample + 1 :] = 0
        outputs = [self._outputs[p] for p in positions]
        return backward(outputs, vectors, self._inputs, retain_graph, self._create_graph)

    def looped(self, start: int, stop: int, retain_graph: bool = True) -> tuple[Tensor | None, ...]:
        """Pulls seeds back one after the other, and stacks the rows.

        Each row is written into the stack at once: many small rows, alive among the large
        temporaries of the passes, would pin the heap.
        """
        if self._create_graph or stop - start == 1:
            gradients = [self.single(i, retain_graph or i < stop - 1) for i in range(start, stop)]
            return tuple(map(_stack, zip(*gradients, strict=True), self._inputs))
        stacks: list[Tensor | None] = [None] * len(self._inputs)
        for i in range(start, stop):
            for j, row in enumerate(self.single(i, retain_graph or i < stop - 1)):
                if row is None:
                    continue
                stack = stacks[j]
                if stack is None:
                    stack = torch.zeros(
                        (stop - start, *row.shape), dtype=row.dtype, device=row.device
                    )
                    stacks[j] = stack
                stack[i - start] = row
        return tuple(stacks)


def _stack(gradients: Sequence[Tensor | None], like: Tensor) -> Tensor | None:
    if all(g is None for g in gradients):
        return None
    filled = [torch.zeros_like(like) if g is None else g for g in gradients]
    return filled[0].unsqueeze(0) if len(filled) == 1 else torch.stack(filled)


def _finite(gradients: Sequence[Tensor | None]) -> bool:
    return all(g is None or bool(torch.isfinite(g.detach().sum())) for g in gradients)


def _concatenate(
    parts: Sequence[Tensor | None], ranges: Sequence[range], like: Tensor
) -> Tensor | None:
    if all(part is None for part in parts):
        return None
    return torch.cat(
        [
            like.new_zeros((len(r), *like.shape)) if part is None else part
            for part, r in zip(parts, ranges, strict=True)
        ]
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
