"""Kernels in several threads: the text that starts them, and how many there are.

Threads are those of OpenMP, which torch has started already: it ships the same library, and its
threads wait for either.
"""

from __future__ import annotations

from torchjac.compiler.codegen.schedule import ScheduleKind

# Samples that stay together: a strip of them is computed at once.
_STRIP = 16


def shared(name: str, kind: ScheduleKind, scratch: int) -> str:
    """C text of a function that runs another one in threads, each of which has a part of the work.

    It takes what the other one takes up to the memory to work in, then how many turns there are,
    and how many threads.

    Args:
        name: Of the other function.
        kind: Its schedule. That of a batch takes the first of its samples, and the one after the
            last, and needs memory of its own; others take the number of the part, and how many
            there are.
        scratch: Bytes of that memory.
    """
    samples = kind is not ScheduleKind.PARALLEL
    sample = [f"torchjac_sample(turns, {p}, parts)" for p in ("part", "part + 1")]
    part = ", ".join(sample) if samples else "part, parts"
    memory = f"(char *)scratch + part * {scratch}" if samples else "scratch"
    return f"""
{cut("torchjac_sample", _STRIP) if samples else ""}
#ifdef _OPENMP
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);
#endif
int {name}_shared(const void *const *in, const void *const *table, void *const *out, void *scratch,
  long turns, long threads)
{{
  (void)turns; (void)threads;
#ifdef _OPENMP
  if (threads > 1)
  {{
    int fine = 1;
#pragma omp parallel num_threads(threads) reduction(&& : fine)
    {{
      const long part = omp_get_thread_num(), parts = omp_get_num_threads();
      fine = {name}(in, table, out, {memory}, {part}) && fine;
    }}
    return fine;
  }}
#endif
  return {name}(in, table, out, scratch, 0, {"turns" if samples else "1"});
}}
"""


def cut(name: str, together: int) -> str:
    """C text of a function that says where a part of a loop begins: the number of a turn.

    Args:
        name: Of the function: of how many turns there are, the part, and how many parts.
        together: Turns that stay together; a power of two.
    """
    return f"""static inline long {name}(long turns, long part, long parts)
{{
  return part < parts ? turns * part / parts & ~{together - 1}L : turns;
}}"""
