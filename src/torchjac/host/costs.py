"""What operations cost on this machine: measured once, kept on disk."""

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

_VERSION = 1
# Seconds that measuring one number may take.
_PATIENCE = 0.05


@dataclass(frozen=True, slots=True)
class Machine:
    """Costs of operations.

    Attributes:
        operation: Seconds that an operation takes by itself.
        cached: Bytes a second through an elementwise operation whose tensors stay in cache.
        memory: Of one whose tensors do not, and whose result is fresh memory.
        product: Multiplications a second in a matrix product.
    """

    operation: float = 2.5e-6
    cached: float = 12e9
    memory: float = 3e9
    product: float = 12e9

    def seconds(self, work: Work) -> float:
        """Predicted time of a straight line of operations."""
        return (
            work.operations * self.operation
            + work.near / self.cached
            + work.far / self.memory
            + work.products / self.product
        )


DEFAULT = Machine()
_known: dict[str, Machine] = {}


def machine() -> Machine:
    """Costs on this machine: as they were measured, if they were, else the default.

    Under `torch.use_deterministic_algorithms(True)` the default, so that every run decides alike.
    """
    if torch.are_deterministic_algorithms_enabled():
        return DEFAULT
    name = _name()
    if name not in _known:
        _known[name] = _read(name) or DEFAULT
    return _known[name]


def calibrated() -> Machine:
    """Costs on this machine; they are measured if they have not been, in a tenth of a second."""
    found = machine()
    if found is not DEFAULT or torch.are_deterministic_algorithms_enabled():
        return found
    name = _name()
    _known[name] = measured()
    about = {"version": _VERSION, **asdict(_known[name])}
    disk.write(name, json.dumps(about).encode())
    return _known[name]


def measured() -> Machine:
    """Measures; takes about a tenth of a second."""
    one = torch.ones(1, dtype=torch.float64)
    small = torch.ones(2**15, dtype=torch.float64)
    large = torch.ones(LARGE // 8 + 1, dtype=torch.float64)
    square = torch.ones(192, 192, dtype=torch.float64)
    with torch.no_grad():
        operation = _best(lambda: torch.add(one, one), 100)
        near = _best(lambda: torch.add(small, small), 20) - operation
        far = _best(lambda: torch.neg(large), 1)
        product = _best(lambda: torch.mm(square, square), 1)
    return Machine(
        operation=operation,
        cached=3 * 8 * small.numel() / max(near, 1e-7),
        memory=2 * 8 * large.numel() / far,
        product=square.numel() * 192 / product,
    )


def _best(run: Callable[[], object], times: int) -> float:
    """Seconds of one run, the best of some."""
    run()
    found = math.inf
    begun = now()
    for _ in range(5):
        started = now()
        for _ in range(times):
            run()
        found = min(found, (now() - started) / times)
        if now() - begun > _PATIENCE:
            break
    return found


def _name() -> str:
    """The file of this machine: its kind of processor, threads, and torch."""
    about = (platform.machine(), platform.node(), torch.__version__)
    text = f"{about} {torch.get_num_threads()}"
    return f"machine-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _read(name: str) -> Machine | None:
    """What was measured before; None where it is not there or makes no sense."""
    data = disk.read(name)
    if data is None:
        return None
    try:
        about = json.loads(data)
        if about.pop("version") != _VERSION:
            return None
        found = Machine(**{key: float(value) for key, value in about.items()})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    numbers = asdict(found).values()
    return found if all(math.isfinite(v) and v > 0 for v in numbers) else None


# Bytes from which on an allocator maps memory for itself (glibc: DEFAULT_MMAP_THRESHOLD_MAX).
LARGE = 32 * 2**20


# Tensors larger than this do not stay in cache.
_CACHED = 2**20


@dataclass(frozen=True, slots=True)
class Work:
    """Counts.

    Attributes:
        operations: Operations that run, views too.
        multiplications: One for each number that an operation computes, and those of `products`.
        products: Multiplications in matrix products.
        near: Bytes read and written by operations on small tensors.
        far: By those on tensors that do not stay in cache.
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
        """One after the other."""
        return Work(
            self.operations + other.operations,
            self.multiplications + other.multiplications,
            self.products + other.products,
            self.near + other.near,
            self.far + other.far,
        )

    def times(self, factor: float) -> Work:
        """The work of the same operations on tensors that are larger by a factor."""
        large = factor * self.near / max(self.operations, 1) > _CACHED
        near, far = int(factor * self.near), int(factor * self.far)
        return Work(
            self.operations,
            int(factor * self.multiplications),
            int(factor * self.products),
            0 if large else near,
            near + far if large else far,
        )
