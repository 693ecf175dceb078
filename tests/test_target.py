"""Programs x targets: each target gives what torch gives, or refuses by name what it cannot do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from accumulating import plan_of
from laws import same, value
from numpy_target import NumpyTarget
from test_accumulate import BATCHED, PROBLEMS, inside
from test_export import CC
from test_kernel import cache  # noqa: F401
from torchjac._torch.trace.recorder import Recorder
from torchjac._torch.trace.recording import Recording, finish_recording
from torchjac.compiler.codegen import schedule
from torchjac.compiler.codegen.build import build_batch_source, build_source
from torchjac.compiler.codegen.executable import Executable
from torchjac.compiler.codegen.schedule import ScheduleKind
from torchjac.compiler.codegen.target import Limits, Target
from torchjac.compiler.codegen.targets import HOST
from torchjac.compiler.native import jacobian_of
from torchjac.errors import CaptureRefused, PlanRefused

Function = Callable[..., Tensor]
NUMPY = NumpyTarget()
TARGETS = [
    pytest.param(HOST, marks=pytest.mark.skipif(CC is None, reason="there is no C compiler")),
    NUMPY,
]
BOTH = pytest.mark.parametrize("target", TARGETS, ids=["C", "NumPy"])
INDEX = torch.tensor([3, 0, 0, 5, 2])
FACES = torch.tensor([[0, 1, 2], [2, 1, 3], [3, 4, 5], [0, 2, 5]])
CORNERS = FACES.view(-1)
WIDE = torch.linspace(-1, 1, 64 * 64).double().reshape(64, 64).sin()

PROGRAMS: dict[str, tuple[Function, tuple[tuple[int, ...], ...]]] = {
    "pointwise": (lambda x, y: (x.sin() * y).exp() / (1 + y * y), ((5, 4), (5, 4))),
    "broadcast": (lambda x, y: x * y[:, None] - 2, ((5, 4), (5,))),
    "comparison": (lambda x, y: torch.where(x > y, x, y.tanh()), ((40,), (40,))),
    "special": (lambda x: torch.erf(x) + torch.lgamma(x.abs() + 1) + torch.digamma(x + 9), ((9,),)),
    "sum": (lambda x: x.sum(1), ((6, 7),)),
    "long sum": (lambda x: x.cos().sum(), ((3000,),)),
    "mean and variance": (lambda x: x.mean(0) + x.var(0), ((9, 8),)),
    "softmax": (lambda x: x.softmax(-1), ((50, 6),)),
    "maximum": (lambda x: x.amax(-1), ((7, 9),)),
    "small product": (lambda x, y: x @ y, ((3, 4), (4, 2))),
    "large product": (lambda x, y: (x @ y).tanh(), ((40, 30), (30, 20))),
    "products": (lambda x, y: torch.bmm(x, y), ((7, 12, 9), (7, 9, 11))),
    "gather": (lambda x: x[INDEX].sin(), ((6, 30),)),
    "scatter": (lambda x, y: x.index_add(0, INDEX, y.exp()), ((6, 3), (5, 3))),
    "mesh": (lambda x: x.index_add(0, CORNERS, x[FACES].sin().reshape(-1, 40)), ((6, 40),)),
    "flip and roll": (lambda x: x.flip(0) * x.roll(1, 1) + x.t().reshape(6, 90), ((6, 90),)),
    "constants beside": (lambda x: torch.cat([x.sin(), torch.ones(900).double(), x]), ((600,),)),
    "solve": (lambda x, y: torch.linalg.solve(x + 9 * torch.eye(3), y), ((3, 3), (3,))),
}


# A list is an index that is made at every call: it would be recorded as values.
OF_SAMPLES = {**BATCHED, "gathered": lambda x: x[:, INDEX] * x[:, :5]}


def of(f: Function, *inputs: Tensor) -> Recording:
    """The operations of a function."""
    recorder = Recorder((), parameters_vary=True)
    for x in inputs:
        recorder.input(x)
    with torch.no_grad(), recorder:
        result = f(*inputs)
    return finish_recording(recorder, [result])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str, dtype: torch.dtype, target: Target) -> None:
    """Every program, at two points."""
    f, shapes = PROGRAMS[name]
    if dtype is torch.float32 and name in ("solve", "constants beside"):
        pytest.skip("it has constants of double precision")
    inputs = [value(*shape, seed=k, dtype=dtype) for k, shape in enumerate(shapes)]
    kernel = Executable(build_source([(of(f, *inputs), 1)], None, target=target))
    for point in (inputs, [inside(0.7 * x.roll(1)) for x in inputs]):
        (got,) = kernel(point) or ()
        same(got, f(*point))


@BOTH
@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_csr], ids=["dense", "csr"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_jacobians(name: str, layout: torch.layout, target: Target) -> None:
    """What the accumulate engine emits."""
    f, shape = PROBLEMS[name]
    x = value(*shape)
    how = {} if layout is torch.strided else {"layout": layout}
    try:
        program = plan_of(f, x, **how)[0].programs[0]
        kernel = Executable(build_source([jacobian_of(program)], None, target=target))
    except (CaptureRefused, PlanRefused) as refusal:
        pytest.skip(f"it is refused: {refusal}"[:100])
    for point in (x, inside(0.7 * x.roll(1))):
        for got, want in zip(kernel([point]) or (), program([point]) or (), strict=True):
            same(got, want)


@BOTH
@pytest.mark.parametrize("many", [7, 32, 65])
@pytest.mark.parametrize("name", OF_SAMPLES)
def test_batches(name: str, many: int, target: Target) -> None:
    """Recorded with seven samples, run with any number."""
    f = OF_SAMPLES[name]
    unit = build_batch_source([(of(f, value(7, 6)), 1)], 7, many, target=target)
    x = value(many, 6, seed=1)
    (got,) = Executable(unit)([x]) or ()
    same(got, f(x))


@BOTH
@pytest.mark.parametrize(
    ("kind", "f", "shape"),
    [
        (ScheduleKind.SERIAL, lambda x: x.sin() + x.roll(1, 0), (40, 30)),
        (ScheduleKind.PARALLEL, lambda x: x.exp().roll(1, 0).sin().cumsum(0)[-1], (40, 30)),
        (ScheduleKind.PARALLEL, lambda x: x.exp().sum(0).sin() * x, (40, 30)),
        (ScheduleKind.TENSORS, lambda x: (x @ WIDE).tanh() @ WIDE, (9, 64)),
        (ScheduleKind.BATCH, lambda x: (x[:, 0] * x[:, 1])[:, None].sin() * x, (7, 5)),
        (ScheduleKind.BATCH_TENSORS, lambda x: (x @ WIDE).tanh() @ WIDE, (7, 64)),
    ],
    ids=["serial", "parallel", "parallel-sum", "tensors", "batch", "batch-tensors"],
)
def test_schedules(
    kind: ScheduleKind,
    f: Function,
    shape: tuple[int, ...],
    target: Target,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each kind of schedule is a value of the program, and every target runs it."""
    monkeypatch.setattr(schedule, "_PARALLEL_VALUES", 1 if kind is ScheduleKind.PARALLEL else 10**9)
    x = value(*shape)
    parts = [(of(f, x), 1)]
    if kind in (ScheduleKind.BATCH, ScheduleKind.BATCH_TENSORS):
        unit = build_batch_source(parts, len(x), 40, target=target)
        x = value(40, *shape[1:])
    else:
        unit = build_source(parts, None, target=target)
    assert unit.kind is kind
    (got,) = Executable(unit)([x]) or ()
    same(got, f(x))


def test_the_oracle_can_do_what_the_first_target_can() -> None:
    """Else a refusal would pass for agreement."""
    assert NUMPY.limits.operations == HOST.limits.operations
    assert NUMPY.limits.schedules == HOST.limits.schedules
    assert NUMPY.limits.dtypes == HOST.limits.dtypes


class Lesser(NumpyTarget):
    """A target that can do less."""

    def __init__(self, **less: Any):
        self.limits: Limits = replace(NUMPY.limits, **less)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("less", "reason"),
    [
        ({"dtypes": frozenset(("float32",))}, "NumPy does not compute in float64"),
        ({"operations": NUMPY.limits.operations - {"sin"}}, "NumPy has no sin"),
        ({"statements": 1}, "[0-9]+ statements in NumPy"),
        ({"schedules": frozenset((ScheduleKind.BATCH,))}, "NumPy has no serial loops"),
    ],
    ids=["dtypes", "operations", "statements", "schedules"],
)
def test_what_is_beyond_a_target_is_refused(less: dict[str, Any], reason: str) -> None:
    """With the reason, before anything is compiled."""
    parts = [(of(lambda x: x.sin() * 2, value(3, 4)), 1)]
    with pytest.raises(PlanRefused, match=reason):
        build_source(parts, None, target=Lesser(**less))


def test_other_schedules_take_the_place_of_those_that_are_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loops stay serial, and products are written out."""
    monkeypatch.setattr(schedule, "_PARALLEL_VALUES", 1)
    target = Lesser(schedules=frozenset((ScheduleKind.SERIAL,)))
    for f, shape in ((lambda x: x.exp().sum(0).sin() * x, (40, 30)), (lambda x: x @ WIDE, (9, 64))):
        x = value(*shape)
        unit = build_source([(of(f, x), 1)], None, target=target)
        assert unit.kind is ScheduleKind.SERIAL
        (got,) = Executable(unit)([x]) or ()
        same(got, f(x))


def test_other_devices_are_errors() -> None:
    """Addresses of another device never reach a target."""
    kernel = Executable(
        build_source([(of(torch.sin, value(3)), 1)], None, target=Lesser(device="meta"))
    )
    with pytest.raises(ValueError, match="a kernel for"):
        kernel([value(3)])


@BOTH
@pytest.mark.parametrize("samples", [None, 40], ids=["serial", "batch"])
@pytest.mark.parametrize("name", ["log", "div", "sqrt"])
def test_what_is_not_finite_is_said(name: str, samples: int | None, target: Target) -> None:
    """Each target leaves it to passes, wherever it is."""
    f = {"log": torch.log, "div": lambda x: 1 / x, "sqrt": torch.sqrt}[name]
    bad = {"log": -1.0, "div": 0.0, "sqrt": -1.0}[name]
    parts = [(of(f, torch.full((7, 2), 2.0, dtype=torch.float64)), 1)]
    if samples is None:
        unit = build_source(parts, None, target=target)
    else:
        unit = build_batch_source(parts, 7, samples, target=target)
    kernel = Executable(unit)
    x = torch.full((samples or 7, 2), 2.0, dtype=torch.float64)
    assert kernel([x]) is not None
    for place in ((0, 0), (-1, 1)):
        y = x.clone()
        y[place] = bad
        assert kernel([y]) is None
