"""Reverse mode: one cotangent a row, in batched or in plain passes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from torchjac._torch.autograd import backward
from torchjac.capture.eager_graph import EagerGraph
from torchjac.errors import PlanRefused
from torchjac.passes.batch_coupling import CouplingTest
from torchjac.passes.batched_pass import Passes
from torchjac.passes.batching_check import BatchingCheck
from torchjac.passes.chunks import in_chunks, rows_at_once
from torchjac.passes.freivalds import FreivaldsCheck
from torchjac.passes.plan import Plan
from torchjac.passes.seeds import UnitSeeds, random_vectors
from torchjac.passes.slab import Slab
from torchjac.passes.structure import Structure
from torchjac.passes.user_code import UserCodeDetector


def rows(program: EagerGraph, structure: Structure, plan: Plan) -> Iterator[Slab]:
    """Evaluates a Jacobian by pulling unit cotangents back.

    With a batch all samples share a pass, which is right only if samples are independent: see
    `passes.batch_coupling`. The first batched pass is compared with plain passes, because batching
    rules of torch have been wrong (`_cdist_backward`, torch 2.13).

    Raises:
        PlanRefused: The passes cannot be batched, or differ from plain passes.
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
    coupling = CouplingTest(program, structure) if structure.unproved_batch else None
    if coupling is not None and not plan.checked:
        coupling.prove()
    rows_and_product: Slab | None = None
    check: FreivaldsCheck | None
    if coupling is not None and _fits_one_pass(program, structure, plan):
        values, cotangent, product = coupling.product_with_rows(passes)
        rows_and_product = Slab("rows", 0, structure.m, values, 1)
        check, user_code = FreivaldsCheck(structure, cotangent, product), coupling.user_code
    else:
        check, user_code = _product_check(program, structure, coupling, unproved)
    batching_check = BatchingCheck(structure, program.inputs) if unproved else None

    free_last = not program.retain_graph and check is None and plan.chunk == 1
    try:
        slabs = (
            _slabs(program, structure, plan, passes, free_last)
            if rows_and_product is None
            else [rows_and_product]
        )
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
    in_doubt = check is not None and not check.agrees()
    if batching_check is not None and not batching_check.holds(passes, in_doubt):
        wrong = PlanRefused(f"{plan.batching} batching gives other values than a plain pass")
        wrong.user_code = user_code
        raise wrong
    if coupling is not None:
        if in_doubt:  # without a coupling and without user code, the cause is rounding
            coupling.prove()
        if user_code:
            coupling.compare_single_samples(passes)
    if not program.retain_graph and not free_last:
        free_graph(program)


# Elements of all cotangents, at most, for which one more row in a pass is free.
_SMALL_COTANGENTS = 2**14


def _fits_one_pass(program: EagerGraph, structure: Structure, plan: Plan) -> bool:
    """Whether the product that checks a batch is computed in the pass of the rows.

    The first product of a program comes from a plain pass. Programs with several outputs use plain
    passes too: zeros of one output must not meet infinities of another.
    """
    return (
        plan.checked
        and plan.batching == "functorch"
        and 1 < structure.m <= plan.chunk
        and len(program.outputs) == 1
        and structure.m * program.outputs[0].numel() <= _SMALL_COTANGENTS
    )


def _product_check(
    program: EagerGraph, structure: Structure, coupling: CouplingTest | None, unproved: bool
) -> tuple[FreivaldsCheck | None, bool]:
    """The check against u'J of a plain pass, and whether user code ran in the pass."""
    if coupling is not None:
        return FreivaldsCheck(structure, *coupling.product()), coupling.user_code
    if not unproved:
        return None, True
    cotangent = random_vectors(program.outputs)
    with UserCodeDetector(program.device) as detector:
        expected = backward(program.outputs, cotangent, program.inputs)
    user_code = structure.custom or detector.saw_user_code is not False
    return FreivaldsCheck(structure, cotangent, expected), user_code


def free_graph(program: EagerGraph) -> None:
    """Frees a graph by one pass without retain_graph.

    A batched pass retains the graph: if the pass fails, the row loop still needs the graph.
    """
    zeros = [torch.zeros_like(t) for t in program.outputs]
    backward(program.outputs, zeros, program.inputs, retain_graph=False)


def _slabs(
    program: EagerGraph, structure: Structure, plan: Plan, passes: Passes, free_last: bool
) -> Iterator[Slab]:
    if plan.chunk > 1:

        def batched(start: int, stop: int) -> Slab:
            if stop - start == 1:
                return Slab("rows", start, stop, passes.looped(start, stop), 1)
            return Slab("rows", start, stop, passes.batched(start, stop), 1)

        yield from in_chunks(structure.m, plan.chunk, batched)
        return

    def looped(start: int, stop: int) -> Slab:
        retain = stop < structure.m or not free_last
        return Slab("rows", start, stop, passes.looped(start, stop, retain), stop - start)

    row_bytes = sum(t.numel() * t.element_size() for t in program.inputs)
    yield from in_chunks(structure.m, rows_at_once(structure.m, row_bytes), looped)
