"""Kernels: cases x the law that they give what the row loop gives, in C; and what may go wrong."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scipy.special
import torch
from hypothesis import given
from torch import Tensor

import torchjac
from accumulating import plan_of, run
from laws import oracle_jacobian, quiet, same, value
from programs import PROGRAMS, Program
from test_accumulate import BATCHED, PROBLEMS, agrees, inside
from torchjac._torch.trace.recorder import Recorder
from torchjac._torch.trace.recording import Recording, finish_recording
from torchjac.call import Call, arguments
from torchjac.compiler import native as compilation
from torchjac.compiler.codegen.build import build_source
from torchjac.compiler.codegen.c import toolchain as compiler
from torchjac.compiler.codegen.executable import Executable
from torchjac.compiler.codegen.ops_pointwise import POINTWISE
from torchjac.compiler.codegen.target import SourceUnit
from torchjac.compiler.compiled import Compiled
from torchjac.compiler.native import with_kernel
from torchjac.errors import CaptureRefused, PlanRefused
from torchjac.jit.entry import Entry
from torchjac.jit.tiers import Tier
from torchjac.request import Mode

aten = torch.ops.aten
Function = Callable[..., Any]
ORDERS: tuple[Mode, ...] = ("reverse", "forward")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One directory for all of them, not the user's."""
    folder = tmp_path_factory.getbasetemp() / "kernels"
    folder.mkdir(mode=0o700, exist_ok=True)
    monkeypatch.setenv("TORCHJAC_CACHE_DIR", str(folder))
    return folder


def kernel_of(plan: Compiled, f: Function, *args: Any) -> Compiled:
    """The same plan, run as a kernel."""
    if plan.program.samples is not None:
        return plan  # it is one
    inputs = arguments(Call(f, 0, False, args, {}))
    return replace(plan, program=with_kernel(plan.programs, inputs, plan.shape[2]))


def after_many_runs(entry: Entry, tier: Tier, call: Call) -> None:
    """An entry after as many runs by a tier as pay for native code."""
    entry.state = replace(entry.state, banked=1e3)  # type: ignore[type-var]
    entry.observe(tier, 1e-3, call)


def check(f: Function, *args: Tensor, **how: Any) -> None:
    """Law: a kernel gives the Jacobian of the row loop, where it was made and elsewhere."""
    batched = how.get("batched", False)
    for order in ORDERS:
        try:
            plan, _ = plan_of(f, *args, orders=(order,), **how)
        except (CaptureRefused, PlanRefused):
            continue
        plan = kernel_of(plan, f, *args)
        for k in range(3):
            point = tuple(inside(0.7 * a.roll(1) + 0.1 * k) if k else a for a in args)
            J = plan(Call(f, 0, False, point, {}))
            want = oracle_jacobian(f, 0, batched=batched)(*point)
            same((J.to_dense() if "layout" in how else J).reshape(want.shape), want)


def has_kernel(f: Function, *args: Tensor, **how: Any) -> bool:
    """Whether there is one; a program without one is refused with a reason, nothing else."""
    try:
        check(f, *args, **how)
    except PlanRefused:
        return False
    return True


# Problems that have none, and why.
REFUSED: dict[str, str] = {
    "fft step": "complex numbers",
    "scan": "an index that depends on values",
}


@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_csr], ids=["dense", "csr"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_problems(name: str, layout: torch.layout) -> None:
    """Every problem of the accumulate engine, in both orders."""
    f, shape = PROBLEMS[name]
    how = {} if layout is torch.strided else {"layout": layout}
    assert has_kernel(f, value(*shape), **how) is (name not in REFUSED)


@pytest.mark.parametrize("samples", [1, 3, 65])
@pytest.mark.parametrize("name", BATCHED)
def test_batches(name: str, samples: int) -> None:
    """Samples are lanes of one loop; their number need not be that of a vector register."""
    check(BATCHED[name], value(samples, 6), batched=True)


@pytest.mark.parametrize("name", ["the question", "pairs", "edges twice", "stencil", "softmax"])
def test_single_precision(name: str) -> None:
    """In float32."""
    f, shape = PROBLEMS[name]
    check(f, value(*shape, dtype=torch.float32))


@given(PROGRAMS)
def test_programs(program: Program) -> None:
    """Programs that nobody thought of."""
    inputs = program.inputs()
    argnums = tuple(range(len(inputs)))
    with quiet():
        want = oracle_jacobian(program, argnums)(*inputs)
        for order in ORDERS:
            with contextlib.suppress(CaptureRefused, PlanRefused):
                plan, _ = plan_of(program, *inputs, argnums=argnums, orders=(order,))
                call = Call(program, argnums, False, inputs, {})
                plan = replace(plan, program=with_kernel(plan.programs, arguments(call), None))
                got = plan(call)
                if got is not None:
                    agrees(got, want)


# Each pointwise operation against torch.


def of_operation(
    operation: Any, inputs: Sequence[Tensor], *rest: Any, samples: int | None = None
) -> tuple[Executable, Tensor]:
    """One operation as a kernel, and what torch gives."""
    recorder = Recorder((), parameters_vary=True)
    for x in inputs:
        recorder.input(x)
    with torch.no_grad(), recorder:
        expected = operation(*inputs, *rest).to(inputs[0].dtype)
    return Executable(
        build_source([(finish_recording(recorder, [expected]), 1)], samples)
    ), expected


def special(dtype: torch.dtype) -> Tensor:
    """Numbers where functions have poles, kinks, branches and ends."""
    about = torch.finfo(dtype)
    ends = [math.inf, math.nan, about.max, about.tiny, about.eps, 1e-3, 0.5, 1.0, 1.5, 2.0]
    ends += [2.5, 3.7, 20.0, 21.0, 88.0, 700.0]
    return torch.tensor([0.0, -0.0, *ends, *(-e for e in ends)], dtype=dtype)


def within(got: Tensor, want: Tensor, ulps: float) -> bool:
    """Whether two results agree but for some units in the last place, NaN and infinity too."""
    alike = (got == want) | (got.isnan() & want.isnan())
    spacing = torch.finfo(want.dtype).eps * want.abs() + torch.finfo(want.dtype).tiny
    return bool((alike | ((got - want).abs() <= ulps * spacing)).all())


UNARY = [
    o
    for o in POINTWISE
    if [str(a.type) for a in o._schema.arguments] == ["Tensor"] and "prims" not in str(o)
]
BINARY = [
    o
    for o in POINTWISE
    if o._overloadname in ("Tensor", "default")
    and "prims" not in str(o)
    and [str(a.type) for a in o._schema.arguments][:2] == ["Tensor", "Tensor"]
    and all(a.has_default_value() for a in o._schema.arguments[2:])
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
# Of their results more than some units in the last place differ, and why.
LOOSE = {
    "tan": "torch and the C library round near the poles in other ways",
    "lgamma": "near its zeros what is left of a sum",
    "digamma": "near its zeros what is left of a sum",
    "silu": "a product of two rounded numbers",
    "logaddexp": "a sum of two rounded numbers",
    "xlogy": "a product of two rounded numbers",
    "softplus": "a quotient of rounded numbers",
}


def skip_of(operation: Any, *inputs: Tensor) -> None:
    """Skips operations that torch does not have for floating-point numbers."""
    try:
        operation(*inputs)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"torch has no {operation} of floating-point numbers: {error}"[:100])


@DTYPES
@pytest.mark.parametrize("samples", [None, 34], ids=["lines", "lanes"])
@pytest.mark.parametrize("operation", UNARY, ids=str)
def test_unary(operation: Any, samples: int | None, dtype: torch.dtype) -> None:
    """Of special numbers, in a straight line and in a vectorized loop."""
    x = special(dtype)
    skip_of(operation, x)
    kernel, want = of_operation(operation, [x], samples=samples)
    (got,), _ = kernel.run([x])
    name = str(operation).split(".")[1]
    assert within(got, want, 1e4 if name in LOOSE else 8), (x, got, want)


@DTYPES
@pytest.mark.parametrize("operation", BINARY, ids=str)
def test_binary(operation: Any, dtype: torch.dtype) -> None:
    """Of all pairs of special numbers."""
    x = special(dtype)
    a, b = x.repeat_interleave(len(x)), x.repeat(len(x))
    skip_of(operation, a, b)
    kernel, want = of_operation(operation, [a, b], samples=len(a))
    (got,), _ = kernel.run([a, b])
    name = str(operation).split(".")[1]
    if name in ("fmod", "remainder"):  # torch gives NaN where the quotient is not exact
        want = torch.where(want.isnan() & a.isfinite() & (b != 0) & ~b.isnan(), got, want)
    wrong = ~((got == want) | (got.isnan() & want.isnan()))
    assert within(got, want, 1e4 if name in LOOSE else 8), (a[wrong], b[wrong], got[wrong])


@pytest.mark.parametrize("exponent", [-3.0, -2, -1, -0.5, 0, 0.5, 1, 1.7, 2, 3, 4])
def test_powers(exponent: float) -> None:
    """Some exponents are not left to the math library."""
    x = special(torch.float64)
    kernel, want = of_operation(aten.pow.Tensor_Scalar, [x], exponent)
    (got,), _ = kernel.run([x])
    assert within(got, want, 8), (x, got, want)


@DTYPES
@pytest.mark.parametrize("order", [0, 1])
def test_polygamma(order: int, dtype: torch.dtype) -> None:
    """Against SciPy: torch's own has five digits in single precision."""
    x = torch.cat([value(40) * 5, torch.tensor([0.5, 1, 1.5, 2, 9.99, 10, 1e3, 1e8])]).to(dtype)
    recorder = Recorder((), parameters_vary=False)
    recorder.input(x)
    with torch.no_grad(), recorder:
        expected = aten.polygamma.default(order, x)
    kernel = Executable(build_source([(finish_recording(recorder, [expected]), 1)], None))
    (got,), _ = kernel.run([x])
    want = torch.from_numpy(scipy.special.polygamma(order, x.double().numpy()))
    eps = torch.finfo(dtype).eps
    assert torch.allclose(got.double(), want, rtol=200 * eps, atol=200 * eps)


# What may go wrong.


def small() -> tuple[Executable, Tensor, Tensor]:
    """A kernel of one operation, an input, and the result."""
    x = value(3, 4)
    kernel, want = of_operation(lambda x: x.sin() * 2, [x])
    return kernel, x, want


def test_inputs_may_lie_anywhere() -> None:
    """Strides, offsets, conjugates of nothing: read as they are meant."""
    kernel, x, want = small()
    for other in (
        x.t().contiguous().t(),
        inside(x),
        torch.stack([x, x], -1)[..., 1],
        torch._neg_view(-x),
    ):
        (got,) = kernel([other]) or ()
        same(got, want)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(12), torch.zeros(3, 4), torch.zeros(4, 3, dtype=torch.float64)], ids=str
)
def test_other_inputs_are_errors(wrong: Tensor) -> None:
    """Never a bad read."""
    kernel, _, _ = small()
    with pytest.raises(ValueError, match="a kernel for"):
        kernel([wrong])


def test_zeros_that_are_nowhere() -> None:
    """Autograd makes tensors without memory, which stand for zeros."""
    kernel, x, _ = small()
    (got,) = kernel([torch._efficientzerotensor((3, 4), dtype=x.dtype)]) or ()
    same(got, torch.zeros_like(x))


def test_what_is_not_finite_is_left_to_passes() -> None:
    """In another order of multiplication infinities meet other zeros."""
    x = value(3)
    kernel, _ = of_operation(lambda x: 1 / x, [x])
    assert kernel([x]) is not None
    assert kernel([torch.zeros(3, dtype=torch.float64)]) is None


@pytest.mark.parametrize(("shape", "samples"), [((8,), None), ((65, 3), 65)])
def test_large_numbers_are_finite(shape: tuple[int, ...], samples: int | None) -> None:
    """Though their sum is not."""
    x = torch.ones(shape, dtype=torch.float64)
    kernel, want = of_operation(lambda x: x * 1e308, [x], samples=samples)
    (got,) = kernel([x]) or ()
    assert torch.equal(got, want)
    assert kernel([x * float("inf")]) is None


def test_large_results_of_few_numbers(cache: Path) -> None:
    """A statement for each element would take compilers minutes: it is refused before."""

    def f(x: Tensor) -> Tensor:
        return (-x).sum() * (-x[0]).sin() * torch.ones(200).to(x) - x

    x = value(200)
    plan, _ = plan_of(f, x)
    with pytest.raises(PlanRefused, match="very many places"):
        kernel_of(plan, f, x)


def test_signs_are_exact() -> None:
    """Changes of sign move through products and into sums: not a bit changes, nor a zero's sign."""

    def f(x: Tensor) -> Tensor:
        a, b, c = x
        signs = [(-a) * b, (-a) * (-b), a / -c, (-(a * c)).neg(), (-a) * b + c, a - (-b) * c]
        signs += [(-a) + (-b), (-a) - b, c - (-a) * (-b), -(a - a), -2 * (-a)]
        return torch.stack([s / (2 + c * c) for s in signs])

    x = value(3, 5)
    x[1, 2] = 0
    x[0, 3] = -0.0
    for shape in ((3, 5), (3, 200)):  # element by element, and lanes
        y = torch.cat([x, value(3, shape[1] - 5)], 1)
        kernel, want = of_operation(f, [y])
        (got,) = kernel([y]) or ()
        assert torch.equal(got, want)
        assert torch.equal(got.signbit(), want.signbit())


def test_threads(cache: Path) -> None:
    """One kernel, many threads at once: each call has memory of its own."""
    f, shape = PROBLEMS["pairs"]
    x = value(*shape)
    plan, _ = plan_of(f, x)
    plan = kernel_of(plan, f, x)
    points = [value(*shape, seed=k) for k in range(8)]
    want = [oracle_jacobian(f)(p) for p in points]
    barrier = threading.Barrier(4)

    def run(k: int) -> None:
        barrier.wait()
        for _ in range(50):
            same(plan(Call(f, 0, False, (points[k],), {})), want[k])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))


EDGES = torch.randint(40, (3, 120), generator=torch.Generator().manual_seed(0))


def mesh(x: Tensor) -> Tensor:
    """What flows along the edges of a graph, added up at its nodes."""
    left, right, third = EDGES
    through = x[left] * x[right].sin() - x[third] ** 2
    drag = x[left] / (2 + x[right].square())
    zero = torch.zeros_like(x)
    change = zero.index_add(0, left, -through).index_add(0, right, through - drag)
    return change.index_add(0, third, drag * through) / (1 + torch.arange(40)).to(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "float"])
@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_csr], ids=["dense", "csr"])
def test_what_is_assembled(layout: torch.layout, dtype: torch.dtype) -> None:
    """Sums over several arrays are one sum, over all memory that is worked in."""
    x = value(40, dtype=dtype)
    want = oracle_jacobian(mesh)(x.double())
    for order in ORDERS:
        plan, _ = plan_of(mesh, x, orders=(order,), layout=layout)
        plan = kernel_of(plan, mesh, x)
        assert isinstance(plan.program.kernel, Executable)
        assert "+= buffers_float" in plan.program.kernel.source.text
        J = plan(Call(mesh, 0, False, (x,), {}))
        got = (J if layout is torch.strided else J.to_dense()).double()
        rounding = 1e-9 if dtype is torch.float64 else 1e-3
        same(got, want, rounding, rounding)


def test_memory_is_each_calls_own() -> None:
    """That of earlier calls is used again, by one call at a time."""
    x = value(40)
    plan, _ = plan_of(mesh, x, layout=torch.sparse_csr)
    plan = kernel_of(plan, mesh, x)
    points = [value(40, seed=k) for k in range(8)]
    want = [oracle_jacobian(mesh)(p) for p in points]

    def run(k: int) -> None:
        for _ in range(50):
            same(plan(Call(mesh, 0, False, (points[k],), {})).to_dense(), want[k])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(8)))


# The compiler and its cache.


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache directory of its own, and a compiler that is looked for anew."""
    monkeypatch.setenv("TORCHJAC_CACHE_DIR", str(tmp_path / "cache"))
    known = (compiler._command, compiler._version, compiler._flags_file)
    for cached in known:
        cached.cache_clear()
    monkeypatch.setattr(compiler, "_flags_of", {})
    yield tmp_path
    for cached in known:
        cached.cache_clear()


def script(path: Path, text: str) -> str:
    """A compiler of our own."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def compile_again(text: str = "int f(void) { return 7; }", limit: float = 20.0) -> int:
    """Compiles a function and calls it."""
    return compiler.compile_library(text, 1, limit).f()


def test_it_is_compiled_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compile_again() == 7
    monkeypatch.setattr(compiler, "_compile", None)  # whoever compiles now fails
    assert compile_again() == 7


def test_no_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(compiler.NoCompiler, match="there is no C compiler"):
        compile_again()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("echo no such thing >&2; exit 3", "failed: no such thing"),
        ("exit 0", "wrote nothing"),
        ("sleep 60", "took more than"),
    ],
    ids=["fails", "does nothing", "hangs"],
)
def test_bad_compilers(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    monkeypatch.setattr(compiler, "_tuned", lambda command: ("-lm",))
    monkeypatch.setattr(compiler, "_version", lambda command: "")
    monkeypatch.setenv("CC", script(fresh / "cc", text))
    with pytest.raises(PlanRefused, match=reason):
        compile_again(limit=0.5 if "sleep" in text else 20.0)


def test_flags_that_a_compiler_does_not_take(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found by trial, once."""
    real, log = shutil.which("cc"), fresh / "log"
    refuses = f'echo "$@" >> {log}; case "$*" in *-lmvec*) exit 3;; esac; exec {real} "$@"'
    monkeypatch.setenv("CC", script(fresh / "cc", refuses))
    assert compile_again() == 7
    tried = [line for line in log.read_text().splitlines() if "--version" not in line]
    assert len(tried) == 5  # the text, the three first choices, the text
    assert compile_again("int f(void) { return 8; }") == 8
    again = [line for line in log.read_text().splitlines() if "--version" not in line]
    assert len(again) == 6


def test_a_compiler_that_hangs_is_not_asked_again(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = fresh / "log"
    monkeypatch.setenv("CC", script(fresh / "cc", f'echo "$@" >> {log}; sleep 60'))
    monkeypatch.setattr(compiler, "_version", lambda command: "")
    with pytest.raises(PlanRefused, match="took more than"):
        compile_again(limit=0.5)
    assert len(log.read_text().splitlines()) == 1


def test_a_bad_compiler_is_not_the_end(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations run as they are, and the record says why."""
    monkeypatch.setenv("CC", script(fresh / "cc", "exit 3"))
    f, shape = PROBLEMS["pairs"]
    plan, _ = plan_of(f, value(*shape))
    with pytest.raises(PlanRefused, match="the C compiler failed"):
        kernel_of(plan, f, value(*shape))
    call, entry = Call(f, 0, False, (value(*shape),), {}), Entry.of(plan, False)
    after_many_runs(entry, Tier.PROGRAM, call)
    same(entry.compiled_for(entry.next_tier())(call), oracle_jacobian(f)(value(*shape)))
    record = entry.record(plan, "jacobian", 1.0)
    assert "the C compiler failed" in dict(record.refusals)["kernel"]


def test_an_unforeseen_error_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full, say: the call gives its result, and the record says why no kernel."""

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(compilation, "Executable", fail)
    f, shape = PROBLEMS["pairs"]
    J = torchjac.jacobian(f, compile=True)
    same(J(value(*shape)), oracle_jacobian(f)(value(*shape)))
    assert "OSError: no space left" in str(J.explain(value(*shape)))


@pytest.mark.parametrize("what", ["cut off", "of another", "empty", "writable by others"])
def test_bad_caches(fresh: Path, what: str) -> None:
    """What is in the cache is not believed; it is compiled again."""
    assert compile_again() == 7
    (file,) = (fresh / "cache").glob("*.so")
    data = file.read_bytes()
    file.unlink()
    bad = {"cut off": data[: len(data) // 2], "of another": b"\x7fELF" + data[9:], "empty": b""}
    file.write_bytes(bad.get(what, data))
    if what == "writable by others":
        file.chmod(0o777)
    assert compile_again() == 7


def test_a_directory_that_cannot_be_written(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "file").write_text("")
    monkeypatch.setenv("TORCHJAC_CACHE_DIR", str(fresh / "file" / "within"))
    assert compile_again() == 7


@pytest.mark.slow
def test_processes_at_once(fresh: Path) -> None:
    """Eight of them compile the same."""
    text = (
        "from torchjac.compiler.codegen.c.toolchain import compile_library\n"
        "assert compile_library('int f(void) { return 7; }', 1).f() == 7\n"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", text], env=dict(os.environ)) for _ in range(8)
    ]
    assert [p.wait(timeout=300) for p in running] == [0] * 8


# From outside.


def test_asked_for() -> None:
    """`compile=True` makes the kernel on the first call; the record says so."""
    f, shape = PROBLEMS["pairs"]
    J = torchjac.jacobian(f, compile=True)
    for seed in range(3):
        x = value(*shape, seed=seed)
        same(J(x), oracle_jacobian(f)(x))
    assert torchjac.last_run().mode.endswith("kernel")


def test_a_kernel_is_compiled_when_it_pays() -> None:
    """Calls that have taken as long as it takes to compile make a kernel."""
    f, shape = PROBLEMS["pairs"]
    x = value(*shape)
    plan, _ = plan_of(f, x)
    call, entry = Call(f, 0, False, (x,), {}), Entry.of(plan, False)
    entry.observe(Tier.PROGRAM, 10.0, call)
    assert not entry.compiled.program.is_compiled, "what a run took decides nothing"
    after_many_runs(entry, Tier.PROGRAM, call)
    same(entry.compiled_for(Tier.NATIVE)(call), oracle_jacobian(f)(x))


def test_the_order_that_has_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is the fastest as operations may have no kernel, or a longer one, than the other."""
    f, shape = PROBLEMS["the question"]
    x = value(*shape)
    plan, _ = plan_of(f, x)
    (other,) = plan.alternatives
    refused = plan.program.recording

    def refuse(ways: Sequence[tuple[Recording, int]], *how: Any) -> SourceUnit:
        if ways[0][0] is refused:
            raise PlanRefused("not this one")
        return build_source(ways, *how)

    monkeypatch.setattr(compilation, "build_source", refuse)
    plan = kernel_of(plan, f, x)
    assert plan.program.form == f"{other.mode}, kernel"
    y = 0.3 - 0.7 * x
    same(run(plan, f, y), oracle_jacobian(f)(y))


@pytest.mark.parametrize("size", [4, 2000])
def test_signs_of_zeros(size: int) -> None:
    """0 and -0 among numbers that stay are two, written out or in a table."""
    signs = torch.tensor([0.0, -0.0, 1.0, -2.0], dtype=torch.float64).repeat(size // 4)
    check(lambda x: torch.copysign(x, signs) * x.exp(), value(size))


def test_parameters_are_read_anew() -> None:
    """Training changes them in place; the kernel must not have them as numbers."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    net = net.double()
    J = torchjac.jacobian(net, compile=True)
    modes = []
    for seed in range(12):
        x = value(3, seed=seed)
        same(J(x), oracle_jacobian(net)(x))
        modes.append(torchjac.last_run().mode)
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1.1).add_(0.01 * seed)
    assert any(mode.endswith("kernel") for mode in modes[1:])
    net[0].weight.data = net[0].weight.data.t().contiguous().t() * 2
    same(J(x), oracle_jacobian(net)(x))


def test_a_kernel_is_compiled_though_passes_win() -> None:
    """Passes that beat the operations one by one need not beat a kernel of them."""
    f, shape = PROBLEMS["pairs"]
    x = value(*shape)
    plan = replace(plan_of(f, x)[0], passes=1e-3)
    call, entry = Call(f, 0, False, (x,), {}), Entry.of(plan, False)
    for _ in range(4):
        entry.observe(Tier.PROGRAM, 1.0, call)
    for _ in range(3):
        entry.observe(Tier.PASSES, 1e-3, call)
    assert entry.next_tier() is Tier.PASSES
    after_many_runs(entry, Tier.PASSES, call)
    assert entry.next_tier() is Tier.NATIVE
    for _ in range(4):
        entry.observe(Tier.NATIVE, 1e-5, call)
    assert entry.settled_native() is not None


# Integers and truths: where they decide something the derivative is another one, and one point does
# not show it.
DECIDING: dict[str, Function] = {
    "count": lambda x: ((x > 1).sum() > 5) * x.sin() + x,
    "truths added": lambda x: ((x > 0) + (x > 1)).double() * x * x,
    "a truth and a number": lambda x: torch.where((x > 1) > 0.5, x**2, x**3),
    "truths counted": lambda x: torch.where((x > 1).long() + (x > 2).long() == 2, x**2, x**3),
    "truths compared": lambda x: torch.where((x > 1) == (x > 2), x**2, x**3),
    "whole numbers": lambda x: torch.where(x.long() == 2, x**2, x**3),
    "halves": lambda x: torch.where(x.long() > 0.5, x**2, x**3),
    "bits": lambda x: torch.where((x.long() & 1).bool(), x**2, x**3),
    "bits of truths": lambda x: torch.where(((x > 1) & ~(x > 2)) | (x > 3), x**2, x**3),
    "places": lambda x: torch.where(x.view(2, 5).max(0).indices == 1, x[:5] ** 2, x[5:] ** 3),
    "cut off": lambda x: ((x * 0 + 2.7).long().double()) * x.sin(),
}


@pytest.mark.parametrize("name", DECIDING)
def test_what_decides(name: str) -> None:
    """Comparisons of integers and truths were made as truths: right at the first point only."""
    f = DECIDING[name]
    first = torch.full((10,), 0.3, dtype=torch.float64)
    points = [first, torch.linspace(0.6, 3.6, 10, dtype=torch.float64), 4 * value(10)]
    for order in ORDERS:
        for at in points[:2]:
            with contextlib.suppress(CaptureRefused, PlanRefused):
                plan = kernel_of(plan_of(f, at, orders=(order,))[0], f, at)
                for x in points:
                    same(plan(Call(f, 0, False, (x,), {})), oracle_jacobian(f)(x))


def test_exact_zeros_stay() -> None:
    """Fused products leave what the other product was rounded by where both cancel."""

    def f(q: Tensor) -> Tensor:
        a, b = q[:2], q[2:]
        d = a[0] * b[1] - a[1] * b[0]
        regular = d != 0
        return torch.where(regular, (a * b).sum() / torch.where(regular, d, 1.0), (a * b).sum()) * q

    x = value(4)
    plan = kernel_of(plan_of(f, x)[0], f, x)
    at = torch.tensor([0.1, 0.3, 0.1, 0.3], dtype=torch.float64)
    same(plan(Call(f, 0, False, (at,), {})), oracle_jacobian(f)(at))


@pytest.mark.parametrize(
    "f",
    [
        lambda e: torch.nn.functional.embedding(torch.tensor([1, 1, 4, 0]), e).sin(),
        lambda e: e.take(torch.tensor([3, 3, 7])).sin(),
        lambda e: torch.nn.functional.pad(e[None], (1, 1), mode="reflect").sin(),
    ],
    ids=["embedding", "take", "pad"],
)
def test_indices_of_decompositions(f: Function) -> None:
    """They are constants of the program around."""
    check(f, value(5, 3))


def test_negative_views_of_parameters() -> None:
    """Their memory holds the numbers with the other sign."""
    net = torch.nn.Linear(3, 2).double()
    J = torchjac.jacobian(lambda x: net(x).sin(), compile=True)
    for seed in range(12):
        J(value(3, seed=seed))
    net.weight.data = torch._neg_view(value(2, 3))
    for _ in range(4):
        same(J(value(3)), oracle_jacobian(lambda x: net(x).sin())(value(3)))
