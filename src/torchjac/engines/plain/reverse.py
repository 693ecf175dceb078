"""Reverse mode: a cotangent per row, batched or one at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from torchjac._torch.autograd import backward
from torchjac.capture import Program
from torchjac.engines.plain.check import Check
from torchjac.engines.plain.chunks import in_chunks, rows_at_once
from torchjac.engines.plain.coupling import refuse_if_coupled
from torchjac.engines.plain.passes import Passes
from torchjac.engines.plain.seeds import weights
from torchjac.engines.slab import Slab
from torchjac.errors import PlanRefused
from torchjac.plan import Plan
from torchjac.structure import Structure


def rows(program: Program, structure: Structure, plan: Plan) -> Iterator[Slab]:
    """Evaluates a Jacobian by pulling unit cotangents back.

    With a batch all samples share a pass. That is right only if they are independent, so one more
    pass, with a random cotangent, is compared with the same combination of the rows. So are the
    rows of batched passes the first time: batching rules of torch have been wrong
    (`_cdist_backward`, torch 2.13).

    Raises:
        PlanRefused: The passes cannot be batched, or give other values than a plain one.
        CoupledBatchError: Samples are not independent.
    """
    passes = Passes(
        program.outputs,
        program.inputs,
        structure.row_starts,
        structure.batch,
        plan,
        program.create_graph,
    )
    check = _check(program, structure, plan)
    for slab in _slabs(program, structure, plan, passes):
        if check is not None:
            check.add(slab)
        yield slab
        del slab
    if check is not None and check.mismatch() is not None:
        refuse_if_coupled(program, structure, check)
        if plan.chunk > 1:
            raise PlanRefused(f"{plan.batching} batching gives other values than a plain pass")
    if not program.retain_graph and plan.chunk > 1:
        release(program)


def release(program: Program) -> None:
    """Frees a graph by one pass that does not retain it.

    A batched pass must not free it itself: if it fails half way, the row loop still needs it.
    """
    zeros = [torch.zeros_like(t) for t in program.outputs]
    backward(program.outputs, zeros, program.inputs, retain_graph=False)


def _slabs(program: Program, structure: Structure, plan: Plan, passes: Passes) -> Iterator[Slab]:
    if plan.chunk > 1:

        def batched(start: int, stop: int) -> Slab:
            if stop - start == 1:
                return Slab("rows", start, stop, passes.singles(start, stop), 1)
            return Slab("rows", start, stop, passes.batched(start, stop), 1)

        yield from in_chunks(structure.m, plan.chunk, batched)
        return

    def looped(start: int, stop: int) -> Slab:
        retain = program.retain_graph or stop < structure.m
        return Slab("rows", start, stop, passes.singles(start, stop, retain), stop - start)

    row_bytes = sum(t.numel() * t.element_size() for t in program.inputs)
    yield from in_chunks(structure.m, rows_at_once(structure.m, row_bytes), looped)


def _check(program: Program, structure: Structure, plan: Plan) -> Check | None:
    samples_share_a_pass = structure.batch is not None and structure.batch > 1
    unproved = plan.chunk > 1 and not plan.checked
    if not (samples_share_a_pass or unproved) or structure.m == 0:
        return None
    cotangent = weights(program.outputs)
    expected = backward(program.outputs, cotangent, program.inputs)
    return Check(structure, cotangent, expected)
