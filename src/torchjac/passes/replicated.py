"""The replicated pass: one forward over copies of the input, one plain backward for all rows.

Backward sums the rows of outputs that share an input; with a copy of the input for each row, no two
rows share an input. The function must map a stack of inputs to the stack of results, which few
functions promise. So every evaluation is checked: the results of the copies must equal the original
result, and the rows must agree with one backward pass through the original graph.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchjac._torch.autograd import backward, out_of_memory
from torchjac.capture.eager_graph import EagerGraph
from torchjac.errors import PlanRefused
from torchjac.passes.autograd_graph import largest_eps
from torchjac.passes.batch_coupling import CouplingTest
from torchjac.passes.chunks import in_chunks
from torchjac.passes.freivalds import FreivaldsCheck, tolerance
from torchjac.passes.plan import Plan
from torchjac.passes.seeds import random_vectors, unit_vector_stack
from torchjac.passes.slab import Slab
from torchjac.passes.structure import Structure


def rows(program: EagerGraph, structure: Structure, plan: Plan) -> Iterator[Slab]:
    """Evaluates a Jacobian on copies of the input, one copy for each row.

    Raises:
        PlanRefused: There is no function to run again, the Jacobian must be differentiable, the
            function draws random numbers, or results of copies differ from the original result.
        CoupledBatchError: Samples are not independent.
    """
    if program.replay is None:
        raise PlanRefused("only a graph is given, no function to run on copies of the input")
    if program.create_graph:
        raise PlanRefused("copies of the input are not on the graph that create_graph continues")
    if largest_eps(program) > 1e-6:
        raise PlanRefused("half precision leaves too few digits to check the result")
    if any("BatchNorm" in getattr(kind, "__name__", "") for kind in structure.operations):
        raise PlanRefused("batch normalization would move its running statistics once more")
    if structure.unproved_batch:
        CouplingTest(program, structure).prove()
    cotangent = random_vectors(program.outputs)
    check = FreivaldsCheck(
        structure, cotangent, backward(program.outputs, cotangent, program.inputs)
    )

    def evaluate(start: int, stop: int) -> Slab:
        try:
            return Slab("rows", start, stop, _copies(program, structure, start, stop), 1)
        except PlanRefused:
            raise
        except Exception as error:
            if out_of_memory(error):
                raise
            raise PlanRefused(f"the function fails on copies of its input: {error}") from error

    for slab in in_chunks(structure.m, plan.chunk, evaluate):
        check.add(slab)
        yield slab
        del slab
    if not check.agrees():
        raise PlanRefused("the function does not map copies of its input independently")


def _copies(
    program: EagerGraph, structure: Structure, start: int, stop: int
) -> tuple[Tensor | None, ...]:
    assert program.replay is not None
    count = stop - start
    batched = structure.batch is not None
    inputs = [_repeat(x.detach(), count, batched).requires_grad_() for x in program.inputs]
    state = torch.random.get_rng_state()
    results = program.replay(inputs)
    if not torch.equal(state, torch.random.get_rng_state()):
        torch.random.set_rng_state(state)
        raise PlanRefused("the function draws random numbers: copies would each get their own")
    outputs = [
        _split_copies(y, like, count, batched)
        for y, like in zip(results, program.outputs, strict=True)
    ]
    positions, seeds = unit_vector_stack(
        program.outputs, structure.row_starts, start, stop, structure.batch
    )
    grads = backward([outputs[p] for p in positions], seeds, inputs, retain_graph=False)
    return tuple(
        None if g is None else g.view(count, *x.shape)
        for g, x in zip(grads, program.inputs, strict=True)
    )


def _repeat(x: Tensor, count: int, batched: bool) -> Tensor:
    copies = x.expand(count, *x.shape)
    return copies.reshape(count * x.shape[0], *x.shape[1:]) if batched else copies.clone()


def _split_copies(y: Tensor, like: Tensor, count: int, batched: bool) -> Tensor:
    """The results in shape `(count, *like.shape)`, compared with the original result."""
    expected = (count * like.shape[0], *like.shape[1:]) if batched else (count, *like.shape)
    if tuple(y.shape) != expected:
        raise PlanRefused(f"copies give a result of shape {tuple(y.shape)}, expected {expected}")
    copies = y.reshape(count, *like.shape)
    if like.numel() and count:
        error = (copies.detach() - like.detach()).abs()
        allowed = tolerance(torch.finfo(like.dtype).eps) * like.detach().abs().amax()
        if not bool((error <= allowed).all()):
            raise PlanRefused("the function gives other values on copies of its input")
    return copies
