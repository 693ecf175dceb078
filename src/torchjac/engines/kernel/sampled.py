"""A program of one sample, run for any number of them: written down for a few."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torchjac.engines.kernel.expand import Scalars
from torchjac.engines.kernel.expressions import ONE
from torchjac.engines.kernel.loops import Loop, Schedule, Store
from torchjac.engines.kernel.scalars import CTYPES, literal
from torchjac.engines.kernel.source import Writer
from torchjac.engines.kernel.turns import loaded
from torchjac.errors import PlanRefused


def schedule_of_samples(scalars: Scalars, count: int) -> Schedule:
    """One loop, each turn of which is a sample and looks at nothing of another.

    Args:
        scalars: The program for a few samples, every element of a sample an expression.
        count: How many.

    Raises:
        PlanRefused: There is no such loop.
    """
    _check(scalars, count)
    made = over_samples(scalars, count)
    every, (loop,) = np.arange(count), made.loops
    for store in loop.stores:
        alone = scalars.expressions.all[store.expression].lanes is ONE
        if not alone and not (store.lanes == every).all():
            raise PlanRefused("a sample looks at another")
    return made


def over_samples(scalars: Scalars, count: int) -> Schedule:
    """One loop, each turn of which writes what a sample gives.

    Raises:
        PlanRefused: Samples are made by different expressions.
    """
    every = np.arange(count)
    stores, fixed = [], []
    for k, (numbers, lanes) in enumerate(scalars.outputs):
        of, where = numbers.reshape(count, -1), lanes.reshape(count, -1)
        width = of.shape[1]
        if not (of == of[0]).all():
            raise PlanRefused("samples are not computed alike")
        values = np.zeros(width)
        for position, number in enumerate(of[0].tolist()):
            value = scalars.expressions.value(number)
            if value is not None:
                values[position] = value
                continue
            stores.append(Store(number, where[:, position], f"out{k}", position + width * every))
        fixed.append((np.arange(width), values))
    return Schedule((Loop(count, tuple(stores)),), {}, tuple(fixed), ())


def _check(scalars: Scalars, count: int) -> None:
    """Refuses what is not one computation for each sample, on what belongs to it.

    Raises:
        PlanRefused: It is something else.
    """
    every = scalars.expressions.all
    stack = [int(n) for numbers, _ in scalars.outputs for n in np.unique(numbers)]
    seen: set[int] = set()
    while stack:
        number = stack.pop()
        if number in seen:
            continue
        seen.add(number)
        found = every[number]
        if found.lanes is not ONE and found.lanes.size != count:
            raise PlanRefused("samples are not computed one by one")
        if found.kind == "load" and found.lanes is not ONE:
            array, step, start = loaded(found)
            if not array.startswith("in") or start >= step:
                raise PlanRefused("samples read different constants")
        for argument, by in found.arguments:
            if by is not None and not (by.places == by.places[0]).all():
                raise PlanRefused("a sample looks at another")
            if by is not None and every[argument].lanes is not ONE:
                raise PlanRefused("all samples look at one")
            stack.append(argument)


class SampleWriter(Writer):
    """Writes the loop over samples: those from `first` up to `last`."""

    parameters = ", long first, long last"
    joins = False

    def head(self, loop: Loop) -> str:
        """Where the loop begins."""
        return "  for (long i = first; i < last; i++) {"

    def fixed(self, outputs: Sequence[tuple[str, int]]) -> list[str]:
        """Statements that write what does not vary, with zeros in the other places."""
        lines = []
        for k, (dtype, _) in enumerate(outputs):
            _, values = self._plan.fixed[k]
            width = len(values)
            written = {
                int(s.positions[0])
                for x in self._plan.loops
                for s in x.stores
                if s.array == f"out{k}"
            }
            if len(written) == width:
                continue
            if not values.any():
                begin, size = f"out{k} + {width} * first", f"{width} * (last - first)"
                lines.append(f"  memset({begin}, 0, {size} * sizeof(*out{k}));")
                continue
            numbers = ", ".join(literal(v, dtype) for v in values.tolist())
            lines += [
                f"  static const {CTYPES[dtype]} fixed{k}[] = {{{numbers}}};",
                "  for (long i = first; i < last; i++)",
                f"    memcpy(out{k} + {width} * i, fixed{k}, sizeof(fixed{k}));",
            ]
        return lines
