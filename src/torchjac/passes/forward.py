"""Forward mode: a tangent per column, through the transposed backward graph.

NOTE: [Forward mode by transposing the backward pass]
The backward pass g = vjp(u) is linear in the cotangent u: g = J' u. Recording it once
(create_graph) gives a graph from u to g, and pulling a tangent v back through *that* graph gives
J v. So forward mode needs no dual numbers: it works on graphs that already exist, means exactly
what the backward pass means (detach, no_grad inside f, custom functions), and avoids torch's
dual-number operations (139-359 us for a dual times a constant, torch 2.13). See "a new trick for
calculating Jacobian vector products", J. Townsend, 2017.

It is right only where the backward pass is linear in u. Operations of torch are; a user's own
backward or a gradient hook need not be (clipping, guided backpropagation), and no sampling can
prove that it is. So forward mode is refused where a custom function is on the graph or code of the
user ran in the backward pass; where that cannot be seen (device threads), two more products with
other signs and scales are compared. Every evaluation is checked besides: u' J must give g back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from torchjac._torch.autograd import backward, is_right_twice, out_of_memory
from torchjac.capture.eager_graph import EagerGraph
from torchjac.errors import PlanRefused, RefusedHere
from torchjac.passes.autograd_graph import coarsest
from torchjac.passes.batch_coupling import Coupling
from torchjac.passes.batched_pass import Passes
from torchjac.passes.chunks import in_chunks, rows_at_once
from torchjac.passes.freivalds import FreivaldsCheck
from torchjac.passes.plan import Plan
from torchjac.passes.reverse import release
from torchjac.passes.seeds import Seeds, UnitSeeds, weights
from torchjac.passes.slab import Slab
from torchjac.passes.structure import Structure
from torchjac.passes.user_code import UserCodeDetector

# Units in the last place of single precision and better; coarser ones leave nothing to check with.
_PRECISE = 1e-6


def columns(program: EagerGraph, structure: Structure, plan: Plan) -> Iterator[Slab]:
    """Evaluates a Jacobian by pushing unit tangents forward.

    Raises:
        PlanRefused: The backward pass cannot be transposed, or a check failed.
        CoupledBatchError: Samples are not independent.
    """
    refuse_beforehand(program, structure)
    coupling = Coupling(program, structure) if structure.unproved_batch else None
    cotangent = weights(program.outputs)
    silent: slice | None = None
    if coupling is not None:
        if not plan.checked:
            coupling.prove()
        silent = coupling.silence()
        for leaf in cotangent:
            leaf[silent] = 0
    if not plan.checked:
        refuse_user_code(program, cotangent)
    gradients, saw_user_code = recorded(program, cotangent)
    if coupling is not None and silent is not None:
        coupling.refuse_if_received(cotangent, gradients, silent)
    checks = [FreivaldsCheck(structure, [u.detach() for u in cotangent], gradients)]
    if saw_user_code is None:
        checks += [_other_product(program, structure, scale) for scale in (-64.0, -1 / 64)]

    used = tuple(g is not None for g in gradients)
    for slab in _slabs(program, structure, plan, cotangent, gradients):
        for check in checks:
            check.add(slab)
        yield replace(slab, used=used)
        del slab
    if not all(check.finite() for check in checks):
        raise RefusedHere("values are not finite: reverse mode defines what they are")
    if not all(check.agrees() for check in checks):
        if coupling is not None:
            coupling.prove()
        raise PlanRefused("its product with a random vector differs from that of a plain pass")
    if not program.retain_graph:
        release(program)


def refuse_beforehand(program: EagerGraph, structure: Structure) -> None:
    """Refuses programs whose backward pass is not known to be linear, or cannot be checked."""
    if structure.custom:
        raise PlanRefused("a custom autograd function need not be linear in its cotangent")
    operations = structure.graph.operations if structure.graph is not None else ()
    if not all(is_right_twice(kind, program.create_graph) for kind in operations):
        raise PlanRefused("torch differentiates the backward pass of a norm twice, not three times")
    if coarsest(program) > _PRECISE:
        raise PlanRefused("half precision leaves too few digits to check the result")


def refuse_user_code(program: EagerGraph, cotangent: list[Tensor]) -> None:
    """Looks for hooks in a plain pass first: in a recorded one they run with gradients enabled."""
    with UserCodeDetector(program.device) as detector:
        backward(program.outputs, cotangent, program.inputs)
    if detector.saw_user_code:
        raise PlanRefused(_USER_CODE)


_USER_CODE = "gradient hooks or other code of the user run in the backward pass"


def recorded(
    program: EagerGraph, cotangent: list[Tensor]
) -> tuple[tuple[Tensor | None, ...], bool | None]:
    """The gradient of a pass that records itself, and whether code of the user ran in it."""
    for leaf in cotangent:
        leaf.requires_grad_()
    try:
        with UserCodeDetector(program.device) as detector:
            gradients = backward(program.outputs, cotangent, program.inputs, create_graph=True)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise PlanRefused(f"the backward pass cannot be recorded: {error}") from error
    if detector.saw_user_code:
        raise PlanRefused(_USER_CODE)
    return gradients, detector.saw_user_code


def _other_product(program: EagerGraph, structure: Structure, scale: float) -> FreivaldsCheck:
    cotangent = [w * scale for w in weights(program.outputs)]
    return FreivaldsCheck(
        structure, cotangent, backward(program.outputs, cotangent, program.inputs)
    )


def transposed_outputs(program: EagerGraph, gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """The outputs of the transposed graph: one of each input's shape.

    A gradient that does not depend on the cotangent stands for a zero block (or for a detached
    one, which the check finds): its columns are zero without a pass.
    """
    live = [g is not None and g.requires_grad for g in gradients]
    return [
        g if g is not None and yes else x
        for g, yes, x in zip(gradients, live, program.inputs, strict=True)
    ]


def transposed_passes(
    program: EagerGraph,
    structure: Structure,
    plan: Plan,
    outputs: Sequence[Tensor],
    cotangent: Sequence[Tensor],
    seeds: Seeds,
) -> Passes:
    """Passes that push tangents forward."""
    operations = structure.operations | {"transposed"}
    return Passes(outputs, cotangent, seeds, plan, program.create_graph, operations)


def _slabs(
    program: EagerGraph,
    structure: Structure,
    plan: Plan,
    cotangent: list[Tensor],
    gradients: tuple[Tensor | None, ...],
) -> Iterator[Slab]:
    outputs = transposed_outputs(program, gradients)
    seeds = UnitSeeds(outputs, structure.column_starts, structure.batch)
    passes = transposed_passes(program, structure, plan, outputs, cotangent, seeds)

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
