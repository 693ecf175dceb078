"""Every differentiable op PyTorch describes in its own OpInfo tables, against the row loop.

The law: ``jac`` on the op's graph, ``jacobian`` of the op, and every plan that can be forced all
give the row loop's Jacobian, or the plan says why it is not possible. What torch itself cannot
differentiate is listed, with the reason, in ``opinfo_exceptions``; the list is checked both ways.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

import torchjac
from laws import PLANS, oracle, oracle_jacobian, quiet, same, under_plan
from opinfo_exceptions import NO_ORACLE, NOT_FOR_CPU, RESEEDED_DIFFERS, TORCH_DISAGREES

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing torch's tables warns about torch's own code
    from torch.testing._internal.common_methods_invocations import op_db

LOOKED_AT = 24  # samples generated per op
COMPARED = 4  # samples compared per op, spread over those
ROWS = 48  # outputs longer than this are cut: the row loop costs a pass per element
ENTRIES = 20_000  # a larger Jacobian is only used when the op has no smaller sample


def name(op: Any) -> str:
    """The op's name with its variant, as PyTorch prints it."""
    return op.name + (f".{op.variant_test_name}" if op.variant_test_name else "")


OPS = {name(op): op for op in op_db if op.supports_autograd}
REAL = [n for n, op in OPS.items() if torch.float64 in op.supported_dtypes("cpu")]
COMPLEX = {
    n: op.supported_dtypes("cpu") & {torch.complex64, torch.complex128} for n, op in OPS.items()
}
COMPLEX_ONLY = [n for n in OPS if n not in REAL and COMPLEX[n]]


class Case:
    """One sample of one op, as a function of its float tensors with a fixed seed."""

    def __init__(self, op: Any, sample: Any) -> None:
        """Split the sample into the float tensors and everything else."""
        self.run, self.sample = op, sample
        leaves, self.spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        self.leaves = leaves
        self.places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and wanted(x)]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Fresh leaves that require grad."""
        return tuple(self.leaves[i].detach().clone().requires_grad_() for i in self.places)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The op's real floating outputs, each cut to at most ROWS elements."""
        return tuple(x.reshape(-1)[:ROWS] if x.numel() > ROWS else x for x in self.raw(*tensors))

    def raw(self, *tensors: Tensor) -> list[Tensor]:
        """All floating and complex outputs of the op."""
        # Ops such as batch_norm write to their running statistics: every run gets its own.
        leaves = [x.clone() if isinstance(x, Tensor) else x for x in self.leaves]
        for i, x in zip(self.places, tensors, strict=True):
            leaves[i] = x
        first, args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        torch.manual_seed(17)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations and notes of the op under test
            out = self.sample.output_process_fn_grad(self.run(first, *args, **kwargs))
        outs = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        return [x for x in outs if x.dtype.is_floating_point or x.dtype.is_complex]

    @property
    def size(self) -> int:
        """Entries of the Jacobian after the cut."""
        inputs = sum(self.leaves[i].numel() for i in self.places)
        return inputs * sum(x.numel() for x in self(*self.tensors))


def wanted(x: Tensor) -> bool:
    """A dense real tensor that the sample says is differentiable (weights of losses are not)."""
    return x.requires_grad and x.dtype.is_floating_point and x.layout == torch.strided


def cases(n: str, dtype: torch.dtype = torch.float64) -> list[Case]:
    """At most COMPARED samples of the op, spread over the first LOOKED_AT, huge ones left out."""
    op = OPS[n]
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = op.sample_inputs("cpu", dtype, requires_grad=True, set_seed=True)
        samples_of_op = [Case(op, s) for s in itertools.islice(samples, LOOKED_AT)]
    if dtype.is_complex:
        return samples_of_op[:1]
    samples_of_op = [c for c in samples_of_op if c.places]
    small = [c for c in samples_of_op if c.size <= ENTRIES] or sorted(
        samples_of_op, key=lambda c: c.size
    )[:1]
    step = max(1, len(small) // COMPARED)
    return small[::step][:COMPARED]


def trusted(case: Case) -> Any:
    """The oracle's Jacobian, or None where an output is complex and torchjac has to refuse."""
    leaves = case.tensors
    outputs = case(*leaves)
    if any(x.dtype.is_complex for x in outputs):
        return None
    return oracle(outputs, leaves)


def every_output_matches(case: Case, expected: Any) -> None:
    """Law: both entry points equal the oracle; complex outputs are refused."""
    leaves = case.tensors
    function = torchjac.jacobian(case, tuple(range(len(leaves))))
    if expected is None:
        with pytest.raises(torchjac.DtypeError):
            torchjac.jac(case(*leaves), leaves, allow_unused=True)
        with pytest.raises(torchjac.DtypeError):
            function(*leaves)
        return
    with quiet():
        same(torchjac.jac(case(*leaves), leaves, allow_unused=True), expected)
        same(function(*(x.detach() for x in leaves)), expected)


def every_plan_matches(case: Case, expected: Any) -> None:
    """Law: a forced plan gives the oracle's Jacobian or refuses with a reason."""
    leaves = case.tensors
    argnums = tuple(range(len(leaves)))
    entries: list[Callable[[], Any]] = [
        lambda: torchjac.jac(case(*leaves), leaves, allow_unused=True),
        lambda: torchjac.jacobian(case, argnums)(*(x.detach() for x in leaves)),
    ]
    for (mode, chunk), entry in itertools.product(PLANS, entries):
        got = under_plan(mode, chunk, entry)
        if got is None:
            continue
        try:
            same(got, expected)
        except AssertionError as wrong:
            raise AssertionError(f"plan {mode}, chunk {chunk}: {wrong}") from wrong


@pytest.mark.parametrize("n", REAL)
def test_op_matches_the_row_loop(n: str) -> None:
    """Both entry points on several samples, every plan on the smallest one."""
    if n in NO_ORACLE:
        with pytest.raises(RuntimeError):
            [trusted(case) for case in cases(n)]
        return
    samples = cases(n)
    assert samples, "no sample with a float tensor: list the op with its reason"
    if n in RESEEDED_DIFFERS:
        assert any(not repeatable(c) for c in samples), "repeats itself now: take it off the list"
        return
    checked = [(case, trusted(case)) for case in samples]
    if n in TORCH_DISAGREES:
        with pytest.raises(AssertionError):
            [every_output_matches(*pair) or every_plan_matches(*pair) for pair in checked]
        return
    for case, expected in checked:
        every_output_matches(case, expected)
    real_cases = [(c, e) for c, e in checked if e is not None]
    if real_cases:
        # The smallest Jacobian that is not empty shows more than an empty one.
        every_plan_matches(*min(real_cases, key=lambda ce: (ce[0].size == 0, ce[0].size)))


def repeatable(case: Case) -> bool:
    """Whether two seeded runs of the row loop agree."""
    first, second = (oracle_jacobian(case, 0)(*case.tensors) for _ in range(2))
    try:
        same(first, second)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("n", [n for n in REAL if OPS[n].get_inplace() and n not in NO_ORACLE])
def test_in_place_variant_matches_the_row_loop(n: str) -> None:
    """The op writes to a copy of its input, as user code does: one sample, both entry points."""
    for case in cases(n)[:1]:
        variant = Case(OPS[n], case.sample)
        variant.run = lambda x, *args, **kwargs: OPS[n].get_inplace()(x.clone(), *args, **kwargs)
        try:
            expected = trusted(variant)
        except RuntimeError:
            continue  # the result does not fit into the input, or torch has no gradient for it
        every_output_matches(variant, expected)


@pytest.mark.parametrize("n", COMPLEX_ONLY)
def test_complex_only_op_is_refused(n: str) -> None:
    """Ops that take only complex tensors: a clear error, never a guess."""
    dtype = max(COMPLEX[n], key=str)
    for case in cases(n, dtype):
        first, rest, named = case.sample.input, case.sample.args, case.sample.kwargs

        def op(x: Tensor, case: Case = case, rest: Any = rest, named: Any = named) -> Any:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return pytree.tree_leaves(case.run(x, *rest, **named))

        with pytest.raises(torchjac.DtypeError):
            torchjac.jac(op(first), first)
        with pytest.raises(torchjac.DtypeError):
            torchjac.jacobian(op)(first.detach())


def test_every_op_is_tested_or_listed() -> None:
    """No op drops out of sight: real, complex only, or listed as impossible on a CPU."""
    assert set(OPS) - set(REAL) - set(COMPLEX_ONLY) == set(NOT_FOR_CPU)
    assert {*NO_ORACLE, *RESEEDED_DIFFERS, *TORCH_DISAGREES} <= set(REAL)
