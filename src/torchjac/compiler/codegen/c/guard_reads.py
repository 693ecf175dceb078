"""Guard reads in one compiled call: whether each fact still has its value."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from torchjac._torch.native import Reading
from torchjac.compiler.codegen.c.cpython_entry import bind
from torchjac.compiler.codegen.c.toolchain import compile_library
from torchjac.errors import PlanRefused

# The data of the function are bytes: six numbers a read.
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
    """A test that all reads return their present values; None where it cannot be compiled.

    Reads are made in order, up to the first that differs.
    """
    library = _library()
    if library is None:
        return None
    rows = array("q")
    for r in readings:
        rows.extend((r.function, r.argument, r.by_reference, r.mask, *r.read()))
    return bind(library.torchjac_unchanged, rows.tobytes())


@functools.cache
def _library() -> Any:
    try:
        return compile_library(_TEXT, 2)
    except PlanRefused:
        return None
