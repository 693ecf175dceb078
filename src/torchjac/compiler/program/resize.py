"""One graph for any number of samples, from recordings with a few numbers of samples."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from torchjac._torch.operators import aten
from torchjac._torch.trace.ir import Instruction, Value
from torchjac._torch.trace.recording import Recording, used_constants


class NotResizable(Exception):
    """The recordings differ by more than sizes; the message names the difference."""


def resize(
    recordings: Sequence[Recording], counts: Sequence[int]
) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """A graph of the inputs and of constants, for any number of samples; and the constants.

    Args:
        recordings: The same operations with different numbers of samples, three or more.
        counts: Numbers of samples: the leading size of those inputs that differ.

    Raises:
        NotResizable: A number of the recordings is no multiple of the samples plus a constant, the
            same one in all of them; or a constant is not the same for all samples.
    """
    return _Resizer(recordings, counts).graph()


class _Resizer:
    def __init__(self, recordings: Sequence[Recording], counts: Sequence[int]):
        self._recordings = recordings
        self._counts = counts
        self._graph = fx.Graph()
        self._nodes: dict[int, fx.Node] = {}  # of values of the first recording
        self._numbers: dict[tuple[int, int], Any] = {}
        self._constants: dict[int, fx.Node] = {}
        self._tensors: list[Tensor] = []
        self._origins = [_origins(r) for r in recordings]

    def graph(self) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
        first, graph = self._recordings[0], self._graph
        for k, value in enumerate(first.inputs):
            self._nodes[id(value)] = graph.placeholder(f"arg{k}")
        used = sorted({*used_constants(first), *_returned(first)})
        fits = {position: self._fitted(position) for position in used}
        holders = {position: self._placeholders(fit) for position, fit in fits.items()}
        self._samples = self._sample_count()
        for position, fit in fits.items():
            self._constants[position] = self._constant(fit, holders[position])
        if len({len(r.calls) for r in self._recordings}) > 1:
            raise NotResizable("there are more operations for more samples")
        for calls in zip(*(r.calls for r in self._recordings), strict=True):
            self._call(calls)
        outputs = zip(*(r.outputs for r in self._recordings), strict=True)
        graph.output(tuple([self._argument(values, "the result") for values in outputs]))
        return fx.GraphModule({}, graph), tuple(self._tensors)

    def _sample_count(self) -> fx.Node:
        """The number of samples."""
        for values in zip(*(r.inputs for r in self._recordings), strict=True):
            if tuple(v.shape[0] if v.shape else None for v in values) == tuple(self._counts):
                node = self._nodes[id(values[0])]
                return self._graph.call_function(aten.sym_size.int, (node, 0))
        raise NotResizable("no input says how many samples there are")

    def _call(self, calls: Sequence[Instruction]) -> None:
        """Adds one operation, as it is in each recording."""
        first = calls[0]
        name = str(first.operation)
        if any(c.operation is not first.operation or c.drawn_from is not None for c in calls):
            raise NotResizable(f"{name} is another operation for more samples")
        args = self._argument([list(c.args) for c in calls], name)
        names = list(first.kwargs)
        if any(list(c.kwargs) != names for c in calls):
            raise NotResizable(f"{name} has other arguments for more samples")
        kwargs = {k: self._argument([c.kwargs[k] for c in calls], name) for k in names}
        node = self._graph.call_function(first.operation, tuple(args), kwargs)
        if first.is_single:
            (result,) = first.results
            self._nodes[id(result)] = node
            return
        for item, part in enumerate(first.results):
            if part is not None:
                self._nodes[id(part)] = self._graph.call_function(operator.getitem, (node, item))

    def _argument(self, each: Sequence[Any], name: str) -> Any:
        """One argument of an operation.

        Args:
            each: The argument in each recording.
            name: The operation.
        """
        first = each[0]
        if any(type(x) is not type(first) for x in each):
            raise NotResizable(f"an argument of {name} is of another kind for more samples")
        if isinstance(first, Value):
            if first.kind != "constant":
                return self._node(each)
            if any((x.kind, x.position) != (first.kind, first.position) for x in each):
                raise NotResizable(f"{name} takes another constant for more samples")
            return self._constants[first.position]
        if isinstance(first, (list, tuple)):
            if any(len(x) != len(first) for x in each):
                raise NotResizable(f"an argument of {name} has another length for more samples")
            return [self._argument(x, name) for x in zip(*each, strict=True)]
        if isinstance(first, int) and not isinstance(first, bool):
            return self._number(each, name)
        if any(x != first for x in each):
            raise NotResizable(f"an argument of {name} is {each[1]} for more samples, not {first}")
        return first

    def _node(self, each: Sequence[Value]) -> fx.Node:
        """The node of a value: a result of the same call in each recording, or the same input."""
        origins = {where.get(id(x)) for x, where in zip(each, self._origins, strict=True)}
        if len(origins) > 1 or None in origins:
            raise NotResizable("operations take the results of others for more samples")
        return self._nodes[id(each[0])]

    def _number(self, each: Sequence[int], name: str) -> Any:
        """A number as a multiple of the samples plus a constant."""
        counts = self._counts
        factor, rest = divmod(each[1] - each[0], counts[1] - counts[0])
        offset = each[0] - factor * counts[0]
        if rest or any(x != factor * n + offset for x, n in zip(each, counts, strict=True)):
            raise NotResizable(f"{name} is given {', '.join(map(str, each))} for more samples")
        return self._linear(factor, offset)

    def _linear(self, factor: int, offset: int) -> Any:
        """The node of `factor * samples + offset`; the offset itself where the factor is 0."""
        if not factor:
            return offset
        if (factor, offset) not in self._numbers:
            number: Any = self._samples
            if factor != 1:
                number = self._graph.call_function(operator.mul, (number, factor))
            if offset:
                number = self._graph.call_function(operator.add, (number, offset))
            self._numbers[factor, offset] = number
        return self._numbers[factor, offset]

    def _fitted(self, position: int) -> _Fit:
        """The fit of the constant at a position."""
        values = [r.constants[position] for r in self._recordings if position < len(r.constants)]
        if len(values) == len(self._recordings) and len({v.ndim for v in values}) == 1:
            fit = _fit(values, self._counts)
            if fit is not None:
                return fit
        raise NotResizable("a constant is different for each sample, or for more samples")

    def _placeholders(self, fit: _Fit) -> list[fx.Node]:
        """Placeholders for the tensors of a fit."""
        holders = []
        for part in (fit.first, fit.step, fit.growth):
            if part is not None:
                holders.append(self._graph.placeholder(f"constant{len(self._tensors)}"))
                self._tensors.append(part.contiguous())
        return holders

    def _constant(self, fit: _Fit, holders: list[fx.Node]) -> fx.Node:
        """A constant, for as many samples as there are."""
        call, node = self._graph.call_function, holders[0]
        if fit.shape is None:
            return node
        if fit.step is not None:
            options: dict[str, Any] = {
                "dtype": torch.int64,
                "device": fit.first.device,
                "pin_memory": False,
            }
            every = call(aten.arange.default, (self._samples,), options)
            every = call(aten.view.default, (every, [-1] + [1] * (fit.first.ndim - 2)))
            node = call(aten.add.Tensor, (node, call(aten.mul.Tensor, (every, holders[1]))))
        if fit.growth is not None:
            growth = call(aten.mul.Tensor, (holders[-1], self._samples))
            node = call(aten.add.Tensor, (node, growth))
        before, _, *after = fit.first.shape
        sizes: list[Any] = [before, self._samples, *after]
        node = call(aten.expand.default, (node, sizes))
        node = call(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
        shape = [self._linear(factor, offset) for factor, offset in fit.shape]
        return call(aten.view.default, (node, shape))


@dataclass(frozen=True, slots=True)
class _Fit:
    """A constant as a function of the samples: `first + step * s + growth * n` at sample s of n.

    Attributes:
        first: Axes before the samples, samples (one), and axes after the samples.
        step: None where all samples are the same.
        growth: None where the number of samples does not matter.
        shape: Its own shape, each size as a multiple of the samples and a constant; None if it
            does not depend on them at all.
    """

    first: Tensor
    step: Tensor | None = None
    growth: Tensor | None = None
    shape: tuple[tuple[int, int], ...] | None = None


def _fit(values: Sequence[Tensor], counts: Sequence[int]) -> _Fit | None:
    """The fit of a constant; None if there is none.

    Args:
        values: The constant for each number of samples.
        counts: These numbers.
    """
    shapes = list(zip(*(v.shape for v in values), strict=True))
    along = [k for k, sizes in enumerate(shapes) if len(set(sizes)) > 1]
    if not along:
        return _Fit(values[0]) if all(torch.equal(v, values[0]) for v in values) else None
    (axis, *more) = along
    each, rest = divmod(shapes[axis][0], counts[0])
    if more or rest or any(x != each * n for x, n in zip(shapes[axis], counts, strict=True)):
        return None
    whole = tuple((each, 0) if k == axis else (0, size[0]) for k, size in enumerate(shapes))
    before = math.prod(values[0].shape[:axis])
    for outer in (k for k in range(1, each + 1) if each % k == 0):
        split = [v.reshape(before * outer, n, -1) for v, n in zip(values, counts, strict=True)]
        fit = _affine(split, counts)
        if fit is not None:
            return _Fit(*fit, whole)
    return None


def _affine(
    values: Sequence[Tensor], counts: Sequence[int]
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """First, step and growth of values whose axis 1 is that of samples."""
    one, two = values[0], values[1]
    first = one[:, :1]
    if one.dtype != torch.int64:
        same = all(torch.equal(v, first.expand_as(v)) for v in values)
        return (first, None, None) if same else None
    step = one[:, 1:2] - first
    growth = (two[:, :1] - first) // (counts[1] - counts[0])
    first = first - growth * counts[0]
    for v, n in zip(values, counts, strict=True):
        every = torch.arange(n).view(-1, 1)
        if not torch.equal(v, first + step * every + growth * n):
            return None
    return first, step if step.any() else None, growth if growth.any() else None


def _origins(recording: Recording) -> dict[int, tuple[int, int]]:
    """Origin of each value: (-1, input), or the call and which of its results."""
    origins = {id(v): (-1, k) for k, v in enumerate(recording.inputs)}
    for k, call in enumerate(recording.calls):
        origins |= {id(v): (k, item) for item, v in enumerate(call.results) if v is not None}
    return origins


def _returned(recording: Recording) -> list[int]:
    """Positions of constants that the outputs return."""
    return [v.position for v in recording.outputs if v is not None and v.kind == "constant"]
