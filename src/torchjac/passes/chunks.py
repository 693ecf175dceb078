"""Chunks of seeds, halved when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torchjac._torch.autograd import out_of_memory
from torchjac.passes.slab import Slab

# Bytes of a slab of plain passes, at most: small rows are stacked before layout reads them.
_SLAB_BYTES = 2**20


def in_chunks(seeds: int, chunk: int, evaluate: Callable[[int, int], Slab]) -> Iterator[Slab]:
    """Evaluates seeds `0..seeds` in chunks; a chunk that does not fit into memory is halved.

    Args:
        seeds: Number of seeds.
        chunk: Size of the first chunk.
        evaluate: Evaluates the seeds from a start to a stop.

    Raises:
        RuntimeError: torch's own out-of-memory error, if a single seed does not fit.
    """
    start = 0
    while start < seeds:
        stop = min(seeds, start + chunk)
        try:
            slab = evaluate(start, stop)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or stop - start == 1:
                raise
            chunk = (stop - start + 1) // 2
            continue
        yield slab
        del slab  # frees the memory of this chunk before the next one runs
        start = stop


def rows_at_once(seeds: int, bytes_per_seed: int) -> int:
    """The number of plain passes to stack into one slab."""
    return max(1, min(seeds, _SLAB_BYTES // max(1, bytes_per_seed)))
