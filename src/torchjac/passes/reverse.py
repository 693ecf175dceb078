"""Reverse mode: a cotangent per row, batched or one at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from torchjac._torch.autograd import backward
from torchjac.capture.eager_graph import EagerGraph
from torchjac.errors import PlanRefused
from torchjac.passes.batch_coupling import Coupling
from torchjac.passes.batched_pass import Passes
from torchjac.passes.batching_check import BatchingCheck
from torchjac.passes.chunks import in_chunks, rows_at_once
from torchjac.passes.freivalds import FreivaldsCheck
from torchjac.passes.plan import Plan
from torchjac.passes.seeds import UnitSeeds, weights
from torchjac.passes.slab import Slab
from torchjac.passes.structure import Structure
from torchjac.passes.user_code import UserCodeDetector


def rows(program: EagerGraph, structure: Structure, plan: Plan) -> Iterator[Slab]:
    """Evaluates a Jacobian by pulling unit cotangents back.

    With a batch all samples share a pass. That is right only if they are independent, which is
    tested exactly (see `coupling`). Batched passes are compared with plain ones the first time:
    batching rules of torch have been wrong (`_cdist_backward`, torch 2.13).

    Raises:
        PlanRefused: The passes cannot be batched, or give other values than plain ones.
        CoupledBatchError: Samples are not independent.
    """
    passes = Passes(
        program.outputs,
        program.inputs,
        UnitSeeds(program.outputs, structure.row_starts, structure.batch),
        plan,
        program.create_graph,
        structure.operations,
    )
    unproved = plan.chunk > 1 and not plan.checked
    coupling = Coupling(program, structure) if structure.unproved_batch else None
    if coupling is not None and not plan.checked:
        coupling.prove()
    fused: Slab | None = None
    check: FreivaldsCheck | None
    if coupling is not None and _fits_one_pass(program, structure, plan):
        values, cotangent, product = coupling.product_with_rows(passes)
        fused = Slab("rows", 0, structure.m, values, 1)
        check, user_code = FreivaldsCheck(structure, cotangent, product), coupling.user_code
    else:
        check, user_code = _product(program, structure, coupling, unproved)
    batching_check = BatchingCheck(structure, program.inputs) if unproved else None

    free_last = not program.retain_graph and check is None and plan.chunk == 1
    try:
        slabs = _slabs(program, structure, plan, passes, free_last) if fused is None else [fused]
        for slab in slabs:
            if check is not None:
                check.add(slab)
            if batching_check is not None:
                batching_check.add(slab)
            yield slab
            del slab
    except PlanRefused as refusal:
        refusal.user_code = user_code
        raise
    doubt = check is not None and not check.agrees()
    if batching_check is not None and not batching_check.holds(passes, doubt):
        wrong = PlanRefused(f"{plan.batching} batching gives other values than a plain pass")
        wrong.user_code = user_code
        raise wrong
    if coupling is not None:
        if doubt:  # if this finds nothing, and only torch's operations ran, it was rounding
            coupling.prove()
        if user_code:
            coupling.compare_alone(passes)
    if not program.retain_graph and not free_last:
        release(program)


# Elements of all cotangents up to which a pass costs the same with one row more.
_SMALL = 2**14


def _fits_one_pass(program: EagerGraph, structure: Structure, plan: Plan) -> bool:
    """Whether the product that checks a batch is best computed beside the rows, in their pass.

    Not the first time, when it must come from a plain pass, and for one output only: zeros of one
    must not meet the infinities of another.
    """
    return (
        plan.checked
        and plan.batching == "functorch"
        and 1 < structure.m <= plan.chunk
        and len(program.outputs) == 1
        and structure.m * program.outputs[0].numel() <= _SMALL
    )


def _product(
    program: EagerGraph, structure: Structure, coupling: Coupling | None, unproved: bool
) -> tuple[FreivaldsCheck | None, bool]:
    """A product u'J of a plain pass to compare with, and whether code of the user ran in it."""
    if coupling is not None:
        return FreivaldsCheck(structure, *coupling.product()), coupling.user_code
    if not unproved:
        return None, True
    cotangent = weights(program.outputs)
    with UserCodeDetector(program.device) as detector:
        expected = backward(program.outputs, cotangent, program.inputs)
    user_code = structure.custom or detector.saw_user_code is not False
    return FreivaldsCheck(structure, cotangent, expected), user_code


def release(program: EagerGraph) -> None:
    """Frees a graph by one pass that does not retain it.

    A batched pass must not free it itself: if it fails half way, the row loop still needs it.
    """
    zeros = [torch.zeros_like(t) for t in program.outputs]
    backward(program.outputs, zeros, program.inputs, retain_graph=False)


def _slabs(
    program: EagerGraph, structure: Structure, plan: Plan, passes: Passes, free_last: bool
) -> Iterator[Slab]:
    if plan.chunk > 1:

        def batched(start: int, stop: int) -> Slab:
            if stop - start == 1:
                return Slab("rows", start, stop, passes.singles(start, stop), 1)
            return Slab("rows", start, stop, passes.batched(start, stop), 1)

        yield from in_chunks(structure.m, plan.chunk, batched)
        return

    def looped(start: int, stop: int) -> Slab:
        retain = stop < structure.m or not free_last
        return Slab("rows", start, stop, passes.singles(start, stop, retain), stop - start)

    row_bytes = sum(t.numel() * t.element_size() for t in program.inputs)
    yield from in_chunks(structure.m, rows_at_once(structure.m, row_bytes), looped)
