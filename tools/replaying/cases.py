"""The programs to replay: those of the tests and of the benchmarks, each in several ways."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import captured
import programs
import test_accumulate
import test_factors
import test_kernel
import test_layers
import test_pattern_cases
import test_sparse
import test_strips
import test_waists
from benchmarks.workloads import QUICK, build
from laws import value
from test_benchmarks import SMALL

# Ways to ask for a Jacobian (`collect.py` has their options).
GRAPH = ("graph", "graph csr")
PLAIN = ("calls", "calls csr", "compile", "compile csr")
BATCHED = ("batched graph", "batched calls", "batched compile")
MORE = ("hessian", "keeps graph", "forward first", "export", "export csr")
# Workloads of real sizes that replay in seconds.
LARGER = ("arm30", "arm7-x4096", "residuals-576x84", "volumes-600", "bundle_full(2, 12, 30)")


@dataclass(frozen=True)
class Use:
    """A function and the arguments of its call, built anew for each way.

    Attributes:
        f: The function.
        args: Positional arguments.
        argnums: Positions of the differentiated arguments.
        kwargs: Keyword arguments.
    """

    f: Callable[..., Any]
    args: tuple[Any, ...]
    argnums: int | tuple[int, ...] = 0
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A program to replay.

    Attributes:
        name: Family and name.
        make: Builds the function and its arguments.
        ways: Ways to ask for its Jacobian.
    """

    name: str
    make: Callable[[], Use]
    ways: tuple[str, ...] = GRAPH[:1] + PLAIN


def cases() -> list[Case]:
    """All cases; names are unique."""
    every = [
        *_problems(),
        *_batches(),
        *_captured(),
        *_steps(),
        *_factors(),
        *_layers(),
        *_workloads(),
    ]
    assert len({c.name for c in every}) == len(every), "two cases have one name"
    return every


def _fixed(f: Callable[..., Any], *args: Any) -> Callable[[], Use]:
    return lambda: Use(f, args)


def _problems() -> Iterator[Case]:
    """Test problems of the accumulation, in every way."""
    for name, (f, shape) in test_accumulate.PROBLEMS.items():
        yield Case(f"problem {name}", _fixed(f, value(*shape)), GRAPH + PLAIN + MORE)
    for name in test_accumulate.SINGLE:
        f, shape = test_accumulate.PROBLEMS[name]
        single = value(*shape, dtype=torch.float32)
        yield Case(f"float32 {name}", _fixed(f, single), PLAIN[2:])
    for name, (f, shape, _) in test_pattern_cases.CASES.items():
        yield Case(f"pattern {name}", _fixed(f, value(*shape)), GRAPH + PLAIN)
    for name, (f, x) in test_sparse.CASES.items():
        yield Case(f"sparse {name}", _fixed(f, x), GRAPH + PLAIN)
    exported = ("export", "export csr")  # compiling its Hessian takes minutes
    yield Case("kernel mesh", _fixed(test_kernel.mesh, value(40)), GRAPH + PLAIN + exported)
    for name, (f, _) in test_waists.CASES.items():
        yield Case(f"waist {name}", _fixed(f, value(test_waists.N)), ("compile",))


def _batches() -> Iterator[Case]:
    """Batches of few samples, and of many: many get a kernel of one sample."""
    for name, f in test_accumulate.BATCHED.items():
        for samples in (7, 40):
            ways = (*BATCHED, *(("batched export",) if samples > 7 else ()))
            yield Case(f"batch {name} x{samples}", _fixed(f, value(samples, 6)), ways)
    for name in test_strips.NETWORKS:

        def make(name: str = name) -> Use:
            net, inputs = test_strips.trained(name)
            return Use(net, (value(37, inputs),))

        yield Case(f"network {name} x37", make, ("batched compile",))


def _captured() -> Iterator[Case]:
    """Functions that are hard to capture: they write, count, or keep their arguments."""
    for name, make in captured.CASES.items():

        def use(make: Callable[[], captured.Case] = make) -> Use:
            case = make()
            return Use(case.f, case.args, case.argnums, case.kwargs)

        yield Case(f"captured {name}", use, ("graph", "calls", "compile", "compile csr"))


def _steps() -> Iterator[Case]:
    """Each operation of the random programs alone, and random programs of several."""
    for name in programs.OPS:
        steps = (programs.Step("sin", 0, 0, 1, 2), programs.Step(name, 0, 1, 1, 2))
        yield _program(f"step {name}", programs.Program(((2, 3), (3,)), steps, (0,)))
    chosen = random.Random(0)
    for k in range(24):
        steps = tuple(
            programs.Step(chosen.choice(sorted(programs.OPS)), *_knobs(chosen))
            for _ in range(chosen.randint(2, 8))
        )
        shapes = (((3, 2), (2,)), ((3,),), ((1, 3), (2, 1, 3)), ((), (3, 3)))[k % 4]
        yield _program(f"steps {k}", programs.Program(shapes, steps, (0, 1)[: 1 + k % 2]))


def _knobs(chosen: random.Random) -> tuple[int, int, int, int]:
    a, b, c, d = (chosen.randint(0, 4) for _ in range(4))
    return a, b, c, d


def _program(name: str, program: programs.Program) -> Case:
    def make() -> Use:
        inputs = program.inputs()
        return Use(program, inputs, tuple(range(len(inputs))))

    return Case(name, make)


def _factors() -> Iterator[Case]:
    """Factorizations of small matrices, one by one and in a batch."""
    for name in test_factors.CASES:
        one = test_factors.flat(name, 3, False)
        yield Case(f"factor {name}", _fixed(one, value(36)), ("calls", "compile"))
        many = test_factors.flat(name, 2, True)
        yield Case(f"factor {name} x40", _fixed(many, value(40, 36)), ("batched compile",))


def _layers() -> Iterator[Case]:
    """Products of matrices, with and without samples."""
    for name, (g, shape) in test_layers.CASES.items():
        matrix = value(40, 40, seed=5)

        def f(x: Tensor, g: Any = g, matrix: Tensor = matrix) -> Any:
            return g(x, matrix)

        yield Case(f"layer {name}", _fixed(f, value(*shape)), ("compile",))
    for sizes in ((9, 40, 33, 2), (4, 64, 64, 7)):

        def make(sizes: tuple[int, ...] = sizes) -> Use:
            net = test_layers.wide(*sizes, dtype=torch.float64)
            return Use(net, (value(sizes[0]),))

        yield Case(f"layer wide {sizes}", make, ("calls", "compile"))


def _workloads() -> Iterator[Case]:
    """Workloads of the benchmarks, all in small sizes and some in their own."""
    for spec in dict.fromkeys((*SMALL, *QUICK, *LARGER)):
        workload = build(spec)

        def make(spec: str = spec) -> Use:
            fresh = build(spec)
            return Use(fresh.f, fresh.make(0), fresh.argnums)

        ways = BATCHED if workload.batched else GRAPH + PLAIN
        if spec in LARGER:
            ways = ("batched compile",) if workload.batched else ("compile", "compile csr")
        yield Case(f"workload {spec}", make, ways)
