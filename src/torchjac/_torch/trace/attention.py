"""The CPU's fused attention kernel, decomposed into matrix products and a softmax.

The fused operations have no derivative rule, and their backward has no batching rule. torch calls
them for inputs of four axes, and since 2.14 for inputs of three.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    """The output, and the log-sum-exp of the scores.

    Strides are those of the fused operation: heads are next to features.
    """
    scores_and_masks = _scores(query, key, is_causal, attn_mask, scale)
    if scores_and_masks is None or dropout_p:
        return NotImplemented
    scores, _ = scores_and_masks
    output = torch.softmax(scores, -1) @ value
    heads_last = output.transpose(1, 2).contiguous().transpose(1, 2)
    return heads_last, torch.logsumexp(scores, -1)


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    """The gradients of query, key and value."""
    scores_and_masks = _scores(query, key, is_causal, attn_mask, scale)
    if scores_and_masks is None or dropout_p:
        return NotImplemented
    scores, masks = scores_and_masks
    # As in the fused operation. A softmax would differ where a row of a mask holds large negative
    # numbers only, as log-sum-exp rounds their differences away.
    weights = (scores - logsumexp.unsqueeze(-1)).exp()
    for mask in masks:
        weights = torch.where(mask == -math.inf, 0.0, weights)
    row_dot = (grad_out * out).sum(-1, keepdim=True)
    grad_scores = weights * (grad_out @ value.transpose(-2, -1) - row_dot)
    factor = _scale(query, scale)
    return (
        (grad_scores @ key) * factor,
        (grad_scores.transpose(-2, -1) @ query) * factor,
        weights.transpose(-2, -1) @ grad_out,
    )


def _scores(
    query: Tensor, key: Tensor, is_causal: bool, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, list[Tensor]] | None:
    """Scores of queries and keys, and the masks that they contain.

    None if heads share keys, if the mask has another dtype, or in half precision, which the fused
    operation sums in single precision.
    """
    if query.dtype not in (torch.float32, torch.float64) or query.shape[:-2] != key.shape[:-2]:
        return None
    if mask is not None and mask.dtype != query.dtype:
        return None
    masks = [] if mask is None else [mask]
    scores = (query @ key.transpose(-2, -1)) * _scale(query, scale)
    if is_causal:
        later = torch.full(scores.shape[-2:], -math.inf, dtype=query.dtype, device=query.device)
        masks.append(later.triu(1))
    for added in masks:
        scores = scores + added
    return scores, masks


def _scale(query: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale
