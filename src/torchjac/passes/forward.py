"""Forward mode: a tangent per column, through the transposed backward graph.

NOTE: [Forward mode by transposing the backward pass]
The backward pass g = vjp(u) is linear in the cotangent u: g = J' u. A pass with create_graph
records a graph from u to g. Pulling a tangent v back through the recorded graph gives J v. So
forward mode needs no dual numbers. Forward mode works on existing graphs, has the semantics of the
backward pass (detach, no_grad inside f, custom functions), and avoids torch's operations on duals
(139-359 us for a dual times a constant, torch 2.13). See "a new trick for calculating Jacobian
vector products", J. Townsend, 2017.

The transposition is right only if the backward pass is linear in u. Operations of torch are linear.
A user's own backward or a gradient hook may be nonlinear (clipping, guided backpropagation), and no
sampling proves linearity. So forward mode is refused if the graph has a custom function, or if user
code ran in the backward pass. If user code is invisible (device threads), two more products with
different signs and scales are compared. Every evaluation compares u' J with g.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from torchjac._torch.autograd import backward, is_right_twice, out_of_memory
from torchjac.capture.eager_graph import EagerGraph
from torchjac.errors import PlanRefused, RefusedHere
from torchjac.passes.autograd_graph import largest_eps
from torchjac.passes.batch_coupling import CouplingTest
from torchjac.passes.batched_pass import Passes
from torchjac.passes.chunks import in_chunks, rows_at_once
from torchjac.passes.freivalds import FreivaldsCheck
from torchjac.passes.plan import Plan
from torchjac.passes.reverse import free_graph
from torchjac.passes.seeds import Seeds, UnitSeeds, random_vectors
from torchjac.passes.slab import Slab
from torchjac.passes.structure import Structure
from torchjac.passes.user_code import UserCodeDetector

# Largest machine epsilon that leaves enough digits for a check: single precision passes.
_MAX_EPS = 1e-6


def columns(program: EagerGraph, structure: Structure, plan: Plan) -> Iterator[Slab]:
    """Evaluates a Jacobian by pushing unit tangents forward.

    Raises:
        PlanRefused: The backward pass cannot be transposed, or a check failed.
        CoupledBatchError: Samples are not independent.
    """
    check_transposable(program, structure)
    coupling = CouplingTest(program, structure) if structure.unproved_batch else None
    cotangent = random_vectors(program.outputs)
    silent: slice | None = None
    if coupling is not None:
        if not plan.checked:
            coupling.prove()
        silent = coupling.next_silent_sample()
        for leaf in cotangent:
            leaf[silent] = 0
    if not plan.checked:
        check_user_code(program, cotangent)
    gradients, saw_user_code = recorded_gradients(program, cotangent)
    if coupling is not None and silent is not None:
        coupling.check_silent(cotangent, gradients, silent)
    checks = [FreivaldsCheck(structure, [u.detach() for u in cotangent], gradients)]
    if saw_user_code is None:
        checks += [_scaled_check(program, structure, scale) for scale in (-64.0, -1 / 64)]

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
        free_graph(program)


def check_transposable(program: EagerGraph, structure: Structure) -> None:
    """Refuses programs whose backward pass may be nonlinear, or is too coarse to check."""
    if structure.custom:
        raise PlanRefused("a custom autograd function need not be linear in its cotangent")
    operations = structure.graph.operations if structure.graph is not None else ()
    if not all(is_right_twice(kind, program.create_graph) for kind in operations):
        raise PlanRefused("torch differentiates the backward pass of a norm twice, not three times")
    if largest_eps(program) > _MAX_EPS:
        raise PlanRefused("half precision leaves too few digits to check the result")


def check_user_code(program: EagerGraph, cotangent: list[Tensor]) -> None:
    """Refuses programs whose plain pass runs user code, before a recorded pass does."""
    with UserCodeDetector(program.device) as detector:
        backward(program.outputs, cotangent, program.inputs)
    if detector.saw_user_code:
        raise PlanRefused(_USER_CODE)


_USER_CODE = "gradient hooks or other code of the user run in the backward pass"


def recorded_gradients(
    program: EagerGraph, cotangent: list[Tensor]
) -> tuple[tuple[Tensor | None, ...], bool | None]:
    """The gradients of a recorded pass, and whether user code ran (None if unknown)."""
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


def _scaled_check(program: EagerGraph, structure: Structure, scale: float) -> FreivaldsCheck:
    cotangent = [w * scale for w in random_vectors(program.outputs)]
    return FreivaldsCheck(
        structure, cotangent, backward(program.outputs, cotangent, program.inputs)
    )


def transposed_outputs(program: EagerGraph, gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """The outputs of the transposed graph: a tensor in the shape of each input.

    A gradient that does not depend on the cotangent means a zero block: its columns need no pass.
    (The check detects a gradient that user code detached.)
    """
    with_graph = [g is not None and g.requires_grad for g in gradients]
    return [
        g if g is not None and has_graph else x
        for g, has_graph, x in zip(gradients, with_graph, program.inputs, strict=True)
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
            return Slab("columns", start, stop, passes.looped(start, stop), stop - start)
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
