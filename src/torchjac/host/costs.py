"""The cost model: seconds of passes, tensor programs, native code and of building native code.

Every constant of seconds, and every number of bytes at which memory becomes slower, is here. A
stage counts its work (`ProgramWork`, `PassWork`, `ScalarWork`) and asks the model for seconds.
Two kinds of numbers are no costs, and stay with the decision that they belong to: counts that are
compared with counts (multiplications of an order of elimination, products of a scalar operation),
and limits (seconds that a compiler may take, numbers that a program may hold).

Four constants are measured on this machine, once, and cached on disk (`CostModel`). The others
were measured with torch 2.13.0 on a 2-core AMD EPYC (1 MiB L2 a core), float64.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from torchjac.host import cache_dir as disk
from torchjac.host.clock import now

_VERSION = 1  # version of the file format; files of other versions are ignored
_MEASURE_TIME = 0.05  # seconds: stop repeating a measurement after this long

# Bytes of memory, and what costs more beyond them.

# Tensors of an operation: larger ones do not stay in cache.
CACHED_BYTES = 2**20
# The largest tensor of a chunk of passes: a larger one leaves the cache.
CHUNK_CACHED_BYTES = 2 * 2**20
# The largest tensor of a chunk of passes: the allocator maps a larger one for every operation.
CHUNK_MAPPED_BYTES = 16 * 2**20
# A result that is copied: writing a larger one twice takes longer than any order of its axes.
COPIED_BYTES = 8 * 2**20
# A result: an allocator maps larger memory afresh (glibc: DEFAULT_MMAP_THRESHOLD_MAX).
MAPPED_BYTES = 32 * 2**20

# Seconds of passes. Kinematic chain with 30 joints, 12 rows: 0.85 ms a plain pass, 1.4 ms a
# batched one.

# A plain pass, whatever its operations.
_PASS = 10e-6
# An operation of a plain pass.
_PASS_OPERATION = 2.5e-6
# A batched pass, whatever its operations.
_BATCHED_PASS = 25e-6
# An operation of a batched pass.
_BATCHED_OPERATION = 6e-6
# An operation for each seed, where torch loops inside the operations without a batching rule (a
# third of them or so, a few microseconds each).
_LOOPED_OPERATION = 1e-6
# Random weights, products and comparison of a checked plan, without the extra pass.
_CHECK = 100e-6
# Bytes a second through element-wise backward operations whose tensors stay in cache.
_PASS_BANDWIDTH = 10e9
# Times the seconds of a byte, where the largest tensor of a chunk is out of cache (128 bodies: 112,
# 244 and 480 ms in chunks of 5, 21 and 384 with 2, 8 and 150 MiB tensors).
_UNCACHED = 2.0
# Times the seconds of a byte, where the allocator maps it (Brusselator 32: 22 ms in chunks of 64,
# 94 ms in one; unstructured volumes: 127 ms in chunks of 101, 163 ms in chunks of 404).
_MAPPED = 4.0
# Operations of a plain pass to build the transposed graph, for each operation of the backward
# graph: a backward pass that records itself, and a second product as a check.
_TRANSPOSED_BUILD = 3
# Times the seconds of the passes, for passes over the transposed graph.
_TRANSPOSED = 1.2

# Seconds of tensor operations while terms of an adjoint are merged.

# An operation that a merged term saves.
_MERGE_OPERATION = 4e-6
# A number of the merged term.
_MERGE_NUMBER = 4e-9
# Multiplications of a matrix product in the time that the operations of one product take to start.
PRODUCT_START = 60_000

# Seconds of native code.

# A scalar product, one by one.
_SCALAR_PRODUCT = 0.05e-9
# A product for each byte of its number, where several go through registers together.
_TILED_PRODUCT_BYTE = 0.0045e-9
# Scalar products in the time of looking up a byte of a table (meshes, pairs, cameras).
_TABLE_BYTE = 0.6
# Seconds of work that pay for a thread: waking one takes about a fifth of that.
_THREAD = 25e-6

# Seconds of building native code.

# The C compiler, whatever the program.
_BUILD = 0.5
# Lowering, for each number that the operations compute.
_LOWERED_NUMBER = 7e-8


@dataclass(frozen=True, slots=True)
class ProgramWork:
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

    def __add__(self, other: ProgramWork) -> ProgramWork:
        """The work of two programs that run one after the other."""
        return ProgramWork(
            self.operations + other.operations,
            self.multiplications + other.multiplications,
            self.products + other.products,
            self.near + other.near,
            self.far + other.far,
        )

    def times(self, factor: float) -> ProgramWork:
        """The work of the same operations on tensors `factor` times as large."""
        large = factor * self.near / max(self.operations, 1) > CACHED_BYTES
        near, far = int(factor * self.near), int(factor * self.far)
        return ProgramWork(
            self.operations,
            int(factor * self.multiplications),
            int(factor * self.products),
            0 if large else near,
            near + far if large else far,
        )


@dataclass(frozen=True, slots=True)
class PassWork:
    """The work of all passes of a plan, in counts.

    Attributes:
        mode: Which graph the passes go through.
        seeds: Rows, or columns in forward mode.
        chunk: Seeds that go through one pass.
        operations: Operations of the backward graph.
        traffic: Bytes of all gradients of one seed.
        largest: Bytes of the largest gradient of one seed.
        looped: Seeds for which torch loops inside operations.
    """

    mode: Literal["reverse", "forward", "replicated"]
    seeds: int
    chunk: int
    operations: int
    traffic: int
    largest: int
    looped: int


@dataclass(frozen=True, slots=True)
class ScalarWork:
    """The work of a scalar program as native code, in counts.

    Attributes:
        products: Scalar products of a run of the rendered program.
        table_bytes: Bytes of its tables.
        tile_bytes: Bytes of a number whose products go through registers together; 0 where
            products run one by one.
        samples: Samples of the rendered program, and samples of a run.
    """

    products: int
    table_bytes: int
    tile_bytes: int = 0
    samples: tuple[int, int] = (1, 1)

    @property
    def sample_products(self) -> int:
        """Scalar products of a sample."""
        return self.products // self.samples[0]


@dataclass(frozen=True, slots=True)
class CostModel:
    """Costs on one machine.

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

    def seconds(self, work: ProgramWork) -> float:
        """Predicted seconds of a tensor program."""
        return (
            work.operations * self.operation
            + work.near / self.cached
            + work.far / self.memory
            + work.products / self.product
        )

    def pass_seconds(self, work: PassWork) -> float:
        """Predicted seconds of passes: those of the default machine, by the cost of an operation.

        The prediction ranks plans only. `passes.race` measures the cost of a plan when it runs.
        """
        return _pass_seconds(work) * self.operation / DEFAULT.operation


DEFAULT = CostModel()
_known: dict[str, CostModel] = {}


def _pass_seconds(work: PassWork) -> float:
    """Predicted seconds of passes on the machine that the constants above are from."""
    passes = -(-work.seeds // work.chunk)
    moved = work.seeds * work.traffic / _PASS_BANDWIDTH
    if work.chunk > 1:
        largest = work.largest * work.chunk
        moved *= _MAPPED if largest > CHUNK_MAPPED_BYTES else 1
        moved *= _UNCACHED if 2 * CHUNK_CACHED_BYTES < largest <= CHUNK_MAPPED_BYTES else 1
    if work.mode == "replicated":  # forward again, backward, and the check of both
        again = passes * (_PASS + 2 * _PASS_OPERATION * work.operations) + 2 * moved
        return again + _PASS + _PASS_OPERATION * work.operations + _CHECK
    if work.chunk == 1:
        overhead = passes * (_PASS + _PASS_OPERATION * work.operations)
    else:
        overhead = passes * (_BATCHED_PASS + _BATCHED_OPERATION * work.operations)
    overhead += work.looped * _LOOPED_OPERATION * work.operations
    if work.mode == "reverse":
        return overhead + moved
    build = _PASS + _TRANSPOSED_BUILD * _PASS_OPERATION * work.operations + _CHECK
    return build + _TRANSPOSED * (overhead + moved)


def scalar_seconds(work: ScalarWork) -> float:
    """Predicted seconds of a run of native code by one thread, at best."""
    tiled = _TILED_PRODUCT_BYTE * work.tile_bytes
    product = tiled if work.tile_bytes else _SCALAR_PRODUCT
    rendered, run = work.samples
    return work.products * product * run / rendered


def scalar_products(work: ScalarWork) -> float:
    """Scalar products of a sample in the time of its products and of its tables."""
    return work.sample_products + _TABLE_BYTE * work.table_bytes


def threads_worth(seconds: float, most: int) -> int:
    """The number of threads that a run of some seconds pays for, at most `most`."""
    return int(min(seconds / _THREAD, most))


def build_seconds(numbers: int) -> float:
    """Predicted seconds of building native code of a program that computes so many numbers."""
    return _BUILD + lowering_seconds(numbers)


def lowering_seconds(numbers: int) -> float:
    """Predicted seconds of lowering and rendering a program that computes so many numbers."""
    return _LOWERED_NUMBER * numbers


def merge_seconds(numbers: int) -> float:
    """Predicted seconds of writing so many numbers of a merged term."""
    return numbers * _MERGE_NUMBER


def merge_savings(operations: int) -> float:
    """Predicted seconds of so many tensor operations that a merged term saves."""
    return operations * _MERGE_OPERATION


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
    large = torch.ones(MAPPED_BYTES // 8 + 1, dtype=torch.float64)
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
