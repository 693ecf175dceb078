"""Twenty-five kinds of program whose autograd graph is not the plain one, as test cases.

Each is a function of small float64 tensors; ``kinds`` names them. They are what user code holds:
Python control flow, in-place writes, state, custom Functions, hooks, checkpoints, compiled parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from laws import value

Case = tuple[Callable[..., Any], tuple[Tensor, ...]]


class OldStyle(torch.autograd.Function):
    """ctx in forward: torch.func refuses it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.cos()


class NewStyle(torch.autograd.Function):
    """setup_context apart from forward, with a vmap rule made by torch."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * y


class ThroughNumpy(torch.autograd.Function):
    """Leaves torch in forward and in backward: cannot be batched."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 3)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(grad.numpy() * 3 * x.detach().numpy() ** 2)


class InPlaceBackward(torch.autograd.Function):
    """Writes the cotangent into an unbatched buffer: cannot be batched."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 3 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        out = torch.zeros(grad.shape, dtype=grad.dtype)
        out.add_(grad).mul_(3)
        return out


class BranchInBackward(torch.autograd.Function):
    """Backward asks for the value of the cotangent: cannot be batched."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if grad.abs().sum() == 0:
            return torch.zeros_like(x)
        return 2 * x * grad


@torch.library.custom_op("torchjac_tests::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    """x ** 3 as an op of its own."""
    return x * x * x


def _cube_backward(ctx: Any, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return 3 * x * x * grad


cube.register_autograd(
    _cube_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0])
)


def data_dependent_if(x: Tensor) -> Tensor:
    return x.sin() * 2 if x.sum().item() > 0 else x.cos()


def in_place_writes(x: Tensor) -> Tensor:
    out = torch.zeros(5, dtype=x.dtype)
    out[0] = x[0] * x[1]
    out[1:4] = x[:3].sin()
    out[out < -0.5] = 0
    out[4] += x.prod()
    return out


def branch_in_tensor_hook(x: Tensor) -> Tensor:
    y = x.sin()
    y.register_hook(lambda g: 2 * g if g.abs().sum() > 0 else g)
    return y * x


def tensor_hook(x: Tensor) -> Tensor:
    y = x.sin()
    y.register_hook(lambda g: 3 * g)
    return y * x


def while_loop(x: Tensor) -> Tensor:
    y = x
    while y.norm() > 0.1:
        y = y * 0.5 * x.tanh()
    return y


def no_grad_inside(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.exp()
    return x * scale


def _rnn(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    net = nn.GRU(3, 4, batch_first=True).double()
    return net(x)[0]


def _conv(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2)).double()(x)


def _batch_norm(x: Tensor) -> Tensor:
    return nn.BatchNorm1d(x.shape[1]).double().train()(x)


def _module_hook(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    layer.register_full_backward_hook(lambda module, grad_in, grad_out: (2 * grad_in[0],))
    return layer(x).tanh()


def _forward_hook(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    layer.register_forward_hook(lambda module, args, out: out * args[0].sum())
    return layer(x)


def _autocast(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return layer(x.float()).float() * 2


def _attention(q: Tensor, k: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, q)


def _saved_tensor_hooks(x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        return (x.sin() * x).cumsum(0)


KINDS: dict[str, Case] = {
    "data_dependent_if": (data_dependent_if, (value(4),)),
    "while_loop": (while_loop, (value(4),)),
    "in_place_writes": (in_place_writes, (value(4),)),
    "gru": (_rnn, (value(2, 3, 3),)),
    "conv_pool": (_conv, (value(1, 1, 6, 6),)),
    "dropout": (lambda x: nn.functional.dropout(x.sin(), 0.5), (value(8),)),
    "batch_norm_train": (_batch_norm, (value(4, 3),)),
    "old_style_function": (lambda x: OldStyle.apply(x) * x, (value(4),)),
    "new_style_function": (lambda x: NewStyle.apply(x) * x, (value(4),)),
    "function_through_numpy": (lambda x: ThroughNumpy.apply(x) * x, (value(4),)),
    "function_in_place_backward": (lambda x: InPlaceBackward.apply(x) * x, (value(4),)),
    "function_branch_in_backward": (lambda x: BranchInBackward.apply(x) + x, (value(4),)),
    "custom_op": (lambda x: cube(x).cumsum(0), (value(4),)),
    "checkpoint": (
        lambda x: checkpoint(lambda y: y.sin() * y, x, use_reentrant=False).cumsum(0),
        (value(4),),
    ),
    "saved_tensor_hooks": (_saved_tensor_hooks, (value(4),)),
    "module_backward_hook": (_module_hook, (value(2, 4),)),
    "module_forward_hook": (_forward_hook, (value(2, 4),)),
    "tensor_hook": (tensor_hook, (value(4),)),
    "tensor_hook_branch": (branch_in_tensor_hook, (value(4),)),
    "autocast": (_autocast, (value(2, 4),)),
    "attention": (_attention, (value(1, 2, 3, 4), value(1, 2, 3, 4, seed=1))),
    "fft": (lambda x: torch.fft.irfft(torch.fft.rfft(x) * 2j, n=6), (value(6),)),
    "sort_and_topk": (lambda x: (x.sort().values * x, x.topk(2).values), (value(5),)),
    "scatter_gather": (
        lambda x: torch.zeros(6, dtype=x.dtype).index_add(0, torch.tensor([0, 2, 2, 5]), x.exp()),
        (value(4),),
    ),
    "no_grad_inside": (no_grad_inside, (value(4),)),
}

# The four that torch cannot batch; the row loop answers and says so.
LOOPED = {
    "function_through_numpy",
    "function_in_place_backward",
    "function_branch_in_backward",
    "tensor_hook_branch",
}
