"""Tensors that share memory, repeat, or lie oddly in it: outputs, inputs, and both at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import torchjac
from laws import check_both, leaf, oracle, oracle_jacobian, quiet, same, value


def _views_of_one(x: Tensor) -> tuple[Tensor, ...]:
    y = x.sin() * x.sum()
    return y, y[1:], y.flip(0), y.view(1, -1).t(), y.as_strided((2, 2), (1, 1))


def _written_through_a_view(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.sin()
    view = y[:2]
    view.mul_(x[2])
    return y, view


def _unbound(x: Tensor) -> tuple[Tensor, ...]:
    return (x * x.sum()).unbind(0)


def _twice(x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    y = x.exp()
    return y, y, [y]


PROGRAMS: dict[str, Callable[[Tensor], Any]] = {
    "views of one tensor": _views_of_one,
    "written through a view": _written_through_a_view,
    "unbound views": _unbound,
    "one output twice": _twice,
    "output is the input": lambda x: x,
    "output is a view of the input": lambda x: (x[1:], x.view(-1, 1), x.expand(2, *x.shape)),
    "input among outputs": lambda x: (x.sin(), x, x.sum()),
    "expanded output": lambda x: (x.sum() * x[:1]).expand(3, 4),
    "transposed output": lambda x: (x[:, None] * x).t()[1:],
    "strided output": lambda x: (x.repeat(4).view(2, -1) * 2)[:, ::3],
    "channels last": lambda x: (x[:, None, None, None] * x.view(1, -1, 1, 1)).contiguous(
        memory_format=torch.channels_last
    ),
    "output detached in part": lambda x: torch.stack([x, x.detach()]),
    "real part of complex": lambda x: torch.polar(x.abs() + 1, x).real,
    "overlapping windows": lambda x: x.sin().unfold(0, 2, 1),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_outputs(program: str) -> None:
    check_both(PROGRAMS[program], value(4))


INPUTS: dict[str, Tensor] = {
    "expanded": value(1, 3).expand(4, 3),
    "expanded scalar": value().expand(4, 3),
    "transposed": value(3, 4).t(),
    "strided": value(8, 6)[::2, ::2],
    "flipped": value(4, 3).flip(0),
    "offset": value(20)[8:].view(4, 3),
    "overlapping": value(8).unfold(0, 3, 1)[:4],
    "channels last": value(2, 2, 3, 2).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("where", INPUTS)
@pytest.mark.parametrize("layout", ["cumsum", "product", "reshape"])
def test_inputs(where: str, layout: str) -> None:
    """Odd strides of an argument change nothing; nor is the argument written to."""
    x = INPUTS[where]
    f: dict[str, Callable[[Tensor], Tensor]] = {
        "cumsum": lambda x: x.cumsum(0).sin(),
        "product": lambda x: x * x.flatten()[0],
        "reshape": lambda x: x.reshape(-1)[::2].exp(),
    }
    before = x.clone()
    same(torchjac.jacobian(f[layout])(x), oracle_jacobian(f[layout])(x))
    assert torch.equal(x, before)
    x = x.detach().requires_grad_()
    same(torchjac.jac(f[layout](x), x), oracle(f[layout](x), x))


def test_intermediate_as_input() -> None:
    """A tensor inside the graph is an input like any other; so are it and its source together."""
    x = leaf(4)
    h = x.sin()
    y = h * x
    same(torchjac.jac(y, h), oracle(y, h))
    same(torchjac.jac(y, (h, x)), oracle(y, (h, x)))
    same(torchjac.jac((h, y), (x, h)), oracle((h, y), (x, h)))
    same(torchjac.jac(h, h), torch.eye(4, dtype=torch.float64))


def test_view_as_input() -> None:
    """Only what was computed from the view itself depends on it."""
    x = leaf(4)
    view = x[1:]
    y = view * x[0]
    same(torchjac.jac(y, view), oracle(y, view))
    with pytest.raises(torchjac.UnusedInputError):
        torchjac.jac(x * 2, view)


def test_input_changed_in_place_after_the_graph() -> None:
    """torch's own error about a changed saved tensor comes through, in every plan."""
    x = leaf(3)
    h = x * 1
    y = h.sin()
    h.add_(1)
    with quiet(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torchjac.jac(y, x)


def test_in_place_on_the_argument() -> None:
    """f must not write to its argument, as in torch.func: torch's error, and nothing is written."""

    def f(x: Tensor) -> Tensor:
        x.mul_(2)
        return x.sin()

    x = value(3)
    for transform in (torch.func.jacrev, torchjac.jacobian):
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            transform(f)(x)
    assert torch.equal(x, value(3))


def test_results_do_not_share_memory_with_anything() -> None:
    """Writing to a block changes neither another block nor the next result."""
    x = leaf(3)
    y = x * 2
    first = torchjac.jac((y, y), (x, x))
    flat = [b for row in first for b in row]
    flat[0].fill_(7)
    assert not any((b == 7).any() for b in flat[1:])
    f = torchjac.jacobian(lambda x: (x * 2, x * 3))
    (one, two), (again, _) = f(x), f(x)
    one.fill_(7)
    assert not (two == 7).any()
    assert not (again == 7).any()


def test_zero_blocks_can_be_written_to() -> None:
    """Zeros are real memory, not one expanded element."""
    J = torchjac.jacobian(lambda x, y: (x * 2, y * 3), (0, 1))(value(3), value(2))
    zero = J[0][1]
    zero[0, 0] = 1
    assert zero.sum() == 1
    out = torchjac.jac(leaf(3).sin(), leaf(2), allow_unused=True)
    out[0, 0] = 1
    assert out.sum() == 1


C = value(3)


class Holder:
    """An object with a tensor that may be an argument as well."""

    def __init__(self) -> None:
        self.c = C

    def __call__(self, x: Tensor) -> Tensor:
        return (x * self.c).sin() + x


class Layer(torch.nn.Module):
    """A buffer that may be an argument as well."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("c", C)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.c).sin() + x


def _of_two(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sin() + x


def _of_dict(x: dict[str, Tensor]) -> Tensor:
    return _of_two(x["a"], x["b"])


# Function, positions to differentiate, and arguments in which a tensor has two roles.
TWO_ROLES: dict[str, tuple[Any, Any, tuple[Any, ...]]] = {
    "two arguments": (_of_two, (0, 1), (C, C)),
    "one of two is differentiated": (_of_two, 0, (C, C)),
    "two leaves of a dict": (_of_dict, 0, ({"a": C, "b": C},)),
    "closure": (lambda x: (x * C).sin() + x, 0, (C,)),
    "attribute": (Holder(), 0, (C,)),
    "buffer": (Layer(), 0, (C,)),
    "default argument": (lambda x, c=C: (x * c).sin() + x, 0, (C,)),
    "views": (_of_two, (0, 1), (C[:2], C[:2])),
}


@pytest.mark.parametrize("create_graph", [False, True], ids=["plain", "graph"])
@pytest.mark.parametrize("name", TWO_ROLES)
def test_a_tensor_with_two_roles_at_the_call_that_compiles(name: str, create_graph: bool) -> None:
    """The roles are two inputs (or an input and a constant) of the compiled code all the same."""
    f, argnums, arguments = TWO_ROLES[name]
    J = torchjac.jacobian(f, argnums, compile=True, create_graph=create_graph)
    J(*arguments)

    def anew(x: Any) -> Any:
        return {k: anew(v) for k, v in x.items()} if isinstance(x, dict) else torch.rand_like(x)

    for _ in range(3):
        fresh = tuple(anew(x) for x in arguments)
        got = J(*fresh)
        want = torch.func.jacrev(f, argnums)(*fresh)
        for a, b in zip(*map(torch.utils._pytree.tree_leaves, (got, want)), strict=True):
            same(a.detach(), b)
    assert J.explain(*fresh).engine == "accumulate"
