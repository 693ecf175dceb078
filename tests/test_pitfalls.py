"""Every way users are known to get a wrong or missing Jacobian from torch, as a test.

The first part holds for twenty-five kinds of graph (``graphs``); the second goes through the
pitfalls one by one and checks what a good library does about each.
"""

from __future__ import annotations

import collections
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchjac
from graphs import KINDS, LOOPED, OldStyle
from laws import PLANS, check_both, leaf, oracle, oracle_jacobian, quiet, same, under_plan, value
from torchjac.testing import force_plan


@pytest.mark.parametrize("kind", KINDS)
def test_kind_of_graph(kind: str) -> None:
    """Both entry points equal the row loop on every kind of graph."""
    f, args = KINDS[kind]
    check_both(f, *args, seed=3)


@pytest.mark.parametrize("kind", KINDS)
def test_kind_of_graph_keeps_its_graph(kind: str) -> None:
    """create_graph=True gives the same values on every kind of graph."""
    f, args = KINDS[kind]
    leaves = tuple(x.clone().requires_grad_() for x in args)
    torch.manual_seed(3)
    outputs = f(*leaves)
    with quiet():
        got = torchjac.jac(outputs, leaves, create_graph=True)
    same(got, oracle(outputs, leaves))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("mode", "chunk"), PLANS)
def test_kind_of_graph_under_every_plan(kind: str, mode: str, chunk: int) -> None:
    """A plan that runs is right; a plan that cannot run says why."""
    f, args = KINDS[kind]

    def seeded(*xs: Tensor) -> Any:
        torch.manual_seed(3)
        return f(*xs)

    argnums = tuple(range(len(args)))
    got = under_plan(mode, chunk, lambda: torchjac.jacobian(seeded, argnums)(*args))
    if got is not None:
        same(got, oracle_jacobian(seeded, argnums)(*args))


@pytest.mark.parametrize("kind", sorted(LOOPED))
def test_kind_that_cannot_be_batched_is_recorded_as_a_loop(kind: str) -> None:
    """The fallback is never silent: the record says loop and holds torch's reason."""
    f, args = KINDS[kind]
    leaves = tuple(x.clone().requires_grad_() for x in args)
    with quiet():
        torchjac.jac(f(*leaves), leaves)
    record = torchjac.last_run()
    assert record.chunk == 1
    assert record.refusals


def test_rows_summed_by_grad() -> None:
    """The question this library answers: four rows, not four times their sum."""
    q = torch.tensor([1.0, 2.0], requires_grad=True)
    x = torch.cat([2 * q, 4 * q * q], -1)
    summed = torch.autograd.grad([x[i : i + 1] for i in range(4)], [q] * 4, retain_graph=True)
    assert all(g.tolist() == [10.0, 18.0] for g in summed)
    expected = [[2.0, 0.0], [0.0, 2.0], [8.0, 0.0], [0.0, 16.0]]
    assert torchjac.jac(x, q).tolist() == expected
    assert torchjac.jacobian(lambda q: torch.cat([2 * q, 4 * q * q], -1))(q).tolist() == expected


def test_output_computed_before_warns() -> None:
    """jacobian(lambda x: y, x): zeros, as in torch.func, but audible."""
    x = leaf(3)
    y = x.sin()
    with pytest.warns(torchjac.UnusedInputWarning, match=r"args\[0\]"):
        J = torchjac.jacobian(lambda x: y)(x)
    same(J, torch.zeros(3, 3, dtype=torch.float64))
    with pytest.raises(torchjac.UnusedInputError):
        torchjac.jacobian(lambda x: y, strict=True)(x)
    same(torchjac.jac(y, x), y.new_zeros(3, 3) + torch.diag(x.detach().cos()))


def test_closure_over_a_parameter_warns() -> None:
    """A closure over layer.weight sees the layer's own weight, not the argument."""
    layer = nn.Linear(3, 2).double()
    x = value(3)
    with pytest.warns(torchjac.UnusedInputWarning) as caught:
        J = torchjac.jacobian(lambda weight: layer(x))(layer.weight)
    assert len(caught) == 1
    assert J.shape == (2, 2, 3)
    assert not J.any()
    with pytest.raises(torchjac.UnusedInputError):
        torchjac.jacobian(lambda weight: layer(x), strict=True)(layer.weight)
    y = layer(x)
    same(torchjac.jac(y, layer.weight), oracle(y, layer.weight))


def test_batched_grads_need_no_basis_from_the_caller() -> None:
    """is_grads_batched misuse: outputs of any shape go in as they are."""
    x = leaf(2, 3)
    y = x.unsqueeze(-1) * x.sin().sum()
    same(torchjac.jac(y, x), oracle(y, x))


def test_rows_without_retain() -> None:
    """The graph survives a read; retain_graph=False frees it with the last pass."""
    x = leaf(3)
    y = x.sin() * x.exp()
    expected = oracle(y, x)
    same(torchjac.jac(y, x), expected)
    same(torchjac.jac(y, x, retain_graph=False), expected)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), x)


@pytest.mark.parametrize("chunk", [1, 2])
def test_free_graph_only_with_the_last_chunk(chunk: int) -> None:
    """retain_graph=False holds the graph until every chunk has passed, for several outputs."""
    x = leaf(3)
    h = x.sin() * x
    outputs = {"a": h.exp(), "b": h.cumsum(0)}
    expected = oracle(outputs, x)
    with force_plan(mode="reverse", chunk=chunk):
        same(torchjac.jac(outputs, x, retain_graph=False), expected)


def test_unused_input_is_named() -> None:
    """The error says which input, by its place in the pytree."""
    Pair = collections.namedtuple("Pair", "left right")
    used, unused = leaf(2), leaf(2, seed=1)
    y = used.sin()
    cases = {
        r"inputs\['w'\]\[0\]": {"w": [unused], "x": used},
        r"inputs\[1\]": (used, unused),
        r"inputs\.right": Pair(used, unused),
    }
    for place, inputs in cases.items():
        with pytest.raises(torchjac.UnusedInputError, match=place):
            torchjac.jac(y, inputs)
        got = torchjac.jac(y, inputs, allow_unused=True)
        same(got, oracle(y, inputs))


def test_input_without_grad_is_named() -> None:
    """An input or output outside of any graph: an error in words, zeros where allowed."""
    x, plain = leaf(2), value(2)
    with pytest.raises(torchjac.UnusedInputError, match=r"inputs\[1\]"):
        torchjac.jac(x.sin(), (x, plain))
    same(torchjac.jac(x.sin(), (x, plain), allow_unused=True), oracle(x.sin(), (x, plain)))
    with pytest.raises(torchjac.UnusedInputError):
        torchjac.jac(plain.sin(), x)
    same(torchjac.jac(plain.sin(), x, allow_unused=True), plain.new_zeros(2, 2))


def test_one_warning_for_several_unused_inputs_names_them() -> None:
    """One warning, not one per input; a zero block among several is quiet."""
    x, y, z = value(2), value(2, seed=1), value(2, seed=2)
    with pytest.warns(torchjac.UnusedInputWarning) as caught:
        torchjac.jacobian(lambda x, y, z: x * 2, (0, 1, 2))(x, y, z)
    assert len(caught) == 1
    assert "args[1]" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torchjac.jacobian(lambda x, y: (x * 2, y * 3), (0, 1))(x, y)


def test_if_and_item_are_not_vmapped() -> None:
    """Control flow on data and .item() work: the user's forward is not batched by default."""

    def f(x: Tensor) -> Tensor:
        steps = int(x.abs().sum().item()) % 3 + 1
        return torch.stack([x * k for k in range(steps)]).sum(0) if x[0] > 0 else x.sin()

    for seed in range(4):
        check_both(f, value(3, seed=seed))


def test_in_place_into_zeros() -> None:
    """Writes into a fresh buffer, boolean masks included."""

    def f(b: Tensor) -> Tensor:
        out = torch.zeros(3, 3, dtype=b.dtype)
        out[:, 0] = b
        b = b.clone()
        b[b < 0] = 0
        out[1] += b
        return out

    check_both(f, value(3))


def test_dropout_draws_one_mask() -> None:
    """One forward, one mask: value and Jacobian belong together."""
    x = torch.ones(64, dtype=torch.float64)
    f = torchjac.jacobian(lambda x: nn.functional.dropout(x, 0.5))
    out, J = f.value_and(x)
    same(J, torch.diag(out))
    assert 0 < int((out == 0).sum()) < 64


def test_batch_norm_in_training_mode() -> None:
    """Works unbatched and updates the running statistics once; refuses batched=True."""
    net = nn.BatchNorm1d(3).double().train()
    x = value(5, 3)
    J = torchjac.jacobian(net)(x)
    assert int(net.num_batches_tracked) == 1
    same(J, oracle_jacobian(nn.BatchNorm1d(3).double().train())(x))
    with pytest.raises(torchjac.CoupledBatchError):
        torchjac.jacobian(net, batched=True)(x)


def test_old_style_function_that_jacrev_refuses() -> None:
    """The graph route handles what torch.func does not."""
    x = value(3)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.jacrev(OldStyle.apply)(x)
    same(torchjac.jacobian(OldStyle.apply)(x), torch.diag(x.cos()))


def test_forward_mode_gap_falls_back() -> None:
    """n much smaller than m asks for forward mode; an op without a jvp must not stop the answer."""

    def f(x: Tensor) -> Tensor:
        q = (x * torch.linspace(0, 1, 64, dtype=x.dtype)).reshape(1, 1, 16, 4)
        return nn.functional.scaled_dot_product_attention(q, q, q)

    x = value(1)
    with quiet():
        same(torchjac.jacobian(f)(x), oracle_jacobian(f)(x))
        wide = torchjac.jacobian(lambda x: OldStyle.apply(x.expand(200)))
        same(wide(x), x.cos().expand(200).reshape(200, 1))


def test_no_grad_inside_means_reverse() -> None:
    """jacfwd sees through no_grad, reverse does not: reverse is the answer in every shape."""

    def f(x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.exp()
        return (x * scale).expand(50, *x.shape)

    x = value(1)
    expected = x.exp().expand(50, 1).reshape(50, 1, 1)
    for _ in range(3):  # planners that measure decide later
        same(torchjac.jacobian(f)(x), expected)


def test_detach_inside_means_reverse() -> None:
    """A detached path carries nothing, in every mode."""
    x = value(2)
    for _ in range(3):
        J = torchjac.jacobian(lambda x: (x * x.detach()).repeat(40))(x)
        same(J, torch.diag(x).repeat(40, 1))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_is_refused(dtype: torch.dtype) -> None:
    """Complex in, complex out, complex on one side: refused with the dtype in the message."""
    z = torch.randn(3, dtype=dtype, requires_grad=True)
    x = leaf(3)
    pairs = [(z * 2, z), (z.abs(), z), (torch.complex(x, x), x)]
    for out, inp in pairs:
        with pytest.raises(torchjac.DtypeError, match="complex"):
            torchjac.jac(out, inp)
    for f, arg in [(lambda z: z * 2, z), (torch.abs, z), (lambda x: torch.complex(x, x), x)]:
        with pytest.raises(torchjac.DtypeError, match="complex"):
            torchjac.jacobian(f)(arg.detach())


def test_complex_inside_is_fine() -> None:
    """Real in, real out, complex arithmetic between."""
    check_both(lambda x: torch.view_as_real(torch.fft.fft(x) ** 2), value(4))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_integer_output_or_input_is_refused(dtype: torch.dtype) -> None:
    """Never zeros for integers."""
    x = leaf(3)
    with pytest.raises(torchjac.DtypeError, match=str(dtype).removeprefix("torch.")):
        torchjac.jac(x.to(dtype), x, allow_unused=True)
    with pytest.raises(torchjac.DtypeError):
        torchjac.jacobian(lambda x: x.to(dtype))(x)
    with pytest.raises(torchjac.DtypeError):
        torchjac.jac(x, torch.ones(3, dtype=dtype), allow_unused=True)
    with pytest.raises(torchjac.DtypeError):
        torchjac.jacobian(lambda i: i * 0.5)(torch.ones(3, dtype=dtype))
    with pytest.raises(TypeError):
        torchjac.jac({"a": x.sin(), "b": x.argmax()}, x)


def test_dtype_of_the_result_is_the_inputs() -> None:
    """f32 in, f64 out gives f32, whatever mode the shape suggests."""
    for n, m in [(1, 60), (60, 1), (4, 4)]:
        x = value(n, dtype=torch.float32)
        weight = value(m, n)

        def f(x: Tensor, weight: Tensor = weight) -> Tensor:
            return (weight @ x.double()).sin()

        J = torchjac.jacobian(f)(x)
        assert J.dtype == torch.float32
        same(J, oracle_jacobian(f)(x))


def test_no_memory_creep() -> None:
    """The result has no graph though the module's parameters require grad."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(3)
    J = torchjac.jacobian(net)
    out, block = J.value_and(x)
    for t in (J(x), block, out, torchjac.jac(net(x), list(net.parameters()))[0]):
        assert not t.requires_grad
        assert t.grad_fn is None
    assert all(p.grad is None for p in net.parameters())


def test_nan_at_zero_stays() -> None:
    """sqrt at 0 is NaN as in torch; norm at 0 is 0; one does not spoil the other."""
    x = torch.zeros(3, dtype=torch.float64)
    assert torchjac.jacobian(lambda x: (x * x).sum().sqrt())(x).isnan().all()
    assert not torchjac.jacobian(torch.linalg.norm)(x).any()
    check_both(lambda x: torch.stack([(x * x).sum().sqrt(), x.norm(), x.sum()]), x)


@pytest.mark.parametrize(("mode", "chunk"), PLANS)
def test_infinite_derivative_of_one_output_stays_there(mode: str, chunk: int) -> None:
    """A zero cotangent times infinity is NaN: rows of one output must not pass through another."""

    def f(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x.sqrt(), x * 2, (x * x).sum().sqrt()

    x = torch.zeros(2, dtype=torch.float64)
    expected = oracle_jacobian(f)(x)
    assert expected[1].isfinite().all()
    same(torchjac.jacobian(f)(x), expected)
    got = under_plan(mode, chunk, lambda: torchjac.jacobian(f)(x))
    if got is not None:
        same(got, expected)
    leaf_x = x.clone().requires_grad_()
    same(torchjac.jac(f(leaf_x), leaf_x), expected)
