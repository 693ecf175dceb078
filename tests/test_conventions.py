"""``jacobian`` follows ``torch.func.jacrev``: arguments, nesting, shapes, dtypes, refusals."""

from __future__ import annotations

import contextlib
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import torchjac
from laws import leaf, oracle, oracle_jacobian, quiet, same, value

Pair = namedtuple("Pair", "left right")
X, Y, Z = value(3), value(2, 3, seed=1), value(seed=2)


def three(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Depends on all of its arguments, with different shapes."""
    return (y @ x) * z.exp() + x.sum()


def tree(p: dict[str, Any]) -> tuple[Any, ...]:
    """A dict of lists and a named tuple in, a nest out."""
    a, (b, c) = p["a"][0], p["pair"]
    return Pair(a * b, {"s": (c * a).sum(), "l": [b.sin() * c, a + c]}), (a * b * c,)


@pytest.mark.parametrize(
    "argnums", [0, 1, 2, -1, -3, (0,), (1,), (-1,), (0, 1), (2, 0), (0, 1, 2), (-2, 0)]
)
def test_argnums(argnums: int | tuple[int, ...]) -> None:
    """int, negative, tuple, tuple of one, in any order."""
    same(torchjac.jacobian(three, argnums)(X, Y, Z), jacrev(three, argnums)(X, Y, Z))


@pytest.mark.parametrize("argnums", [0, (0,), (0, 1)])
def test_pytrees_in_and_out(argnums: int | tuple[int, ...]) -> None:
    """Dict, list, tuple, named tuple, nested."""
    p = {"a": [value(3)], "pair": Pair(value(3, seed=1), value(3, seed=2))}

    def f(p: dict[str, Any], q: tuple[Tensor, ...]) -> Any:
        return tree(p), q[0] * p["a"][0]

    q = (value(1),)
    same(torchjac.jacobian(f, argnums)(p, q), jacrev(f, argnums)(p, q))


@pytest.mark.parametrize(
    "out", [tuple, list, lambda ys: {"k": ys[0]}, lambda ys: Pair(*ys), OrderedDict]
)
def test_nesting_of_outputs(out: Callable[[Any], Any]) -> None:
    """Every container, also one that holds a single output."""

    def f(x: Tensor) -> Any:
        ys = (x.sin(), x.sum())
        return out([("a", ys[0]), ("b", ys[1])]) if out is OrderedDict else out(ys)

    same(torchjac.jacobian(f)(X), jacrev(f)(X))
    x = leaf(3)
    same(torchjac.jac(f(x), x), jacrev(f)(x.detach()))
    same(torchjac.jac(f(x), {"in": [x]}), oracle(f(x), {"in": [x]}))


def test_empty_containers() -> None:
    """An empty place in a tree stays an empty place."""
    x = leaf(2)
    same(
        torchjac.jac({"y": x.sin(), "none": []}, (x, {})),
        oracle({"y": x.sin(), "none": []}, (x, {})),
    )


@pytest.mark.parametrize("container", [tuple, list])
def test_no_outputs_at_all(container: Callable[[], Any]) -> None:
    """No output: an empty nest or a clear error, not a crash of another kind."""
    with contextlib.suppress(torchjac.ArgumentError):
        same(torchjac.jac(container(), leaf(2), allow_unused=True), container())


def test_has_aux() -> None:
    """(J, aux), with aux as f gave it, detached; value_and gives ((out, aux), J)."""

    def f(x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return x.sin(), {"double": x * 2, "note": "kept", "n": 3}

    J, aux = torchjac.jacobian(f, has_aux=True)(X)
    want_J = jacrev(lambda x: f(x)[0])(X)
    same(J, want_J)
    assert aux["note"] == "kept"
    assert aux["n"] == 3
    same(aux["double"], X * 2)
    assert not aux["double"].requires_grad
    (out, aux), J = torchjac.jacobian(f, has_aux=True).value_and(X)
    same(out, X.sin())
    same(J, want_J)
    assert aux["n"] == 3


def test_aux_does_not_count_as_output() -> None:
    """An input that only aux depends on is unused."""
    with pytest.warns(torchjac.UnusedInputWarning):
        torchjac.jacobian(lambda x, y: (x * 1, y * 2), 1, has_aux=True)(X, X)


@pytest.mark.parametrize(
    "out", [lambda x: x, lambda x: (x, x, x), lambda x: [x, x], lambda x: (x,)]
)
def test_aux_missing(out: Callable[[Tensor], Any]) -> None:
    """has_aux=True and anything but a pair: an error in words."""
    with pytest.raises(torchjac.ArgumentError, match="aux"):
        torchjac.jacobian(lambda x: out(x * 2), has_aux=True)(X)


def test_keyword_and_other_arguments() -> None:
    """Keyword arguments, Python numbers, strings, None and integer tensors pass through."""

    def f(x: Tensor, power: int, index: Tensor, how: str = "sin", *, scale: Any = None) -> Tensor:
        y = getattr(torch, how)(x[index]) ** power
        return y if scale is None else y * scale["s"]

    index = torch.tensor([2, 0])
    same(torchjac.jacobian(f)(X, 2, index), jacrev(f)(X, 2, index))
    got = torchjac.jacobian(f)(X, 3, index, how="cos", scale={"s": Z})
    same(got, oracle_jacobian(f)(X, 3, index, how="cos", scale={"s": Z}))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0), (0, 3), (1, 1), (3, 1, 2)])
def test_shapes_of_input(shape: tuple[int, ...]) -> None:
    """Zero-dimensional, zero-size and size-one inputs."""
    x = value(*shape)
    for f in (torch.sin, torch.sum, lambda x: x.reshape(-1)[:, None] * x.reshape(-1)):
        same(torchjac.jacobian(f)(x), jacrev(f)(x))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0), (3, 1)])
def test_shapes_of_output(shape: tuple[int, ...]) -> None:
    """The same of outputs, from one and from several inputs."""

    def f(x: Tensor, y: Tensor) -> Tensor:
        return (x.sum() * y).expand(shape) * torch.ones(shape, dtype=x.dtype)

    same(torchjac.jacobian(f, (0, 1))(X, Z), oracle_jacobian(f, (0, 1))(X, Z))
    x, y = leaf(3), leaf(seed=1)
    same(torchjac.jac(f(x, y), (x, y)), oracle(f(x, y), (x, y)))


def test_same_tensor_as_two_arguments() -> None:
    """f(x, x) has two Jacobians, not one that is their sum."""

    def f(a: Tensor, b: Tensor) -> Tensor:
        return a * b.sin()

    for argnums in (0, 1, (0, 1)):
        same(torchjac.jacobian(f, argnums)(X, X), jacrev(f, argnums)(X, X))
        x = leaf(3)
        same(torchjac.jacobian(f, argnums)(x, x), jacrev(f, argnums)(X, X))
    same(
        torchjac.jacobian(lambda d: d["a"] * d["b"])({"a": X, "b": X}),
        {"a": torch.diag(X), "b": torch.diag(X)},
    )


def test_same_tensor_twice_in_jac() -> None:
    """In a graph it is one tensor: both places hold its whole Jacobian."""
    x = leaf(3)
    y = x * x.sin()
    same(torchjac.jac(y, (x, x)), oracle(y, (x, x)))
    same(torchjac.jac((y, y), x), oracle((y, y), x))


def test_views_of_one_tensor_as_arguments() -> None:
    """Arguments that share memory are independent, as in jacrev."""
    base = value(4)
    args = (base[:3], base[1:], base)

    def f(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return a * b + c[0]

    same(torchjac.jacobian(f, (0, 1, 2))(*args), jacrev(f, (0, 1, 2))(*args))


def test_an_argument_that_is_also_closed_over() -> None:
    """The closed-over tensor is a constant even if it requires grad itself."""
    x = leaf(3)
    f = torchjac.jacobian(lambda a: a * x)
    same(f(x), torch.diag(x.detach()))


@pytest.mark.parametrize(
    "argnums", [3, -4, (0, 3), (0, 0), (0, -3), (), "0", 0.5, [0], (0, "1"), True]
)
def test_bad_argnums(argnums: Any) -> None:
    """Out of range, repeated, empty or of another type: an error when built or when called."""
    with pytest.raises((torchjac.ArgumentError, TypeError)):
        torchjac.jacobian(three, argnums)(X, Y, Z)


def test_bad_argnums_says_what_it_got() -> None:
    """Expected and got."""
    with pytest.raises(torchjac.ArgumentError, match="3"):
        torchjac.jacobian(three, 3)(X, Y, Z)
    with pytest.raises(torchjac.ArgumentError):
        torchjac.jacobian(lambda *, x: x)(x=X)


@pytest.mark.parametrize("bad", [1.0, None, "x", [X, 2.0], {"a": X, "b": "s"}])
def test_non_tensor_leaf(bad: Any) -> None:
    """A differentiated argument with something else in it is named."""
    with pytest.raises(torchjac.ArgumentError, match=r"args\[0\]"):
        torchjac.jacobian(lambda x: X * 2)(bad)
    with pytest.raises(torchjac.ArgumentError):
        torchjac.jac(leaf(2).sin(), bad)


@pytest.mark.parametrize("bad", [1.0, None, "x", (X, 2.0), {"a": X, "b": "s"}])
def test_non_tensor_output(bad: Any) -> None:
    """An output with something else in it is named."""
    with pytest.raises(torchjac.ArgumentError, match="output"):
        torchjac.jacobian(lambda x: bad)(X)
    with pytest.raises(torchjac.ArgumentError, match="output"):
        torchjac.jac(bad, leaf(3), allow_unused=True)


def test_bad_options() -> None:
    """Layout and budget are checked before any work is done."""
    x = leaf(3)
    for options in ({"layout": torch.sparse_bsr}, {"layout": "dense"}, {"memory_budget": -1}):
        with pytest.raises((torchjac.ArgumentError, TypeError)):
            torchjac.jac(x.sin(), x, **options)
        with pytest.raises((torchjac.ArgumentError, TypeError)):
            torchjac.jacobian(torch.sin, **options)(X)


def test_functional_call_with_dicts() -> None:
    """Parameter Jacobians: a dict in, a dict out; a buffer next to them passes through."""
    torch.manual_seed(0)
    net = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 2))
        .double()
        .eval()
    )
    params, buffers = dict(net.named_parameters()), dict(net.named_buffers())
    x = value(5, 3)

    def f(params: dict[str, Tensor]) -> dict[str, Tensor]:
        y = functional_call(net, (params, buffers), (x,))
        return {"y": y, "loss": y.square().mean()}

    detached = {k: p.detach() for k, p in params.items()}
    same(torchjac.jacobian(f)(params), jacrev(f)(detached))
    same(torchjac.jac(f(params), params), jacrev(f)(detached))
    assert not any(block.requires_grad for block in torchjac.jacobian(f)(params)["y"].values())


@pytest.mark.parametrize(("n", "m"), [(1, 40), (40, 1), (7, 7), (1, 1)])
@pytest.mark.parametrize(
    ("tin", "tout"),
    [
        ("float32", "float64"),
        ("float64", "float32"),
        ("bfloat16", "float32"),
        ("float16", "float64"),
    ],
)
def test_dtypes(n: int, m: int, tin: str, tout: str) -> None:
    """A block has its input's dtype, whatever shape and mode."""
    x, weight = value(n).to(getattr(torch, tin)), value(m, n).to(getattr(torch, tout))

    def f(x: Tensor) -> Tensor:
        return (weight @ x.to(weight.dtype)).tanh()

    tolerance = {"rtol": 2e-2, "atol": 2e-2} if tin.endswith("16") else {}
    same(torchjac.jacobian(f)(x), oracle_jacobian(f)(x), **tolerance)


def test_mixed_dtypes_in_one_call() -> None:
    """Blocks of one Jacobian can have different dtypes."""
    x, y = value(2, dtype=torch.float32), value(3)

    def f(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x.double().sum() * y, x * y.sum().float()

    same(torchjac.jacobian(f, (0, 1))(x, y), oracle_jacobian(f, (0, 1))(x, y))


def test_hooks_on_an_argument_do_not_run() -> None:
    """The caller's tensor is not part of the inner graph; its .grad stays empty."""
    x = leaf(3)
    x.register_hook(lambda g: 1 / 0)
    with quiet():
        same(torchjac.jacobian(torch.sin)(x), torch.diag(x.detach().cos()))
    assert x.grad is None


def test_a_jacobian_is_reusable() -> None:
    """The same object with other values, shapes and dtypes: nothing is stale."""

    def square_sum(x: Tensor) -> Tensor:
        return (x * x).cumsum(0) if x.dim() else x * x

    f = torchjac.jacobian(square_sum)
    for x in (
        value(3),
        value(3, seed=1),
        value(5),
        value(2, 2),
        value(3).float(),
        value(),
        value(0),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            same(f(x), oracle_jacobian(square_sum)(x))
