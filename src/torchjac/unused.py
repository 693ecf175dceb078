"""What to say of inputs that no output depends on."""

from __future__ import annotations

from torchjac._torch.vmap import inside_transform
from torchjac.capture import Program


def unused_in_graph(program: Program, positions: tuple[int, ...]) -> str:
    """What to say where no output of a graph depends on some inputs."""
    names = [program.nest.name_input(p) for p in positions]
    ungraphed = [p for p in positions if not program.nest.inputs[p].requires_grad]
    if inside_transform():
        cause = (
            "inside torch.vmap or a torch.func transform, tensors do not carry the graph of the "
            "tensors they stand for; use torchjac.jacobian(f) there"
        )
    elif not program.outputs:
        cause = (
            "the outputs have no graph at all (they were computed under no_grad, from detached "
            "tensors, or before requires_grad was set)"
        )
    elif ungraphed:
        cause = (
            f"{program.nest.name_input(ungraphed[0])} does not require a gradient; call "
            f".requires_grad_() on it before the outputs are computed"
        )
    else:
        cause = (
            "its name may have been rebound to a new tensor (x = x * 2), or the outputs use a "
            "detached copy"
        )
    return (
        f"torchjac.jac: no output depends on {', '.join(names)}. Usual cause: {cause}. Pass "
        f"allow_unused=True to get zeros."
    )


def unused_in_function(program: Program, positions: tuple[int, ...]) -> str:
    """What to say where no output of a function depends on some inputs."""
    names = ", ".join(program.nest.name_input(p) for p in positions)
    return (
        f"torchjac: no output depends on {names}: its Jacobian is zero. Usual causes: the function "
        f"uses the tensor through a closure (jacobian(lambda x: y, x) with a y computed before) "
        f"instead of its argument, or detaches it. For outputs that are already computed use "
        f"torchjac.jac(outputs, inputs)."
    )
