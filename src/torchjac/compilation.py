"""Plans as compiled code: by the kernel engine, or by Inductor, where that runs faster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter

import torch
from torch import Tensor

from torchjac.engines.accumulate import Emitted, elsewhere
from torchjac.engines.kernel import LIMIT, Kernel, written
from torchjac.errors import PlanRefused

# Seconds that making a kernel takes: at least, and for each number that the operations give.
_KERNEL, _KERNEL_NUMBER = 0.5, 1e-7
# Runs of which the best counts.
_RUNS = 5
# Disagreement put down to rounding, by dtype: of an element, and beside the largest one. Sine and
# its kin are within four units in the last place, and what follows may cancel.
_ROUNDING = {torch.float64: (1e-7, 2e-11), torch.float32: (1e-2, 1e-5)}


def kernel_seconds(emitted: Emitted) -> float:
    """Seconds that it should take to make a kernel of a program."""
    numbers = sum(
        math.prod(v.shape) for c in emitted.recording.calls for v in c.results if v is not None
    )
    return _KERNEL + _KERNEL_NUMBER * numbers


def with_kernel(
    emitted: Emitted, inputs: Sequence[Tensor], samples: int | None, limit: float = LIMIT
) -> Emitted:
    """The same program as a kernel, which gives the same here.

    Args:
        emitted: The program.
        inputs: What to try it on.
        samples: How many independent samples there are, if there are such.
        limit: Seconds that the compiler may take.

    Raises:
        PlanRefused: There is no kernel of it, or it gives something else.
    """
    try:
        return _with_kernel(emitted, inputs, samples, limit)
    except PlanRefused:
        raise
    except Exception as error:  # the operations give the result; the record says what went wrong
        raise PlanRefused(f"{type(error).__name__}: {error}") from error


def _with_kernel(
    emitted: Emitted, inputs: Sequence[Tensor], samples: int | None, limit: float
) -> Emitted:
    program = written([(emitted.recording, len(emitted.recording.outputs) - 1)], samples)
    kernel = Kernel(program, limit)
    made = replace(emitted, run=emitted.module.forward, kernel=kernel, note=None)
    with torch.no_grad():
        want, got = emitted(inputs), made([elsewhere(x) for x in inputs])
    if want is None or got is None or not all(map(agree, got, want)):
        raise PlanRefused("the kernel does not give what its operations give")
    return made


def faster(ways: Sequence[Emitted], inputs: Sequence[Tensor]) -> tuple[Emitted, list[float]]:
    """Which way is the fastest here, and the seconds that each takes."""
    seconds = [timed(way, inputs, _RUNS) for way in ways]
    return ways[seconds.index(min(seconds))], seconds


def timed(way: Emitted, inputs: Sequence[Tensor], runs: int) -> float:
    """Seconds of the best of some runs."""
    best = math.inf
    for _ in range(runs):
        started = perf_counter()
        with torch.no_grad():
            way(inputs)
        best = min(best, perf_counter() - started)
    return best


def agree(got: Tensor, want: Tensor) -> bool:
    """Whether two results differ by rounding only."""
    if not want.numel():
        return True
    relative, absolute = _ROUNDING[want.dtype]
    allowed = relative * want.abs() + absolute * want.abs().amax()
    return bool(((got - want).abs() <= allowed).all())
