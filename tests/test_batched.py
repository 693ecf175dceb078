"""``batched=True``: the stacked per-sample Jacobians, or an error that says what is coupled."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import torchjac
from graphs import KINDS
from laws import leaf, oracle, oracle_jacobian, quiet, same, value


def per_sample(f: Callable[..., Any], argnums: int | tuple[int, ...], *args: Any) -> Any:
    """The definition: f on a batch of one sample at a time, stacked."""
    size = pytree.tree_leaves(args)[0].shape[0]
    blocks = []
    for i in range(size):
        one = pytree.tree_map(lambda x, i=i: x[i : i + 1], args)
        J = oracle_jacobian(f, argnums, batched=True)(*one)
        blocks.append(J)
    return pytree.tree_map(lambda *bs: torch.cat(bs), *blocks)


def net(
    *sizes: int, dtype: torch.dtype = torch.float64, activation: Any = nn.Tanh
) -> nn.Sequential:
    """A multilayer perceptron with fixed weights."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1]).to(dtype)


UNCOUPLED: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "elementwise": (lambda x: x.sin() * x, (value(4),)),
    "scalar per sample": (lambda x: x.square().sum(-1), (value(4, 3),)),
    "mlp": (net(3, 8, 2), (value(5, 3),)),
    "matrix samples": (lambda x: x @ x.mT, (value(3, 2, 3),)),
    "two arguments": (lambda x, y: (x * y[:, :1]).cumsum(-1), (value(4, 3), value(4, 2, seed=1))),
    "more out than in": (lambda x: x.exp().repeat(1, 7), (value(4, 2),)),
    "one input, many outputs": (lambda x: x.sin() * torch.arange(40.0).double(), (value(6, 1),)),
    "attention in a sample": (
        lambda x: nn.functional.scaled_dot_product_attention(x, x, x),
        (value(3, 2, 4),),
    ),
    "softmax over features": (lambda x: x.softmax(-1), (value(4, 5),)),
    "convolution": (
        lambda x: nn.functional.conv1d(x, torch.ones(2, 1, 3).double()),
        (value(3, 1, 5),),
    ),
    "one batch": (net(3, 4, 2), (value(1, 3),)),
    "empty batch": (net(3, 4, 2), (value(0, 3),)),
    "empty features": (lambda x: x.exp(), (value(3, 0),)),
    "empty output": (lambda x: x.exp()[:, :0], (value(3, 2),)),
    "permuted storage": (lambda x: x.sin() * x.sum(-1, keepdim=True), (value(3, 4).t(),)),
    "expanded batch": (lambda x: x.sin() * x, (value(3).expand(4, 3),)),
}


# Of three axes torch takes its fused kernel for the CPU since 2.14: it has no batching rule.
@pytest.mark.filterwarnings("ignore:torchjac. torch has no batching rule for aten.._scaled_dot")
@pytest.mark.parametrize("case", UNCOUPLED)
def test_equals_the_stacked_samples(case: str) -> None:
    """Both entry points; the definition is one sample at a time."""
    f, args = UNCOUPLED[case]
    argnums = tuple(range(len(args)))
    if args[0].shape[0]:
        expected = per_sample(f, argnums, *args)
    else:
        expected = oracle_jacobian(f, argnums, batched=True)(*args)
    same(torchjac.jacobian(f, argnums, batched=True)(*args), expected)
    leaves = tuple(x.clone().requires_grad_() for x in args)
    same(torchjac.jac(f(*leaves), leaves, batched=True), expected)


def test_equals_vmap_of_jacrev() -> None:
    f, x = net(3, 64, 64, 5), value(128, 3)
    same(torchjac.jacobian(f, batched=True)(x), vmap(jacrev(f))(x))


def test_pytrees() -> None:
    """Dicts in and out; every leaf carries the batch axis."""

    def f(p: dict[str, Tensor], q: Tensor) -> dict[str, Any]:
        return {"a": (p["x"] * q[:, None]).sin(), "b": [p["x"].sum(-1), p["y"] * q]}

    p, q = {"x": value(4, 3), "y": value(4, seed=1)}, value(4, seed=2)
    same(torchjac.jacobian(f, (0, 1), batched=True)(p, q), per_sample(f, (0, 1), p, q))
    same(torchjac.jacobian(f, batched=True)(p, q), per_sample(f, 0, p, q))


def test_constant_arguments_need_no_batch_axis() -> None:
    """Only what is differentiated has to be batched."""

    def f(x: Tensor, w: Tensor, k: int) -> Tensor:
        return (x @ w).sin() * k

    x, w = value(4, 3), value(3, 2, seed=1)
    same(torchjac.jacobian(f, batched=True)(x, w, 2), vmap(jacrev(f), (0, None, None))(x, w, 2))


def test_passes_do_not_grow_with_the_batch() -> None:
    """The cost is `out` passes in total."""
    f = net(3, 8, 5)
    for size in (2, 64):
        record = torchjac.jacobian(f, batched=True).explain(value(size, 3))
        assert record.batch == size
        assert record.passes <= 5 + 1  # and one for the probe, if it is counted


def test_value_and_and_create_graph() -> None:
    f, x = net(3, 8, 2), leaf(4, 3)
    out, J = torchjac.jacobian(f, batched=True, create_graph=True).value_and(x)
    same(out, f(x))
    got = torch.autograd.grad(J.square().sum(), [x, *f.parameters()], allow_unused=True)
    full = oracle(f(x), x, batched=True, create_graph=True)
    want = torch.autograd.grad(full.square().sum(), [x, *f.parameters()], allow_unused=True)
    for g, w in zip(got, want, strict=True):
        if g is not None and w is not None:
            same(g, w)


def test_per_sample_parameters_by_expansion() -> None:
    """Parameters repeated per sample are a batched input."""
    module, x = net(3, 4, 2), value(5, 3)
    params = {k: p.detach() for k, p in module.named_parameters()}

    def f(p: dict[str, Tensor]) -> Tensor:
        return vmap(lambda p, x: functional_call(module, p, (x,)))(p, x)

    repeated = {k: p.expand(5, *p.shape) for k, p in params.items()}
    got = torchjac.jacobian(f, batched=True)(repeated)
    want = {k: v for k, v in jacrev(lambda p: functional_call(module, p, (x,)))(params).items()}
    same(got, want)


def _batch_attention(x: Tensor) -> Tensor:
    return (x @ x.T).softmax(-1) @ x


def _one_pair(x: Tensor) -> Tensor:
    """Only sample 1 depends on another one, on sample 0, in one entry."""
    out = x.sin() * 2
    out[1, -1] = out[1, -1] + x[0, 0]
    return out


COUPLED: dict[str, Callable[[Tensor], Tensor]] = {
    "batch norm": lambda x: nn.BatchNorm1d(x.shape[1]).to(x.dtype).train()(x),
    "attention over the batch": _batch_attention,
    "centered": lambda x: x - x.mean(0),
    "cumsum over the batch": lambda x: x.cumsum(0),
    "roll over the batch": lambda x: x.roll(1, 0),
    "flip of the batch": lambda x: x.flip(0),
    "one pair": _one_pair,
    "last from first": lambda x: torch.cat([x[:-1], x[-1:] * x[:1]]),
    "sorted": lambda x: x.sort(0).values,
    "cancels in the row sum": lambda x: x + x.roll(1, 0) - x.roll(1, 0).flip(1),
    "cancels over inputs": lambda x: x * 2 + (x[:1, :1] - x[:1, 1:2]),
    "scaled by the norm": lambda x: x / x.norm(),
    "matrix over the batch": lambda x: torch.ones(x.shape[0], x.shape[0]).to(x.dtype).tril() @ x,
}


@pytest.mark.parametrize("entry", ["jac", "jacobian"])
@pytest.mark.parametrize("size", [2, 3, 17, 256])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", COUPLED)
def test_coupling_is_an_error(case: str, dtype: torch.dtype, size: int, entry: str) -> None:
    """Every kind of coupling, however few samples it joins, in both precisions."""
    f, x = COUPLED[case], leaf(size, 3, dtype=dtype)
    entries: dict[str, Callable[[], Any]] = {
        "jac": lambda: torchjac.jac(f(x), x, batched=True),
        "jacobian": lambda: torchjac.jacobian(f, batched=True)(x.detach()),
    }
    with pytest.raises(torchjac.CoupledBatchError, match=r"\S"):
        entries[entry]()


@pytest.mark.parametrize("seed", range(20))
def test_one_pair_is_always_detected(seed: int) -> None:
    """A probe is random; a single coupled pair among many samples has to show in every run."""
    torch.manual_seed(seed)
    with pytest.raises(torchjac.CoupledBatchError):
        torchjac.jacobian(_one_pair, batched=True)(value(512, 4, seed=seed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weak_coupling_of_a_large_batch(dtype: torch.dtype) -> None:
    """BatchNorm over 4096 samples couples each pair by about 1/4096."""
    f = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    x = value(4096, 4, dtype=dtype)
    with pytest.raises(torchjac.CoupledBatchError):
        torchjac.jacobian(f.train(), batched=True)(x)
    one = jacrev(lambda x: f(x[None])[0])
    same(torchjac.jacobian(f.eval(), batched=True)(x), vmap(one)(x))


@pytest.mark.parametrize(
    ("dtype", "weight"), [(torch.float64, 1e-8), (torch.float32, 3e-2), (torch.float32, -1.0)]
)
def test_weak_coupling_of_one_pair(dtype: torch.dtype, weight: float) -> None:
    """A weight well above rounding is not lost among the large entries."""

    def f(x: Tensor) -> Tensor:
        out = x.sin() * 2
        return torch.cat([out[:1], out[1:2] + weight * x[:1], out[2:]])

    with pytest.raises(torchjac.CoupledBatchError):
        torchjac.jacobian(f, batched=True)(value(100, 3, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_coupling_next_to_a_large_derivative_is_detected(dtype: torch.dtype) -> None:
    """One sample with huge derivatives must not hide the coupling of two others."""

    def f(x: Tensor) -> Tensor:
        scale = torch.ones(len(x), 1, dtype=x.dtype)
        scale[7] = 1e6
        out = x.sin() * scale
        return torch.cat([out[:1], out[1:2] + x[:1], out[2:]])

    with pytest.raises(torchjac.CoupledBatchError):
        torchjac.jacobian(f, batched=True)(value(20, 3, dtype=dtype))


def test_coupling_says_what() -> None:
    """The message names the output and the input that are coupled, and the remedy."""
    x = {"a": value(4, 2), "b": value(4, 2, seed=1)}
    with pytest.raises(torchjac.CoupledBatchError, match=r"'b'"):
        torchjac.jacobian(
            lambda p: {"fine": p["a"] * 2, "bad": p["b"] - p["b"].mean(0)}, batched=True
        )(x)


@pytest.mark.parametrize("layers", [2, 8, 24])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.SiLU])
def test_no_false_alarm_for_deep_single_precision(layers: int, activation: Any) -> None:
    """Rounding is not coupling: different kernels, sums in another order, deep nets."""
    f = net(*[16] * layers, 3, dtype=torch.float32, activation=activation)
    for seed, size in enumerate((1, 2, 33, 512)):
        x = 100 * value(size, 16, dtype=torch.float32, seed=seed)
        same(torchjac.jacobian(f, batched=True)(x), vmap(jacrev(f))(x), rtol=1e-2, atol=1e-3)


def test_no_false_alarm_for_exact_zeros() -> None:
    """Dead ReLUs, a constant output, a zero block."""
    x = value(6, 3)
    cases: list[Callable[[Tensor], Any]] = [
        lambda x: (x - 100).relu(),
        lambda x: x * 0,
        lambda x: torch.cat([x, torch.ones_like(x)], -1),
        lambda x: (x * x[:, :1].detach().gt(0)).relu(),
    ]
    for f in cases:
        with quiet():
            same(torchjac.jacobian(f, batched=True)(x), per_sample(f, 0, x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_false_alarm_for_a_bad_sample(bad: float, dtype: torch.dtype) -> None:
    """NaN or infinity in one sample stays in that sample."""
    f, x = net(3, 8, 2, dtype=dtype), value(5, 3, dtype=dtype)
    x[2, 1] = bad
    J = torchjac.jacobian(f, batched=True)(x)
    good = [0, 1, 3, 4]
    same(J[good], vmap(jacrev(f))(x[good]))


def test_bad_derivative_in_one_sample_is_not_coupling() -> None:
    """sqrt at zero: an infinite derivative in one sample only."""
    x = torch.tensor([[1.0], [0.0], [4.0]], dtype=torch.float64)
    J = torchjac.jacobian(torch.sqrt, batched=True)(x)
    assert J[[0, 2]].flatten().tolist() == [0.5, 0.25]
    assert J[1].isinf().all()


def test_coupling_next_to_a_bad_sample_is_detected() -> None:
    """A NaN must not hide a real coupling of the others."""
    x = value(8, 3)
    x[5] = float("nan")
    with pytest.raises(torchjac.CoupledBatchError):
        torchjac.jacobian(lambda x: x.sin() + x[:1], batched=True)(x)


def test_batch_axes_are_checked() -> None:
    """Zero-dimensional, missing or different batch sizes: an error that names the place."""
    x, y = value(4, 3), value(5, 3, seed=1)
    with pytest.raises(torchjac.ArgumentError):
        torchjac.jacobian(lambda x: x.sum(), batched=True)(x)
    with pytest.raises(torchjac.ArgumentError):
        torchjac.jacobian(lambda x: x[:2], batched=True)(x)
    with pytest.raises(torchjac.ArgumentError):
        torchjac.jacobian(lambda x, y: x * y[:4], (0, 1), batched=True)(x, y)
    with pytest.raises(torchjac.ArgumentError):
        torchjac.jacobian(lambda x: x * 2, batched=True)(value())
    leaf_x = leaf(4, 3)
    with pytest.raises(torchjac.ArgumentError):
        torchjac.jac(leaf_x.sum(), leaf_x, batched=True)


@pytest.mark.parametrize(
    "kind",
    ["old_style_function", "function_through_numpy", "function_branch_in_backward", "custom_op"],
)
def test_kinds_of_graph(kind: str) -> None:
    """Elementwise kinds on a batch, looped where they cannot be batched."""
    f = {
        "custom_op": lambda x: torch.ops.torchjac_tests.cube(x) * x,
    }.get(kind, KINDS[kind][0])
    x = value(4, 2)
    with quiet():
        same(torchjac.jacobian(f, batched=True)(x), per_sample(f, 0, x))


def test_unused_input() -> None:
    x = value(4, 2)
    with pytest.warns(torchjac.UnusedInputWarning):
        J = torchjac.jacobian(lambda x: x.new_ones(4, 3), batched=True)(x)
    same(J, torch.zeros(4, 3, 2, dtype=torch.float64))
