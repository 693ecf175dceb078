"""The cost model of operations on this machine: measured once, cached on disk."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from torchjac.host import cache_dir as disk
from torchjac.host.clock import now

_VERSION = 1  # version of the file format; files of other versions are ignored
_MEASURE_TIME = 0.05  # seconds: stop repeating a measurement after this long


@dataclass(frozen=True, slots=True)
class CostModel:
    """Costs of operations on one machine.

    Attributes:
        operation: Seconds of overhead of one operation, whatever its size.
        cached: Bytes per second of an elementwise operation on tensors that stay in cache.
        memory: Bytes per second of an elementwise operation on tensors that do not stay in cache,
            with a freshly allocated result.
        product: Multiplications per second in a matrix product.
    """

    operation: float = 2.5e-6
    cached: float = 12e9
    memory: float = 3e9
    product: float = 12e9

    def seconds(self, work: Work) -> float:
        """Predicted seconds of a tensor program."""
        return (
            work.operations * self.operation
            + work.near / self.cached
            + work.far / self.memory
            + work.products / self.product
        )


DEFAULT = CostModel()
_known: dict[str, CostModel] = {}


def cost_model() -> CostModel:
    """The cost model of this machine: measured if `calibrated` has run here, else the default.

    Under `torch.use_deterministic_algorithms(True)` it is the default, so that every run makes the
    same decisions.
    """
    if torch.are_deterministic_algorithms_enabled():
        return DEFAULT
    name = _name()
    if name not in _known:
        _known[name] = _read(name) or DEFAULT
    return _known[name]


def calibrated() -> CostModel:
    """The cost model of this machine; the first call measures, in about 0.1 s."""
    known = cost_model()
    if known is not DEFAULT or torch.are_deterministic_algorithms_enabled():
        return known
    name = _name()
    _known[name] = measured()
    fields = {"version": _VERSION, **asdict(_known[name])}
    disk.write(name, json.dumps(fields).encode())
    return _known[name]


def measured() -> CostModel:
    """Measures the cost model of this machine, in about 0.1 s."""
    one = torch.ones(1, dtype=torch.float64)
    small = torch.ones(2**15, dtype=torch.float64)
    large = torch.ones(LARGE // 8 + 1, dtype=torch.float64)
    square = torch.ones(192, 192, dtype=torch.float64)
    with torch.no_grad():
        operation = _best(lambda: torch.add(one, one), 100)
        near = _best(lambda: torch.add(small, small), 20) - operation
        far = _best(lambda: torch.neg(large), 1)
        product = _best(lambda: torch.mm(square, square), 1)
    return CostModel(
        operation=operation,
        cached=3 * 8 * small.numel() / max(near, 1e-7),
        memory=2 * 8 * large.numel() / far,
        product=square.numel() * 192 / product,
    )


def _best(run: Callable[[], object], times: int) -> float:
    """Seconds of one run: the best of up to five averages over `times` runs."""
    run()
    best = math.inf
    begun = now()
    for _ in range(5):
        started = now()
        for _ in range(times):
            run()
        best = min(best, (now() - started) / times)
        if now() - begun > _MEASURE_TIME:
            break
    return best


def _name() -> str:
    """File name of this machine's cost model; depends on processor, host, torch and threads."""
    host = (platform.machine(), platform.node(), torch.__version__)
    text = f"{host} {torch.get_num_threads()}"
    return f"machine-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _read(name: str) -> CostModel | None:
    """The cost model in a file; None if the file is missing or invalid."""
    data = disk.read(name)
    if data is None:
        return None
    try:
        fields = json.loads(data)
        if fields.pop("version") != _VERSION:
            return None
        costs = CostModel(**{key: float(value) for key, value in fields.items()})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    numbers = asdict(costs).values()
    return costs if all(math.isfinite(v) and v > 0 for v in numbers) else None


# Bytes: an allocator maps larger tensors afresh (glibc: DEFAULT_MMAP_THRESHOLD_MAX).
LARGE = 32 * 2**20
# Bytes: larger tensors do not stay in cache.
_CACHED = 2**20


@dataclass(frozen=True, slots=True)
class Work:
    """The work of a tensor program, in counts.

    Attributes:
        operations: Operations that run, including views.
        multiplications: Numbers that operations compute, plus `products`.
        products: Multiplications in matrix products.
        near: Bytes read and written by operations on tensors that stay in cache.
        far: Bytes read and written by operations on tensors that do not.
    """

    operations: int = 0
    multiplications: int = 0
    products: int = 0
    near: int = 0
    far: int = 0

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.near + self.far

    def __add__(self, other: Work) -> Work:
        """The work of two programs that run one after the other."""
        return Work(
            self.operations + other.operations,
            self.multiplications + other.multiplications,
            self.products + other.products,
            self.near + other.near,
            self.far + other.far,
        )

    def times(self, factor: float) -> Work:
        """The work of the same operations on tensors `factor` times as large."""
        large = factor * self.near / max(self.operations, 1) > _CACHED
        near, far = int(factor * self.near), int(factor * self.far)
        return Work(
            self.operations,
            int(factor * self.multiplications),
            int(factor * self.products),
            0 if large else near,
            near + far if large else far,
        )
