"""Lowering of tensor operations: moves run on element ids, other operations create expressions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchjac._torch.trace.ir import Instruction, Value
from torchjac._torch.trace.recording import Recording, decomposition_of, map_values, values_in
from torchjac.compiler.codegen.element_ids import (
    BITS,
    bits,
    comparison_dtype,
    dtype_of,
    group_by_expression,
    split_ids,
    with_strides,
)
from torchjac.compiler.codegen.expressions import Expressions
from torchjac.compiler.codegen.ops_factorize import FACTORS
from torchjac.compiler.codegen.ops_pointwise import POINTWISE
from torchjac.compiler.codegen.ops_reduce import CONTRACTIONS
from torchjac.compiler.codegen.scalar_ir import (
    SCALAR,
    ArrayRef,
    Deployment,
    Domain,
    Granularity,
    Indices,
)
from torchjac.compiler.codegen.scalar_ops import PREDICATES
from torchjac.compiler.program.optimize import fold_constants
from torchjac.errors import PlanRefused
from torchjac.ops import IN_PLACE, Fact, operators_with

EXPRESSIONS = 40_000  # scalar operations of a program: more are refused
_LITERAL_ELEMENTS = 4096  # elements: a constant of an unrolled program becomes literals
_LITERAL_VALUES = 16  # different numbers: a constant of any program becomes literals


class Lowering:
    """Runs calls on element ids.

    Args:
        granularity: The elements that share an expression.
        samples: The leading size of tensors that hold independent samples.
        deployment: The place where the program runs.
        most: The number of expressions that is allowed.

    Attributes:
        expressions: All expressions so far.
        granularity: The elements that share an expression.
        tables: The constant tables.
        live: The parameters whose numbers may change between calls.
        batched_inputs: The inputs that hold samples.
    """

    def __init__(self, granularity: Granularity, samples: int, deployment: Deployment, most: int):
        self._deployment = deployment
        self.granularity = granularity
        self.live: dict[ArrayRef, Tensor] = {}
        self.batched_inputs: set[ArrayRef] = set()
        of_samples = (Granularity.SAMPLES, Granularity.MATRICES)
        self._count = samples if granularity in of_samples else 0
        self._samples = Domain(samples) if granularity is Granularity.SAMPLES else None
        self.expressions = Expressions(most)
        self.tables: dict[ArrayRef, Tensor] = {}
        self._recording = Recording((), (), (), ())
        self._arrays: dict[ArrayRef, Tensor] = {}
        self._ids: dict[int, Any] = {}
        # Inputs of a decomposition: the tensor behind each, and the recording of that tensor.
        self._outer: dict[int, tuple[Value, Recording]] = {}
        self._recordings: list[Recording] = []

    def outputs(
        self, recording: Recording, calls: Sequence[Instruction], count: int
    ) -> list[tuple[Indices, Indices]]:
        """The expression and the point of each element of the first outputs of a recording."""
        self._recording = recording
        for i, value in enumerate(recording.inputs):
            if self._count and value.shape and value.shape[0] == self._count:
                self.batched_inputs.add(ArrayRef("in", i))
            if value.dtype.is_floating_point:
                ids = self._array(ArrayRef("in", i), value.shape, dtype_of(value))
                self._ids[id(value)] = ids
        for call in calls:
            self._run(call)
        results = []
        for result in recording.outputs[:count]:
            assert result is not None
            dtype_of(result)
            results.append(split_ids(self.ids(result).reshape(-1).numpy()))
        return results

    def _run(self, call: Instruction) -> None:
        operation = call.operation
        if call.drawn_from is not None:
            raise PlanRefused(f"{operation} draws random numbers")
        build = POINTWISE.get(operation)
        if build is not None:
            (result,) = call.results
            self._set(call, self._pointwise(build, call, dtype_of(result)))
        elif operation in IN_PLACE:
            target = call.args[0]
            lowered = self._pointwise(POINTWISE[IN_PLACE[operation]], call, dtype_of(target))
            self.ids(target).copy_(lowered)
            self._set(call, self.ids(target))
        elif operation in CONTRACTIONS or operation in FACTORS:
            build = CONTRACTIONS.get(operation) or FACTORS[operation]
            self._set(call, build(self, *call.args, **call.kwargs))
        elif operation in _MOVES:
            self._move(call)
        else:
            self._decompose(call)

    def _decompose(self, call: Instruction) -> None:
        """Runs the operations of torch's decomposition of a call."""
        lowered = decomposition_of(call)
        if lowered is None:
            raise PlanRefused(f"{call.operation} has no scalar form")
        lowered = fold_constants(lowered)
        arguments = values_in((*call.args, *call.kwargs.values()))
        for inner, outer in zip(lowered.inputs, arguments, strict=True):
            if outer.dtype.is_floating_point or outer.kind != "constant":
                self._ids[id(inner)] = self.ids(outer)
        within, self._recording = self._recording, lowered
        self._outer |= {id(i): (o, within) for i, o in zip(lowered.inputs, arguments, strict=True)}
        try:
            for part in lowered.calls:
                self._run(part)
            ids = [None if v is None else self.ids(v) for v in lowered.outputs]
        finally:
            self._recording = within
        self._recordings.append(lowered)  # an id must not be used twice
        self._set(call, ids[0] if call.is_single else ids)

    def _set(self, call: Instruction, lowered: Any) -> None:
        if call.is_single:
            (result,) = call.results
            assert result is not None
            self._ids[id(result)] = with_strides(lowered, result)
            return
        for result, part in zip(call.results, lowered, strict=True):
            if result is not None:
                self._ids[id(result)] = with_strides(part, result)

    def _move(self, call: Instruction) -> None:
        """Runs an operation that moves elements."""
        schema = call.operation._schema.arguments
        names = [a.name for a in schema]
        arguments: dict[str, Any] = dict(zip(names, call.args, strict=False)) | call.kwargs
        lowered = call.results[0]
        assert lowered is not None
        for name, argument in arguments.items():
            if name in ("index", "indices"):
                arguments[name] = map_values(argument, self.fixed_values)
            elif name in ("dtype", "pin_memory", "layout", "device", "memory_format"):
                arguments[name] = None
            elif name in ("value", "fill_value") and not isinstance(argument, Value):
                arguments[name] = self.constant_id(argument, dtype_of(lowered))
            else:
                arguments[name] = map_values(argument, lambda v: self.cast(v, dtype_of(lowered)))
        if call.operation in _FILLS:
            number = arguments.get("fill_value", self.constant_id(0.0, dtype_of(lowered)))
            self._set(call, torch.full(lowered.shape, number))
            return
        positional = [
            arguments.pop(a.name) for a in schema if not a.kwarg_only and a.name in arguments
        ]
        arguments = {k: v for k, v in arguments.items() if v is not None}
        self._set(call, call.operation(*positional, **arguments))

    def fixed_values(self, value: Value) -> Tensor:
        """The numbers of a tensor that does not vary, for an index."""
        recording = self._recording
        while id(value) in self._outer:
            value, recording = self._outer[id(value)]
        if value.kind != "constant":
            raise PlanRefused("an index depends on values")
        return recording.constants[value.position]

    def ids(self, value: Value) -> Tensor:
        """The element ids of a tensor."""
        ids = self._ids.get(id(value))
        if ids is None:
            if value.kind != "constant":
                raise PlanRefused(f"it reads a tensor of {value.dtype}")
            ids = self._ids[id(value)] = self._constant(value)
        assert isinstance(ids, Tensor)
        return ids

    def _array(self, array: ArrayRef, shape: torch.Size, dtype: str) -> Tensor:
        """The element ids of an array."""
        if array not in self._arrays:
            self._arrays[array] = self._elements(array, shape, dtype)
        return self._arrays[array]

    def _elements(self, array: ArrayRef, shape: torch.Size, dtype: str) -> Tensor:
        size = math.prod(shape)
        domain = self._samples
        each = domain is not None and len(shape) > 0 and shape[0] == domain.size
        if self.granularity is Granularity.ELEMENTS or (domain is not None and not each):
            numbers = [self.expressions.load(array, dtype, SCALAR, 0, k) for k in range(size)]
            return (torch.tensor(numbers, dtype=torch.int64) << BITS).view(shape)
        if domain is not None:
            step = size // domain.size
            numbers = [self.expressions.load(array, dtype, domain, step, k) for k in range(step)]
            operand_ids = torch.tensor(numbers, dtype=torch.int64) << BITS
            return (operand_ids[None] + torch.arange(domain.size)[:, None]).view(shape)
        number = self.expressions.load(array, dtype, Domain(size))
        return ((number << BITS) + torch.arange(size)).view(shape)

    def _constant(self, value: Value) -> Tensor:
        tensor = self._recording.constants[value.position]
        if value.base.varies and self._deployment is Deployment.PROCESS:
            array = ArrayRef("live", len(self.live))
            self.live[array] = tensor
            return with_strides(self._array(array, tensor.shape, dtype_of(value)), value)
        tensor = tensor.detach()
        once = tensor[tuple(slice(0, 1) if not step else slice(None) for step in tensor.stride())]
        return with_strides(self._numbers(once, value).expand(tensor.shape), value)

    def _numbers(self, tensor: Tensor, value: Value) -> Tensor:
        """The element ids of a tensor that does not vary."""
        dtype, size = dtype_of(value), tensor.numel()
        if (one := self._of_one_sample(tensor)) is not None:
            return self._for_all(self._numbers(one, value), tensor.shape)
        different, where = bits(tensor).unique(return_inverse=True)  # type: ignore[no-untyped-call]
        few = len(different) <= _LITERAL_VALUES or (
            self.granularity.unrolls and size <= _LITERAL_ELEMENTS
        )
        if few:
            numbers = [self.constant_id(x, dtype) for x in different.view(tensor.dtype).tolist()]
            return torch.tensor(numbers, dtype=torch.int64)[where]
        return self._table(tensor, dtype)

    def _table(self, tensor: Tensor, dtype: str) -> Tensor:
        array = ArrayRef("table", len(self.tables))
        self.tables[array] = tensor.contiguous()
        return self._array(array, tensor.shape, dtype)

    def matmul_ids(self, value: Value) -> Tensor:
        """The element ids of a factor: points of one table where possible."""
        temporaries = (
            self.granularity is Granularity.MATRICES
            and value.kind == "constant"
            and not value.base.varies
        )
        if temporaries and id(value) not in self._ids:
            tensor = self._recording.constants[value.position].detach()
            one = self._of_one_sample(tensor)
            once = tensor if one is None else one
            if once.numel() > _LITERAL_VALUES:
                ids = self._table(once, dtype_of(value))
                ids = ids if one is None else self._for_all(ids, tensor.shape)
                self._ids[id(value)] = with_strides(ids, value)
        return self.ids(value)

    def _of_one_sample(self, tensor: Tensor) -> Tensor | None:
        """The numbers of one sample, if all samples have the same numbers."""
        size = tensor.numel()
        if not self._count or not size or size % self._count:
            return None
        rows = tensor.reshape(self._count, -1)
        return rows[0] if bool((bits(rows) == bits(rows[:1])).all()) else None

    def _for_all(self, ids: Tensor, shape: torch.Size) -> Tensor:
        """The element ids of one sample, repeated for all samples."""
        return ids.expand(self._count, len(ids)).reshape(shape)

    def constant_id(self, number: float, dtype: str) -> int:
        """The element id of a number."""
        if dtype == "int64" and not abs(number) <= 2**53:
            raise PlanRefused("an integer that is larger than 2**53")
        return self.expressions.constant(float(number), dtype) << BITS

    def cast(self, value: Value, dtype: str) -> Tensor:
        """The element ids of a tensor in another dtype."""
        ids = self.ids(value)
        have = dtype_of(value)
        return ids if have == dtype else self._converted(ids, have, dtype)

    def _converted(self, ids: Tensor, have: str, dtype: str) -> Tensor:
        if dtype == "int64" and have != "bool":
            raise PlanRefused("floating-point numbers become integers")
        return self.apply("truth" if dtype == "bool" else "cast", dtype, [ids])

    def _pointwise(self, build: Callable[..., Any], call: Instruction, dtype: str) -> Tensor:
        """Runs a pointwise operation; operands are cast to the dtype in which torch computes."""
        inner = comparison_dtype(call) if dtype == "bool" else dtype
        dtypes: dict[int, str] = {}

        def operand(x: Any, want: str) -> Tensor:
            if not isinstance(x, Tensor):
                return torch.tensor(self.constant_id(x, want))
            have = dtypes.get(id(x), want)
            return x if have == want else self._converted(x, have, want)

        temporaries = []

        def do(kind: str, *operands: Any) -> Tensor:
            of = "bool" if kind in ("and", "or", "xor", "not") else inner
            if kind == "where":
                operand_ids = [
                    operand(operands[0], "bool"),
                    *(operand(x, dtype) for x in operands[1:]),
                ]
            elif kind == "ne" and all(dtypes.get(id(x)) == "bool" for x in operands):
                operand_ids = [operand(x, "bool") for x in operands]
            else:
                operand_ids = [operand(x, of) for x in operands]
            result_dtype = "bool" if kind in PREDICATES else (dtype if kind == "where" else inner)
            if kind not in PREDICATES and kind not in _OF_INTEGERS.get(result_dtype, (kind,)):
                raise PlanRefused(f"{kind} of {result_dtype}")
            lowered = self.apply(kind, result_dtype, operand_ids)
            dtypes[id(lowered)] = result_dtype
            temporaries.append(lowered)  # or another may get its id
            return lowered

        def ids(v: Value) -> Tensor:
            ids = self.ids(v).view(self.ids(v).shape)
            dtypes[id(ids)] = dtype_of(v)
            temporaries.append(ids)
            return ids

        args = [map_values(a, ids) for a in call.args]
        kwargs = {k: map_values(a, ids) for k, a in call.kwargs.items()}
        lowered = build(do, *args, **kwargs)
        return operand(lowered, dtype)

    def apply(self, kind: str, dtype: str, operands: Sequence[Tensor]) -> Tensor:
        """The element ids of a scalar operation on broadcast operands."""
        operands = torch.broadcast_tensors(*operands)  # type: ignore[no-untyped-call]
        shape = operands[0].shape
        flat = [o.reshape(-1).numpy() for o in operands]
        if not len(flat[0]):
            return torch.empty(shape, dtype=torch.int64)
        if self.granularity is Granularity.ELEMENTS:
            return torch.from_numpy(self._scalar(kind, dtype, flat)).view(shape)
        split = [split_ids(x) for x in flat]
        lowered = np.empty(len(flat[0]), dtype=np.int64)
        for numbers, chosen in group_by_expression([n for n, _ in split]):
            indices = [p if chosen is None else p[chosen] for _, p in split]
            number, points = self._many(kind, dtype, numbers, indices)
            lowered[slice(None) if chosen is None else chosen] = (number << BITS) + points
        return torch.from_numpy(lowered).view(shape)

    def _many(
        self, kind: str, dtype: str, numbers: Sequence[int], indices: Sequence[Indices]
    ) -> tuple[int, Indices]:
        """A scalar operation on points; equal columns of points of a sample are computed once."""
        again = None
        if self._samples is not None and len(indices[0]) > self._samples.size:
            columns, again = np.unique(np.stack(indices), axis=1, return_inverse=True)
            indices = list(columns)
        number, points = self.expressions.pointwise(
            kind, dtype, list(zip(numbers, indices, strict=True))
        )
        return number, points if again is None else points[again.reshape(-1)]

    def _scalar(self, kind: str, dtype: str, flat: Sequence[Indices]) -> Indices:
        single, seen = self.expressions.scalar, {}
        lowered = []
        for operand_ids in zip(*[x.tolist() for x in flat], strict=True):
            if operand_ids not in seen:
                seen[operand_ids] = single(kind, dtype, [c >> BITS for c in operand_ids]) << BITS
            lowered.append(seen[operand_ids])
        return np.array(lowered, dtype=np.int64)


_FILLS = operators_with(Fact.FILL)
_MOVES = operators_with(Fact.MOVE)


# Scalar operations of these dtypes; floating-point dtypes have all operations.
_OF_INTEGERS = {
    "int64": ("add", "sub", "mul", "neg", "where", "maximum", "minimum"),
    "bool": ("where",),
}
