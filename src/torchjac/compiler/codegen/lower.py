"""Tensor operations on codes: what moves elements is run as it is, the rest makes expressions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchjac._torch.trace.ir import Called, Value
from torchjac._torch.trace.recording import Recording, decomposed, mapped, values_in
from torchjac.compiler.codegen.element_ids import BITS, apart, dtype_of, groups, laid_out
from torchjac.compiler.codegen.expressions import Expressions
from torchjac.compiler.codegen.ops_factorize import FACTORS
from torchjac.compiler.codegen.ops_pointwise import POINTWISE
from torchjac.compiler.codegen.ops_reduce import CONTRACTIONS
from torchjac.compiler.codegen.scalar_ir import (
    ONE,
    ArrayRef,
    Deployment,
    Granularity,
    Lanes,
    Places,
)
from torchjac.compiler.codegen.scalar_ops import DTYPES, TRUTHS
from torchjac.compiler.program.optimize import folded
from torchjac.errors import PlanRefused
from torchjac.ops import IN_PLACE, Fact, having

# Expressions there may be.
EXPRESSIONS = 40_000
# Constants with as many elements, or as many different ones, are numbers in the code.
_FEW, _DIFFERENT = 4096, 16


class Expansion:
    """Runs calls on codes.

    Args:
        granularity: Which elements share an expression.
        samples: The leading size of tensors that hold independent samples.
        deployment: Where the program runs.
        most: How many expressions there may be.

    Attributes:
        expressions: What was made so far.
        granularity: Which elements share an expression.
        tables: Constants that are read, by their array.
        live: Tensors from elsewhere whose numbers may change (parameters), in the same way.
        sampled: Inputs that hold samples.
    """

    def __init__(self, granularity: Granularity, samples: int, deployment: Deployment, most: int):
        self._deployment = deployment
        self.granularity = granularity
        self.live: dict[ArrayRef, Tensor] = {}
        self.sampled: set[ArrayRef] = set()
        of_samples = (Granularity.SAMPLES, Granularity.MATRICES)
        self._count = samples if granularity in of_samples else 0
        self._samples = Lanes(samples) if granularity is Granularity.SAMPLES else None
        self.expressions = Expressions(most)
        self.tables: dict[ArrayRef, Tensor] = {}
        self._recording = Recording((), (), (), ())
        self._arrays: dict[ArrayRef, Tensor] = {}
        self._codes: dict[int, Any] = {}
        # Inputs of what an operation was decomposed to; what is given there, and by whom.
        self._given: dict[int, tuple[Value, Recording]] = {}
        self._kept: list[Recording] = []

    def outputs(
        self, recording: Recording, calls: Sequence[Called], count: int
    ) -> list[tuple[Places, Places]]:
        """Runs calls of a recording, and gives what its first outputs are."""
        self._recording = recording
        for i, value in enumerate(recording.inputs):
            if self._count and value.shape and value.shape[0] == self._count:
                self.sampled.add(ArrayRef("in", i))
            if value.dtype.is_floating_point:
                code = self._array(ArrayRef("in", i), value.shape, dtype_of(value))
                self._codes[id(value)] = code
        for call in calls:
            self._run(call)
        found = []
        for result in recording.outputs[:count]:
            assert result is not None
            dtype_of(result)
            found.append(apart(self.code(result).reshape(-1).numpy()))
        return found

    def _run(self, call: Called) -> None:
        operation = call.operation
        if call.drawn_from is not None:
            raise PlanRefused(f"{operation} draws random numbers")
        build = POINTWISE.get(operation)
        if build is not None:
            (result,) = call.results
            self._set(call, self._pointwise(build, call, dtype_of(result)))
        elif operation in IN_PLACE:
            target = call.args[0]
            made = self._pointwise(POINTWISE[IN_PLACE[operation]], call, dtype_of(target))
            self.code(target).copy_(made)
            self._set(call, self.code(target))
        elif operation in CONTRACTIONS or operation in FACTORS:
            build = CONTRACTIONS.get(operation) or FACTORS[operation]
            self._set(call, build(self, *call.args, **call.kwargs))
        elif operation in _MOVES:
            self._move(call)
        else:
            self._decompose(call)

    def _decompose(self, call: Called) -> None:
        """Runs what torch says that an operation does, in terms of others."""
        made = decomposed(call)
        if made is None:
            raise PlanRefused(f"{call.operation} has no scalar form")
        made = folded(made)
        given = values_in((*call.args, *call.kwargs.values()))
        for inner, outer in zip(made.inputs, given, strict=True):
            if outer.dtype.is_floating_point or outer.kind != "constant":
                self._codes[id(inner)] = self.code(outer)
        within, self._recording = self._recording, made
        self._given |= {id(i): (o, within) for i, o in zip(made.inputs, given, strict=True)}
        try:
            for part in made.calls:
                self._run(part)
            found = [None if v is None else self.code(v) for v in made.outputs]
        finally:
            self._recording = within
        self._kept.append(made)  # or another value may get an id of its
        self._set(call, found[0] if call.is_single else found)

    def _set(self, call: Called, made: Any) -> None:
        if call.is_single:
            (result,) = call.results
            assert result is not None
            self._codes[id(result)] = laid_out(made, result)
            return
        for result, part in zip(call.results, made, strict=True):
            if result is not None:
                self._codes[id(result)] = laid_out(part, result)

    def _move(self, call: Called) -> None:
        """Runs an operation that moves elements on codes."""
        schema = call.operation._schema.arguments
        names = [a.name for a in schema]
        given: dict[str, Any] = dict(zip(names, call.args, strict=False)) | call.kwargs
        made = call.results[0]
        assert made is not None
        for name, argument in given.items():
            if name in ("index", "indices"):
                given[name] = mapped(argument, self.known)
            elif name in ("dtype", "pin_memory", "layout", "device", "memory_format"):
                given[name] = None
            elif name in ("value", "fill_value") and not isinstance(argument, Value):
                given[name] = self.number(argument, dtype_of(made))
            else:
                given[name] = mapped(argument, lambda v: self.cast(v, dtype_of(made)))
        if call.operation in _FILLS:
            number = given.get("fill_value", self.number(0.0, dtype_of(made)))
            self._set(call, torch.full(made.shape, number))
            return
        positional = [given.pop(a.name) for a in schema if not a.kwarg_only and a.name in given]
        given = {k: v for k, v in given.items() if v is not None}
        self._set(call, call.operation(*positional, **given))

    def known(self, value: Value) -> Tensor:
        """Numbers that do not vary: indices."""
        recording = self._recording
        while id(value) in self._given:
            value, recording = self._given[id(value)]
        if value.kind != "constant":
            raise PlanRefused("an index depends on values")
        return recording.constants[value.position]

    def code(self, value: Value) -> Tensor:
        """The codes of a tensor."""
        found = self._codes.get(id(value))
        if found is None:
            if value.kind != "constant":
                raise PlanRefused(f"it reads a tensor of {value.dtype}")
            found = self._codes[id(value)] = self._constant(value)
        assert isinstance(found, Tensor)
        return found

    def _array(self, array: ArrayRef, shape: torch.Size, dtype: str) -> Tensor:
        """Codes of the elements of an array."""
        if array not in self._arrays:
            self._arrays[array] = self._elements(array, shape, dtype)
        return self._arrays[array]

    def _elements(self, array: ArrayRef, shape: torch.Size, dtype: str) -> Tensor:
        size = math.prod(shape)
        lanes = self._samples
        each = lanes is not None and len(shape) > 0 and shape[0] == lanes.size
        if self.granularity is Granularity.ELEMENTS or (lanes is not None and not each):
            numbers = [self.expressions.load(array, dtype, ONE, 0, k) for k in range(size)]
            return (torch.tensor(numbers, dtype=torch.int64) << BITS).view(shape)
        if lanes is not None:
            step = size // lanes.size
            numbers = [self.expressions.load(array, dtype, lanes, step, k) for k in range(step)]
            codes = torch.tensor(numbers, dtype=torch.int64) << BITS
            return (codes[None] + torch.arange(lanes.size)[:, None]).view(shape)
        number = self.expressions.load(array, dtype, Lanes(size))
        return ((number << BITS) + torch.arange(size)).view(shape)

    def _constant(self, value: Value) -> Tensor:
        tensor = self._recording.constants[value.position]
        if value.base.varies and self._deployment is Deployment.PROCESS:
            array = ArrayRef("live", len(self.live))
            self.live[array] = tensor
            return laid_out(self._array(array, tensor.shape, dtype_of(value)), value)
        tensor = tensor.detach()
        once = tensor[tuple(slice(0, 1) if not step else slice(None) for step in tensor.stride())]
        return laid_out(self._numbers(once, value).expand(tensor.shape), value)

    def _numbers(self, tensor: Tensor, value: Value) -> Tensor:
        """Codes of a tensor that does not vary."""
        dtype, size = dtype_of(value), tensor.numel()
        if (one := self._of_one_sample(tensor)) is not None:
            return self._for_all(self._numbers(one, value), tensor.shape)
        different, where = _bits(tensor).unique(return_inverse=True)  # type: ignore[no-untyped-call]
        few = len(different) <= _DIFFERENT or (self.granularity.unrolls and size <= _FEW)
        if few:
            numbers = [self.number(x, dtype) for x in different.view(tensor.dtype).tolist()]
            return torch.tensor(numbers, dtype=torch.int64)[where]
        return self._table(tensor, dtype)

    def _table(self, tensor: Tensor, dtype: str) -> Tensor:
        array = ArrayRef("table", len(self.tables))
        self.tables[array] = tensor.contiguous()
        return self._array(array, tensor.shape, dtype)

    def matrix(self, value: Value) -> Tensor:
        """The codes of a tensor that is multiplied: lanes of one expression where it may be."""
        kept = (
            self.granularity is Granularity.MATRICES
            and value.kind == "constant"
            and not value.base.varies
        )
        if kept and id(value) not in self._codes:
            tensor = self._recording.constants[value.position].detach()
            one = self._of_one_sample(tensor)
            once = tensor if one is None else one
            if once.numel() > _DIFFERENT:
                code = self._table(once, dtype_of(value))
                code = code if one is None else self._for_all(code, tensor.shape)
                self._codes[id(value)] = laid_out(code, value)
        return self.code(value)

    def _of_one_sample(self, tensor: Tensor) -> Tensor | None:
        """What it holds for every sample, if that is the same."""
        size = tensor.numel()
        if not self._count or not size or size % self._count:
            return None
        rows = tensor.reshape(self._count, -1)
        return rows[0] if bool((_bits(rows) == _bits(rows[:1])).all()) else None

    def _for_all(self, code: Tensor, shape: torch.Size) -> Tensor:
        """The same codes for every sample."""
        return code.expand(self._count, len(code)).reshape(shape)

    def number(self, number: float, dtype: str) -> int:
        """The code of a number."""
        if dtype == "int64" and not abs(number) <= 2**53:
            raise PlanRefused("an integer that is larger than 2**53")
        return self.expressions.constant(float(number), dtype) << BITS

    def cast(self, value: Value, dtype: str) -> Tensor:
        """The same in another dtype."""
        code = self.code(value)
        have = dtype_of(value)
        return code if have == dtype else self._converted(code, have, dtype)

    def _converted(self, code: Tensor, have: str, dtype: str) -> Tensor:
        if dtype == "int64" and have != "bool":
            raise PlanRefused("floating-point numbers become integers")
        return self.apply("truth" if dtype == "bool" else "cast", dtype, [code])

    def _pointwise(self, build: Callable[..., Any], call: Called, dtype: str) -> Tensor:
        """Runs a pointwise operation; its operands meet in the type that torch computes in."""
        inner = _met(call) if dtype == "bool" else dtype
        dtypes: dict[int, str] = {}

        def operand(x: Any, want: str) -> Tensor:
            if not isinstance(x, Tensor):
                return torch.tensor(self.number(x, want))
            have = dtypes.get(id(x), want)
            return x if have == want else self._converted(x, have, want)

        kept = []

        def do(kind: str, *operands: Any) -> Tensor:
            of = "bool" if kind in ("and", "or", "xor", "not") else inner
            if kind == "where":
                codes = [operand(operands[0], "bool"), *(operand(x, dtype) for x in operands[1:])]
            elif kind == "ne" and all(dtypes.get(id(x)) == "bool" for x in operands):
                codes = [operand(x, "bool") for x in operands]
            else:
                codes = [operand(x, of) for x in operands]
            made_of = "bool" if kind in TRUTHS else (dtype if kind == "where" else inner)
            if kind not in TRUTHS and kind not in _OF_INTEGERS.get(made_of, (kind,)):
                raise PlanRefused(f"{kind} of {made_of}")
            made = self.apply(kind, made_of, codes)
            dtypes[id(made)] = made_of
            kept.append(made)  # or another may get its id
            return made

        def code(v: Value) -> Tensor:
            found = self.code(v).view(self.code(v).shape)
            dtypes[id(found)] = dtype_of(v)
            kept.append(found)
            return found

        args = [mapped(a, code) for a in call.args]
        kwargs = {k: mapped(a, code) for k, a in call.kwargs.items()}
        made = build(do, *args, **kwargs)
        return operand(made, dtype)

    def apply(self, kind: str, dtype: str, operands: Sequence[Tensor]) -> Tensor:
        """The codes of a scalar operation on all elements of operands, which are broadcast."""
        operands = torch.broadcast_tensors(*operands)  # type: ignore[no-untyped-call]
        shape = operands[0].shape
        flat = [o.reshape(-1).numpy() for o in operands]
        if not len(flat[0]):
            return torch.empty(shape, dtype=torch.int64)
        if self.granularity is Granularity.ELEMENTS:
            return torch.from_numpy(self._singly(kind, dtype, flat)).view(shape)
        split = [apart(x) for x in flat]
        made = np.empty(len(flat[0]), dtype=np.int64)
        for numbers, chosen in groups([n for n, _ in split]):
            places = [p if chosen is None else p[chosen] for _, p in split]
            number, lanes = self._many(kind, dtype, numbers, places)
            made[slice(None) if chosen is None else chosen] = (number << BITS) + lanes
        return torch.from_numpy(made).view(shape)

    def _many(
        self, kind: str, dtype: str, numbers: Sequence[int], places: Sequence[Places]
    ) -> tuple[int, Places]:
        """A scalar operation on lanes; what a sample has twice is computed once."""
        again = None
        if self._samples is not None and len(places[0]) > self._samples.size:
            columns, again = np.unique(np.stack(places), axis=1, return_inverse=True)
            places = list(columns)
        number, lanes = self.expressions.many(kind, dtype, list(zip(numbers, places, strict=True)))
        return number, lanes if again is None else lanes[again.reshape(-1)]

    def _singly(self, kind: str, dtype: str, flat: Sequence[Places]) -> Places:
        single, seen = self.expressions.single, {}
        made = []
        for codes in zip(*[x.tolist() for x in flat], strict=True):
            if codes not in seen:
                seen[codes] = single(kind, dtype, [c >> BITS for c in codes]) << BITS
            made.append(seen[codes])
        return np.array(made, dtype=np.int64)


_FILLS = having(Fact.FILL)
_MOVES = having(Fact.MOVE)


def _met(call: Called) -> str:
    """The dtype in which the operands of a comparison meet.

    Raises:
        PlanRefused: Their bits are compared, or no expression has that dtype.
    """
    given: list[Any] = [
        torch.zeros((1,) * min(len(a.shape), 1), dtype=a.dtype) if isinstance(a, Value) else a
        for a in call.args
        if isinstance(a, (Value, int, float))
    ]
    met = torch.result_type(*given) if len(given) == 2 else given[0].dtype
    name = str(met).removeprefix("torch.")
    if "bitwise" in str(call.operation) and name != "bool":
        raise PlanRefused("bits of integers")
    if name == "bool":
        return "int64"  # true is more than false
    if name not in DTYPES:
        raise PlanRefused(f"it compares {name}")
    return name


# What there is of these dtypes; floating-point numbers have everything.
_OF_INTEGERS = {
    "int64": ("add", "sub", "mul", "neg", "where", "maximum", "minimum"),
    "bool": ("where",),
}


def _bits(tensor: Tensor) -> Tensor:
    """Whole numbers that are the same for the same numbers only: 0 and -0 are two."""
    of = {torch.float64: torch.int64, torch.float32: torch.int32}.get(tensor.dtype)
    return tensor if of is None else tensor.view(of)
