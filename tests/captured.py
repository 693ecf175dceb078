"""Functions to capture, with what they write to; and a captured derivative, evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import torchjac
from torchjac.call import Call
from torchjac.capture.linear_program import LinearProgram
from torchjac.capture.nesting import nested
from torchjac.capture.trace import trace_function

D = torch.float64


def values(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=D) + 0.1


@dataclass
class Case:
    """A function, made anew for every use.

    Attributes:
        f: The function.
        args: Its arguments; those that are floating-point may take other values.
        argnums: Which are differentiated.
        kwargs: Keyword arguments.
        keeps: Tensors and objects that the function writes to, which tracing must not.
    """

    f: Callable[..., Any]
    args: tuple[Any, ...] = field(default_factory=lambda: (values(4),))
    argnums: int | tuple[int, ...] = 0
    kwargs: dict[str, Any] = field(default_factory=dict)
    keeps: list[Any] = field(default_factory=list)


def evaluated(derivative: LinearProgram, tensors: list[Tensor]) -> Tensor:
    """J of all outputs and inputs from the graph, a row at a time, at these inputs."""
    rows = []
    seeds = torch.eye(derivative.m, dtype=D).split([s.numel() for s in derivative.row_shapes], 1)
    for row in range(derivative.m):

        class Seeded(fx.Interpreter):
            def run_node(self, node: fx.Node, row: int = row) -> Any:
                if node in derivative.cotangents:
                    position = derivative.cotangents.index(node)
                    seed = seeds[position][row].to(node.meta["val"].dtype)
                    return seed.view(derivative.row_shapes[position])
                return super().run_node(node)

        arguments = [*tensors, *([None] * len(derivative.cotangents))]  # seeds take these places
        gradients = Seeded(derivative.module).run(*arguments)[len(derivative.row_shapes) :]
        parts = [
            torch.zeros(s.numel(), dtype=D) if g is None else g.reshape(-1).to(D)
            for g, s in zip(gradients, derivative.column_shapes, strict=True)
        ]
        rows.append(torch.cat(parts))
    return torch.stack(rows) if rows else torch.zeros(0, derivative.n, dtype=D)


def expected(case: Case, args: tuple[Any, ...]) -> Tensor:
    """The same by torch.autograd."""
    leaves, spec = pytree.tree_flatten(args)
    leaves = [t.detach().clone() if isinstance(t, Tensor) else t for t in leaves]
    args = pytree.tree_unflatten(leaves, spec)
    argnums = (case.argnums,) if isinstance(case.argnums, int) else case.argnums
    inputs = pytree.tree_leaves([args[i] for i in argnums])
    for t in inputs:
        t.requires_grad_()
    with nested():
        outputs = pytree.tree_leaves(case.f(*args, **case.kwargs))
    rows = []
    for o in outputs:
        for seed in (row.view(o.shape) for row in torch.eye(o.numel(), dtype=o.dtype)):
            grads = (
                torch.autograd.grad(o, inputs, seed, retain_graph=True, allow_unused=True)
                if o.requires_grad
                else [None] * len(inputs)
            )
            parts = [
                torch.zeros(t.numel(), dtype=D) if g is None else g.reshape(-1).to(D)
                for g, t in zip(grads, inputs, strict=True)
            ]
            rows.append(torch.cat(parts))
    return torch.stack(rows) if rows else torch.zeros(0, sum(t.numel() for t in inputs), dtype=D)


def captured(case: Case) -> LinearProgram:
    return trace_function(Call(case.f, case.argnums, False, case.args, case.kwargs), ())


def captured_of(f: Callable[..., Any], *args: Any, **kwargs: Any) -> LinearProgram:
    return captured(Case(f, args or (values(4),), kwargs=kwargs))


CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    CASES[make.__name__] = make
    return make


def simple(name: str, f: Callable[..., Any], *args: Any, **options: Any) -> None:
    """A case without state."""
    CASES[name] = lambda: Case(f, args or (values(4),), **options)


def write_in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y[1:] *= 2
    y.add_(x)
    y[0] = x[2]
    return y


def write_through_a_view(x: Tensor) -> Tensor:
    y = x * 1
    y.view(2, 2)[0].mul_(x[:2])
    return y


def write_where(x: Tensor) -> Tensor:
    y = x.clone()
    y[y > 0.5] = 0
    return y


def under_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x * 2
    return x * y


def with_hook(x: Tensor) -> Tensor:
    y = x * 2
    y.register_hook(lambda g: g * torch.tensor([1.0, 0.0, 3.0, 1.0], dtype=D))
    return y * x


def into_a_buffer(x: Tensor) -> Tensor:
    out = torch.empty(3, dtype=D)
    out[:2] = x[:2]
    out[2] = x.sum()
    return out


simple("write_in_place", write_in_place)
simple("write_through_a_view", write_through_a_view)
simple("write_where", write_where)
simple("into_a_buffer", into_a_buffer)
simple("in_place_activation", lambda x: (x - 0.5).relu_())
simple("aliasing_outputs", lambda x: (x.view(2, 2), x[1:], x.T))
simple("input_returned", lambda x: x)
simple("input_returned_twice", lambda x: (x, x))
simple("view_returned", lambda x: x.view(2, 2).T)
simple("detach", lambda x: x * x.detach())
simple("no_grad", under_no_grad)
simple("hook", with_hook)
simple("checkpoint", lambda x: checkpoint(lambda y: y.sin().cos(), x, use_reentrant=False))
simple("output_without_graph", lambda x: (x * 2, torch.ones(3, dtype=D)))
simple("no_graph_at_all", lambda x: torch.ones(3, dtype=D))
simple("shape_in_python", lambda x: x * len(x) * x.shape[0])
simple(
    "dict_in_dict_out",
    lambda p: {"a": p["u"] * p["v"], "b": p["v"].sum()},
    {
        "u": values(3),
        "v": values(3, seed=1),
    },
)
simple("several_inputs", lambda x, y: x.sin() * y, values(3), values(2, 3, seed=1), argnums=(0, 1))
simple("argnums_backwards", lambda x, y: x.sin() * y, values(3), values(2, 3), argnums=(1, 0))
simple("unused_input", lambda x, y: x * 2, values(3), values(2), argnums=(0, 1))
simple("beside", lambda x, y: x.sin() * y, values(3), values(3, seed=2))
simple("keyword", lambda x, *, y: x.sin() * y, values(3), kwargs={"y": values(3, seed=2)})
simple("index_argument", lambda x, i: x[i] * 2, values(4), torch.tensor([2, 0, 2]))
simple("python_argument", lambda x, n, s: x.sum(n) * s, values(2, 3), 1, 2.5)
simple("size_zero", lambda x: x * 2, values(0, 3))
simple("size_one", lambda x: x.sum() * x, values(1, 1))
simple("scalar", lambda x: x.sin(), values())
simple("vmap", lambda x: torch.vmap(lambda a: a.sin() * a.sum())(x), values(2, 3))
simple("func_grad", lambda x: torch.func.grad(lambda a: (a**3).sum())(x))
simple("func_jvp", lambda x: torch.func.jvp(torch.sin, (x,), (torch.ones_like(x),))[1])
simple("func_jacrev", lambda x: torch.func.jacrev(lambda a: a**3)(x).sum(0))
simple("func_jacfwd", lambda x: torch.func.jacfwd(lambda a: a**3)(x).sum(0))
simple("autograd_grad", lambda x: torch.autograd.grad((x**3).sum(), x, create_graph=True)[0])
simple("torchjac_jacobian", lambda x: torchjac.jacobian(lambda a: a**3)(x).sum(0))
simple("torchjac_hessian", lambda x: torchjac.hessian(lambda a: (a**4).sum())(x).sum(0))


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


class WritesGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clone().mul_(3).mul_(ctx.saved_tensors[0])


class Dirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.mul_(2)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 5


simple("straight_through", lambda x: Straight.apply(x) * x)
simple("writes_gradient", lambda x: WritesGradient.apply(x))
simple("mark_dirty", lambda x: Dirty.apply(x.clone()))


def writing(write: Callable[[Tensor, Tensor], Any], read: Any = None) -> Callable[[], Case]:
    """A function that writes to a tensor it closes over, and reads it."""

    def make() -> Case:
        buffer = torch.tensor([0.0, 1.0, 0.0, 2.0], dtype=D)

        def f(x: Tensor) -> Tensor:
            write(buffer, x)
            return x.sin() * buffer

        return Case(f, keeps=[buffer])

    return make


WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "add_": lambda b, x: b.add_(1),
    "operator": lambda b, x: b.__iadd__(1),
    "item": lambda b, x: b.__setitem__(0, 3.0),
    "slice": lambda b, x: b.__setitem__(slice(1, 3), 5.0),
    "view": lambda b, x: b[2:].add_(1),
    "view_of_view": lambda b, x: b.view(2, 2)[:, 0].fill_(7),
    "copy_of_detached": lambda b, x: b.copy_(x.detach()),
    "copy_of_input": lambda b, x: b.copy_(x),
    "view_copy_of_input": lambda b, x: b[1:3].copy_(x[:2]),
    "out": lambda b, x: torch.sin(b, out=b),
    "out_of_detached": lambda b, x: torch.sin(x.detach(), out=b),
    "data": lambda b, x: b.data.add_(1),
    "detached": lambda b, x: b.detach().add_(1),
    "foreach": lambda b, x: torch._foreach_add_([b], 1.0),
    "zero_": lambda b, x: b.zero_(),
    "index_put_": lambda b, x: b.index_put_((torch.tensor([0, 2]),), torch.ones(2, dtype=D)),
    "twice": lambda b, x: (b.add_(1), b.mul_(2)),
}
for _name, _write in WRITES.items():
    CASES[f"writes_to_a_closure_{_name}"] = writing(_write)


@case
def writes_to_a_tensor_and_reads_its_view() -> Case:
    buffer = torch.zeros(4, dtype=D)
    half = buffer[2:]

    def f(x: Tensor) -> Tensor:
        buffer.add_(1)
        return x[:2] * half

    return Case(f, keeps=[buffer])


@case
def writes_to_a_view_and_reads_the_tensor() -> Case:
    buffer = torch.zeros(4, dtype=D)
    half = buffer[2:]

    def f(x: Tensor) -> Tensor:
        half.copy_(x[:2])
        return x * buffer

    return Case(f, keeps=[buffer])


@case
def writes_to_an_argument() -> Case:
    return Case(lambda x, y: x * y.mul_(2), (values(3), values(3, seed=1)))


@case
def copies_to_an_argument() -> Case:
    return Case(lambda x, y: y.copy_(x) * 2, (values(3), values(3, seed=1)))


@case
def writes_to_an_index() -> Case:
    index = torch.tensor([0, 2])
    return Case(lambda x, i: x[i.add_(1)], (values(4), index), keeps=[index])


@case
def batch_norm() -> Case:
    net = nn.BatchNorm1d(3, dtype=D)
    return Case(net, (values(4, 3),), keeps=[net, *net.buffers()])


@case
def parameters() -> Case:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4, dtype=D), nn.Tanh(), nn.Linear(4, 2, dtype=D))
    return Case(net, (values(3),), keeps=[net, *net.parameters()])


@case
def gradient_of_parameters() -> Case:
    weight = values(3, 3).requires_grad_()

    def f(x: Tensor) -> Tensor:
        loss = (weight @ x).square().sum()
        return torch.autograd.grad(loss, weight, create_graph=True)[0]

    return Case(f, (values(3),), keeps=[weight])


class Counting(nn.Module):
    """Keeps what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.last: Any = None
        self.seen: list[Any] = []
        self.register_buffer("total", torch.ones((), dtype=D))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        self.seen.append(x.shape)
        self.total = self.total + 1
        return x.sin() * self.total


@case
def keeps_its_input() -> Case:
    net = Counting()
    return Case(net, keeps=[net, net.total])


@case
def keeps_its_input_in_a_closure() -> Case:
    last: Any = None
    found: dict[str, Any] = {}

    def f(x: Tensor) -> Tensor:
        nonlocal last
        last = x
        found["x"] = x
        return x.sin()

    return Case(f, keeps=[found, f.__closure__])
