"""Ops on which torch itself gives no row-by-row answer to compare with, each with its reason."""

from __future__ import annotations

from versions import TORCH

# The row loop over torch.autograd.grad raises.
NO_ORACLE: dict[str, str] = {
    "as_strided.partial_views": "reads storage outside its argument, which a leaf does not have",
}

# Neither float64 nor complex on a CPU, so there is nothing to differentiate here.
NOT_FOR_CPU: dict[str, str] = {
    "nn.functional.one_hot": "takes integers and returns integers",
    "nn.functional.batch_norm.without_cudnn": "a CUDA variant of batch_norm",
    "torch.ops.aten._flash_attention_forward": "a CUDA kernel",
    "torch.ops.aten._efficient_attention_forward": "a CUDA kernel",
}

# Two runs with the same seed give different values, so a function cannot be compared.
RESEEDED_DIFFERS: dict[str, str] = {}

# torch contradicts itself: the same derivative comes out different in two correct ways of asking.
TORCH_DISAGREES: dict[str, str] = {
    "native_group_norm": "torch 2.13 forgets the gradient of mean and rstd where only they have a "
    "cotangent, as in a row loop, and gives the right one where the first output has one too",
}
if TORCH != (2, 13):  # the operation is not in the tables of 2.12, and right since 2.14
    TORCH_DISAGREES = {}
