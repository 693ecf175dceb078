"""Forward mode: a tangent per column, through the transposed backward graph.

NOTE: [Forward mode by transposing the backward pass]
The backward pass g = vjp(u) is linear in the cotangent u: g = J' u. Recording it once
(create_graph) gives a graph from u to g, and pulling a tangent v back through *that* graph gives
J v. So forward mode needs no dual numbers: it works on graphs that already exist, means exactly
what the backward pass means (detach, no_grad inside f, custom functions), and avoids torch's
dual-number operations (139-359 us for a dual times a constant, torch 2.13). See "a new trick for
calculating Jacobian vector products", J. Townsend, 2017.

It is right only where the backward pass really is differentiable in u. A custom backward that
detaches, or is not linear (gradient clipping in a hook), is not. Every evaluation is therefore
checked: g was pulled from a random u, so u' J must give g back.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from torchjac._torch.autograd import backward
from torchjac.capture import Program
from torchjac.engines.plain.check import Check
from torchjac.engines.plain.chunks import in_chunks, out_of_memory, rows_at_once
from torchjac.engines.plain.coupling import refuse_if_coupled
from torchjac.engines.plain.passes import Passes
from torchjac.engines.plain.reverse import release
from torchjac.engines.plain.seeds import weights
from torchjac.engines.slab import Slab
from torchjac.errors import PlanRefused
from torchjac.plan import Plan
from torchjac.structure import Structure


def columns(program: Program, structure: Structure, plan: Plan) -> Iterator[Slab]:
    """Evaluates a Jacobian by pushing unit tangents forward.

    Raises:
        PlanRefused: The backward pass cannot be transposed, or the check failed.
        CoupledBatchError: Samples are not independent.
    """
    cotangent = [u.requires_grad_() for u in weights(program.outputs)]
    try:
        gradients = backward(program.outputs, cotangent, program.inputs, create_graph=True)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise PlanRefused(f"the backward pass cannot be recorded: {error}") from error
    check = Check(structure, [u.detach() for u in cotangent], gradients)
    for slab in _slabs(program, structure, plan, cotangent, gradients):
        check.add(slab)
        yield slab
        del slab
    if not check.finite():
        raise PlanRefused("values are not finite: reverse mode defines what they are")
    if check.mismatch() is not None:
        refuse_if_coupled(program, structure, check)
        raise PlanRefused("the backward pass is not differentiable in its cotangent")
    if not program.retain_graph:
        release(program)


def _slabs(
    program: Program,
    structure: Structure,
    plan: Plan,
    cotangent: list[Tensor],
    gradients: tuple[Tensor | None, ...],
) -> Iterator[Slab]:
    # A gradient that does not depend on the cotangent stands for a zero block (or for a detached
    # one, which the check finds): its columns are zero without a pass.
    recorded = [g is not None and g.requires_grad for g in gradients]
    outputs = [
        g if g is not None and live else x
        for g, live, x in zip(gradients, recorded, program.inputs, strict=True)
    ]
    passes = Passes(
        outputs, cotangent, structure.column_starts, structure.batch, plan, program.create_graph
    )

    def evaluate(start: int, stop: int) -> Slab:
        try:
            if plan.chunk > 1 and stop - start > 1:
                return Slab("columns", start, stop, passes.batched(start, stop), 1)
            return Slab("columns", start, stop, passes.singles(start, stop), stop - start)
        except PlanRefused:
            raise
        except Exception as error:
            if out_of_memory(error):
                raise
            raise PlanRefused(f"the backward pass cannot be differentiated: {error}") from error

    size = plan.chunk
    if size == 1:
        column_bytes = sum(t.numel() * t.element_size() for t in program.outputs)
        size = rows_at_once(structure.n, column_bytes)
    yield from in_chunks(structure.n, size, evaluate)
