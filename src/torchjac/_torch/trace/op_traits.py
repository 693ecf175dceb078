"""Traits of operations: static facts that the tracer reads off the schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from torchjac._torch.operators import aten, known
from torchjac._torch.private import corner, private, private_type
from torchjac._torch.trace import attention

if TYPE_CHECKING:
    from torch._ops import HigherOrderOperator as HigherOrderOperator
    from torch._ops import OpOverload as OpOverload
    from torch._ops import OpOverloadPacket as OpOverloadPacket
else:
    OpOverload = private_type("torch._ops.OpOverload")
    OpOverloadPacket = private_type("torch._ops.OpOverloadPacket")
    HigherOrderOperator = private_type("torch._ops.HigherOrderOperator")
_decompositions = private("torch._decomp.decomposition_table")


def decompositions() -> Mapping[Any, Any]:
    """The table of decompositions of torch; empty if its contract is broken."""
    table: Mapping[Any, Any] = _decompositions
    return table if DECOMPOSITIONS.known or DECOMPOSITIONS.holds() else {}


@corner("torch's table of decompositions", "no operation is written in terms of others")
def DECOMPOSITIONS() -> bool:
    """The table maps overloads to functions, backward operations among them.

    No decomposition runs here, as the first one costs 0.3 s of imports. Results of compiled code
    are compared with passes later.
    """
    decomposition = _decompositions[torch.ops.aten.tanh_backward.default]
    return callable(decomposition) and isinstance(_decompositions, Mapping)


@dataclass(frozen=True, slots=True)
class Traits:
    """Static facts of an operation.

    Attributes:
        is_composite: Whether torch implements the operation by other operations.
        decides: Whether Python sees values of a tensor, as a number or as a shape.
        is_random: Whether the operation draws random numbers.
        is_indexing: Whether the second argument holds indices.
        is_refused: Whether the operation changes the storage or type of a tensor.
        written: Positions and names of the arguments that the operation writes to.
        silent: Positions of arguments that the operation writes to against its schema.
        is_view: Whether results share the memory of the first argument.
    """

    is_composite: bool
    decides: bool
    is_random: bool
    is_indexing: bool
    is_refused: bool
    written: tuple[tuple[int, str], ...]
    silent: tuple[int, ...]
    is_view: bool


# Facts for the tracer are here, not in `torchjac.ops`, which imports `_torch`: imports must not be
# circular.

# Operations that read the shape of a tensor, not its values. (`tests/test_ops.py` compares them
# with the rows of `ops`.)
FILLED = known(
    {
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.empty_like.default,
        aten.full_like.default,
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
        aten.new_full.default,
    }
)
# Operations whose result equals their argument.
SAME = known((aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default))
LIFTED, COPIED = aten.lift_fresh.default, aten.lift_fresh_copy.default
# Operations that write to these arguments (running statistics) against their schemas.
_SILENT = known(
    {
        aten.native_batch_norm.default: (3, 4),
        aten.cudnn_batch_norm.default: (3, 4),
        aten.miopen_batch_norm.default: (3, 4),
    }
)
INDEX = aten.index.Tensor
_INDEXING = known(
    (
        INDEX,
        aten.index_put.default,
        aten.index_put_.default,
        aten._index_put_impl_.default,
        aten._unsafe_index.Tensor,
        aten._unsafe_index_put.default,
    )
)
# Operations that change the storage or the type of a tensor, after which aliases are unknown.
_CHANGING = frozenset({"set_", "resize_", "resize_as_", "_resize_output_", "set_data", "swap_"})
_QUESTIONS = known((aten.size.default, aten.stride.default, aten.storage_offset.default))


@lru_cache(maxsize=4096)
def traits_of(func: OpOverload) -> Traits:
    """The traits of an operation."""
    schema = func._schema
    written = [
        (i, a.name)
        for i, a in enumerate(schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    decides = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return Traits(
        is_composite=func not in _QUESTIONS and func.has_kernel_for_dispatch_key(composite),
        decides=func not in _INDEXING and not decides.isdisjoint(func.tags),
        is_random=torch.Tag.nondeterministic_seeded in func.tags,
        is_indexing=func in _INDEXING,
        is_refused=schema.name.removeprefix("aten::") in _CHANGING,
        written=tuple(written),
        silent=_SILENT.get(func, ()),
        is_view=any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns),
    )


# Loops without a fixed number of iterations. torch's own tracer keeps all other control flow
# operators.
UNROLLED = frozenset({"while_loop", "while_loop_stack_output"})


def unrolled(func: HigherOrderOperator) -> Any:
    """The eager implementation of a control flow operator."""
    return func.py_kernels[torch._C.DispatchKey.CompositeExplicitAutograd]


# Operations that are always decomposed, and their decompositions.
WRITTEN_OUT = known(
    {
        aten._scaled_dot_product_flash_attention_for_cpu.default: attention.forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default: attention.backward,
    }
)


@lru_cache(maxsize=4096)
def decomposition(func: OpOverload) -> Any:
    """The decomposition of a backward operation; None for any other operation."""
    if "backward" not in func._schema.name or func._overloadname != "default":
        return None
    return decompositions().get(func)
