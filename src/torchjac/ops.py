"""Operations that move elements, or make others of one value."""

from torchjac._torch.operators import aten, known

# What is not said to hold anything holds zeros: memory as it is found would be a table in the text,
# another one in each process.
FILLS = known(
    {
        aten.full.default,
        aten.full_like.default,
        aten.new_full.default,
        aten.zeros.default,
        aten.new_zeros.default,
        aten.zeros_like.default,
        aten.empty.memory_format,
        aten.empty_like.default,
        aten.empty_strided.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
)
MOVES = known(
    FILLS
    | frozenset(
        {
            aten.view.default,
            aten._unsafe_view.default,
            aten.reshape.default,
            aten.expand.default,
            aten.permute.default,
            aten.transpose.int,
            aten.t.default,
            aten.unsqueeze.default,
            aten.squeeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.slice.Tensor,
            aten.select.int,
            aten.as_strided.default,
            aten.clone.default,
            aten.contiguous.default,
            aten.cat.default,
            aten.stack.default,
            aten.index_select.default,
            aten.index.Tensor,
            aten.gather.default,
            aten.scatter.src,
            aten.scatter.value,
            aten.roll.default,
            aten.flip.default,
            aten.unbind.int,
            aten.split.Tensor,
            aten.split_with_sizes.default,
            aten.diagonal.default,
            aten.repeat.default,
            aten.select_scatter.default,
            aten.slice_scatter.default,
            aten.detach.default,
            aten.alias.default,
            aten.lift_fresh_copy.default,
            aten._to_copy.default,
            aten.unfold.default,
        }
    )
)
