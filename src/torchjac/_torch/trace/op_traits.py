"""What there is to know of an operation before it runs."""

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
    """What torch says of operations in terms of others; nothing where it does not say."""
    table: Mapping[Any, Any] = _decompositions
    return table if DECOMPOSITIONS.known or DECOMPOSITIONS.holds() else {}


@corner("torch's table of decompositions", "no operation is written in terms of others")
def DECOMPOSITIONS() -> bool:
    """It has functions by overload, backward operations among them.

    None of them is run: the first takes 0.3 s of imports. What they give is compared with passes.
    """
    decomposition = _decompositions[torch.ops.aten.tanh_backward.default]
    return callable(decomposition) and isinstance(_decompositions, Mapping)


@dataclass(frozen=True, slots=True)
class Traits:
    """What there is to know of an operation before it runs.

    Attributes:
        is_composite: Whether torch says what it does in terms of others.
        decides: Whether it gives numbers of a tensor to Python, as a number or as a shape.
        is_random: Whether it draws random numbers.
        is_indexing: Whether its second argument holds indices.
        is_refused: Whether it changes what a tensor is.
        written: Places and names of the arguments that it writes to.
        silent: Places of arguments that it writes to without saying so.
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


# Facts that the tracer needs stand here, not in `torchjac.ops`: that module imports `_torch`, and
# no circle may be closed.

# Operations that take the shape of a tensor, and none of its numbers. (`tests/test_ops.py` compares
# them with the rows of `ops`.)
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
# The result is the argument.
SAME = known((aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default))
LIFTED, COPIED = aten.lift_fresh.default, aten.lift_fresh_copy.default
# They write to these arguments, running statistics, though their schemas do not say so.
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
# They change the memory or the kind of a tensor: who shares it then is not followed.
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


# Loops without a fixed number of turns; the other control flow operators are traced as such.
UNROLLED = frozenset({"while_loop", "while_loop_stack_output"})


def unrolled(func: HigherOrderOperator) -> Any:
    """How a control flow operator runs when nobody watches."""
    return func.py_kernels[torch._C.DispatchKey.CompositeExplicitAutograd]


# Operations that are written out wherever they are met.
WRITTEN_OUT = known(
    {
        aten._scaled_dot_product_flash_attention_for_cpu.default: attention.forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default: attention.backward,
    }
)


@lru_cache(maxsize=4096)
def decomposition(func: OpOverload) -> Any:
    """How torch writes a backward operation in terms of others, or None.

    Only of backward operations: they are where derivatives live.
    """
    if "backward" not in func._schema.name or func._overloadname != "default":
        return None
    return decompositions().get(func)
