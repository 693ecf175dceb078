"""Many facts read in one call, compiled: whether each is what it was."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from torchjac._torch.native import Reading
from torchjac.compiler.codegen.c.cpython_entry import bound
from torchjac.compiler.codegen.c.toolchain import compiled
from torchjac.errors import PlanRefused

# What is bound to the function is bytes, six numbers a reading.
_TEXT = """
typedef long long number;
extern char *PyBytes_AsString(void *);
extern number PyBytes_Size(void *);
extern void *PyBool_FromLong(long);
struct reading
{
  number (*function)(const void *, number *);
  const void *argument;
  number by_reference, mask, returned, written;
};
void *torchjac_unchanged(void *self, void *nothing)
{
  const struct reading *r = (const struct reading *)PyBytes_AsString(self);
  const struct reading *end = r + PyBytes_Size(self) / (number)sizeof *r;
  (void)nothing;
  for (; r < end; r++)
  {
    const void *given = r->by_reference ? (const void *)&r->argument : r->argument;
    number written = 0, returned = 0;
    returned = r->function ? r->function(given, &written) : *(const number *)r->argument;
    returned &= r->mask;
    if (returned != r->returned || written != r->written) return PyBool_FromLong(0);
  }
  return PyBool_FromLong(1);
}
"""


def unchanged(readings: Sequence[Reading]) -> Callable[[], bool] | None:
    """A test whether all of them give what they give now; None where there is no such test.

    They are read in order, up to the first that differs.
    """
    library = _library()
    if library is None:
        return None
    rows = array("q")
    for r in readings:
        rows.extend((r.function, r.argument, r.by_reference, r.mask, *r.read()))
    return bound(library.torchjac_unchanged, rows.tobytes())


@functools.cache
def _library() -> Any:
    try:
        return compiled(_TEXT, 2)
    except PlanRefused:
        return None
