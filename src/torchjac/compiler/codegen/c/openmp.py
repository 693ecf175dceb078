"""The entry of a parallel function: OpenMP threads, each of which runs a part.

torch has started the threads already: it ships the same library, and idle threads wait for both.
"""

from __future__ import annotations

from torchjac.compiler.codegen.schedule import ScheduleKind

_BATCH = 16  # samples of a SIMD batch at most: they stay in one part


def parallel_entry(name: str, kind: ScheduleKind, scratch: int) -> str:
    """C text of a function that runs another function in threads, a part of the work each.

    The parameters are those of the other function up to the scratch memory, then the number of
    iterations, and the number of threads.

    Args:
        name: The name of the other function.
        kind: The schedule of the other function. A batch takes the first sample and the sample
            after the last, and has scratch memory of its own; parallel loops take the number of the
            part, and the number of parts.
        scratch: Bytes of scratch memory.
    """
    samples = kind is not ScheduleKind.PARALLEL
    sample = [f"torchjac_sample(turns, {p}, parts)" for p in ("part", "part + 1")]
    part = ", ".join(sample) if samples else "part, parts"
    memory = f"(char *)scratch + part * {scratch}" if samples else "scratch"
    return f"""
{partition_function("torchjac_sample", _BATCH) if samples else ""}
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


def partition_function(name: str, together: int) -> str:
    """C text of a function that returns the first iteration of a part of a loop.

    Args:
        name: The name of the function of iterations, part, and parts.
        together: Iterations that stay together; a power of two.
    """
    return f"""static inline long {name}(long turns, long part, long parts)
{{
  return part < parts ? turns * part / parts & ~{together - 1}L : turns;
}}"""
